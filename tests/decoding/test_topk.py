"""Selection of the largest logits against a stable sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.decoding.topk import _select_by_maxima, _select_packed, merge_top_k, top_k


def sorted_top_k(z, k):
    """Returns (values, ids) [k, ...] by a stable sort, so that the lowest index comes first."""
    ids = np.moveaxis(np.argsort(-z, axis=-1, kind="stable")[..., :k], -1, 0)
    return np.take_along_axis(np.moveaxis(z, -1, 0), ids, axis=0), ids


@pytest.mark.parametrize("size", [5, 64, 256, 320, 640])
@pytest.mark.parametrize("recomputable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_k_is_a_stable_sort(size, recomputable, dtype):
    rng = np.random.default_rng(0)
    # Many are equal. Without negative zeros, which jax.lax.top_k puts after the positive ones.
    z = np.round(rng.normal(size=(3, size)).astype(np.float32) * 2) + 0
    values, ids = jax.jit(top_k, static_argnums=(1, 2))(jnp.asarray(z, dtype), 4, recomputable)
    wanted_values, wanted_ids = sorted_top_k(z, 4)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_merging_is_a_stable_sort():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (8, 5)).astype(np.float32)
    ids = rng.integers(0, 100, (8, 5))
    top, found = merge_top_k(jnp.asarray(values), jnp.asarray(ids), 3)
    wanted, places = sorted_top_k(values.T, 3)
    np.testing.assert_array_equal(top, wanted)
    np.testing.assert_array_equal(found, np.take_along_axis(ids, places, axis=0))


def test_values_and_ids_packed_into_one_integer():
    """Signed zeros, infinities and ties come out as they went in."""
    rng = np.random.default_rng(5)
    logits = jnp.asarray(np.round(rng.normal(size=(2, 6, 640)) * 2), jnp.bfloat16)
    logits = logits.at[0, :, 3:].set(-jnp.inf)
    logits = logits.at[1, 0].set(jnp.where(rng.random(640) < 0.5, 0.0, -0.0))
    logits = logits.at[1, 1, [9, 500]].set(3e38)
    wanted = _select_by_maxima(logits.astype(jnp.float32), 4)
    for ours, theirs in zip(_select_packed(logits, 4), wanted, strict=True):
        np.testing.assert_array_equal(jnp.moveaxis(ours, 0, -1), theirs)
