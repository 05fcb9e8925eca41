"""`read_out`: tokens after the end of a sequence."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.decoding.state import DecodeConfig, DecodeState, read_out


@pytest.mark.parametrize(
    "options, finished, wanted",
    [
        ({}, False, [3, 9, 4, 9, 5, 6]),
        ({"eos_early_stop": True}, False, [3, 9, 4, 9, 5, 6]),
        ({"eos_early_stop": True}, True, [3, 9, 9, 9, 9, 9]),
        ({"stop_at_eos": True}, False, [3, 9, 9, 9, 9, 9]),
    ],
)
def test_read_out_after_the_end(options, finished, wanted):
    state = DecodeState(
        x=jnp.zeros((1, 6, 1)),
        t=jnp.ones((1, 6)),
        tokens=jnp.array([[3, 9, 4, 9, 5, 6]]),
        forward_passes=jnp.zeros(1, jnp.int32),
        finished=jnp.array([finished]),
    )
    tokens, progress = read_out(DecodeConfig(6, 6, 2, **options), state, (9,))
    np.testing.assert_array_equal(tokens, [wanted])
    assert progress.shape == (1, 6)
    several, _ = read_out(DecodeConfig(6, 6, 2, stop_at_eos=True), state, (9, 3))
    np.testing.assert_array_equal(several, [[3, 9, 9, 9, 9, 9]])
