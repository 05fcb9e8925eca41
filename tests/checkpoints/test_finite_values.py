"""Search for NaN and infinity."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xflow_jax.checkpoints.finite_values import is_finite


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_one_value_is_found(dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.asarray([0.0, -0.0, largest, -largest, 1e-40, -1.0], dtype)
    assert is_finite(x) and is_finite(jnp.asarray(x)) and is_finite(x[:0])
    for place in range(len(x)):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[place] = value
            assert not is_finite(bad) and not is_finite(jnp.asarray(bad))
            assert not is_finite(bad.reshape(2, 3))
