"""Block-causal decoding with a key/value cache equals a pass over the whole sequence."""

import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import apply
from tests.llada2_helpers import TINY2, random_config, random_params
from xflow_jax.models import kv_cache
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import build

ONE = LLaDAConfig(  # one layer, which compiles fast
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    vocab_size=9,
    mask_token_id=8,
    eos_token_id=0,
    mlp_hidden_size=24,
)


def cache_of(*values):
    """Returns a cache of one layer, one head and one dim with these keys, [B, M]."""
    k = jnp.asarray(values, jnp.float32)[None, :, :, None, None]
    return {"blocks": {"k": k, "v": -k}}


def test_keys_are_written_from_their_start_on():
    cache, new = cache_of([1, 2, 3, 4], [5, 6, 7, 8]), cache_of([10, 11], [20, 21])
    for start, wanted in (
        (0, [[10, 11, 3, 4], [20, 21, 7, 8]]),
        (2, [[1, 2, 10, 11], [5, 6, 20, 21]]),
        (jnp.array([2, 1]), [[1, 2, 10, 11], [5, 20, 21, 8]]),
    ):
        ours = kv_cache.write_cache(cache, new, start)["blocks"]
        np.testing.assert_array_equal(ours["k"][0, :, :, 0, 0], wanted)
        np.testing.assert_array_equal(ours["v"], -ours["k"])


def test_queries_attend_to_the_positions_before_their_own():
    """The cached positions are columns 0 to 3. The queries' own ones come after them."""
    cache, start = cache_of([0] * 4, [0] * 4), jnp.array([2, 3])
    ours = kv_cache.cache_mask(cache, start, 2, None, None)
    assert ours[:, 0, 0].astype(int).tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]
    # In blocks of two, positions 2 and 3 are one block, and positions 3 and 4 are two.
    ours = kv_cache.cache_mask(cache, start, 2, None, 2).astype(int)
    assert ours[0, 0].tolist() == [[1, 1, 0, 0, 1, 1]] * 2
    assert ours[1, 0].tolist() == [[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]]
    own = jnp.array([[True, False], [True, True]])
    ours = kv_cache.cache_mask(cache, start, 2, own, None)[:, 0, 0].astype(int)
    assert ours.tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1]]
    every = jnp.array([[False, True, True, True, True, True], [True] * 6])
    ours = kv_cache.cache_mask(cache, start, 2, every, None)[:, 0, 0].astype(int)
    assert ours.tolist() == [[0, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]


def test_new_keys_come_after_the_cached_ones_or_in_their_place():
    layer, k = jax.tree.map(lambda x: x[0], cache_of([1, 2, 3, 4])["blocks"]), jnp.full(1, 9.0)
    k = k.reshape(1, 1, 1, 1)
    keys, values, new = kv_cache.extend_keys(layer, k, -k)
    assert keys.ravel().tolist() == [1, 2, 3, 4, 9] and values.ravel().tolist() == [
        -1,
        -2,
        -3,
        -4,
        -9,
    ]
    assert new["k"].ravel().tolist() == [9] and new["v"].ravel().tolist() == [-9]
    placed = kv_cache.replace_keys(cache_of([1, 2, 3, 4]), 2)["blocks"]
    keys, values, _ = kv_cache.extend_keys(jax.tree.map(lambda x: x[0], placed), k, -k)
    assert keys.ravel().tolist() == [1, 2, 9, 4] and values.ravel().tolist() == [-1, -2, -9, -4]
    assert kv_cache.extend_keys(None, k, -k) == (k, -k, None)


def test_rows_move_to_the_left():
    mask = np.array([[False, True, True, True], [True] * 4])
    ours = kv_cache.align_left(np.array([[0, 5, 6, 7], [1, 2, 3, 4]]), mask)
    assert ours.tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]


def test_one_layer_block_by_block_is_the_whole_sequence():
    check_cached(ONE, seed=0, size=4, length=14, ready=8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_block_by_block_with_a_cache_is_the_whole_sequence(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    size, length = rng.choice([3, 4, 5]), rng.choice([11, 12, 14])
    check_cached(config, seed, size, length, ready=size * rng.randint(1, 2) if seed % 4 == 0 else 0)


def check_cached(config, seed, size, length, ready):
    """Compares cached blocks with the whole sequence, for rows with 0, 1 and 3 padding tokens.

    The first `ready` positions pass at once, as a prompt.
    """
    model = build(config)
    params = random_params(model, seed)
    x = np.random.default_rng(seed).normal(size=(3, length, config.hidden_size)).astype(np.float32)
    mask = np.arange(length)[None] >= np.array([[0], [1], [3]])
    whole = jax.jit(lambda p, x, m: model.apply({"params": p}, x, m, size, method="hidden"))
    full, x, mask = (
        np.asarray(kv_cache.align_left(a, mask)) for a in (whole(params, x, mask), x, mask)
    )
    x, mask = (np.pad(a, ((0, 0), (0, size), *((0, 0),) * (a.ndim - 2))) for a in (x, mask))

    @jax.jit
    def step(p, x, cache, at, m):
        return model.apply({"params": p}, x, cache, at, m, size, method="hidden_cached")

    cache, ours = model.empty_cache(3, length + size), []
    if ready:
        h, new = step(
            params, x[:, :ready], model.empty_cache(3, 0), jnp.zeros(3, int), mask[:, :ready]
        )
        cache = kv_cache.write_cache(cache, new, 0)
        ours.append(h)
    for at in range(ready, length, size):
        part, rows = slice(at, at + size), jnp.full(3, at)
        # Decoding passes a block many times. A pass with other contents must leave no trace.
        _, wrong = step(params, x[:, part] + 1, cache, rows, mask[:, part])
        h, new = step(
            params, x[:, part], kv_cache.write_cache(cache, wrong, rows), rows, mask[:, part]
        )
        cache = kv_cache.write_cache(cache, new, rows if at % 2 else at)
        ours.append(h)
    ours, real = jnp.concatenate(ours, axis=1)[:, :length], mask[:, :length]
    np.testing.assert_allclose(ours[real], full[real], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rows_at_different_blocks():
    """Each row has its own start. A batch gives the results of its rows alone."""
    model = build(TINY2)
    params = random_params(model, 0)
    x = jax.random.normal(jax.random.key(1), (2, 16, 32))
    full = apply(model, params, x, block_length=4, method="hidden")
    _, everything = apply(
        model, params, x, model.empty_cache(2, 0), 0, block_length=4, method="hidden_cached"
    )
    start = jnp.array([4, 12])
    block = jnp.stack([x[0, 4:8], x[1, 12:16]])
    h, new = apply(model, params, block, everything, start, method="hidden_cached")
    np.testing.assert_allclose(h, jnp.stack([full[0, 4:8], full[1, 12:16]]), atol=1e-5)
    chex.assert_trees_all_close(kv_cache.write_cache(everything, new, start), everything, atol=1e-5)


@pytest.mark.slow
def test_a_written_cache_compiles_once():
    model = build(TINY2)
    params = random_params(model, 0)

    @jax.jit
    def step(x, cache, start):
        h, new = model.apply({"params": params}, x, cache, start, method="hidden_cached")
        return h, kv_cache.write_cache(cache, new, start)

    cache = model.empty_cache(2, 12)
    for at in (0, 4, 8):
        _, cache = step(jnp.ones((2, 4, 32)), cache, jnp.full(2, at))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_llada_has_the_same_cache():
    """LLaDA's own attention is not block-causal. Under a block-causal one its cache is exact."""
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=9,
        mask_token_id=8,
        eos_token_id=0,
    )
    check_cached(config, seed=0, size=4, length=14, ready=8)
