"""The cache of decoding: keys and values of what came before, and who may see them. Block-causal, it is exact.

Under block-causal attention nothing that comes later changes a finished block, so its keys and values, once written,
stay right, and a step costs one block of queries. A cache is a dict of the model's stacks of layers, each
{"k", "v"}: [layers, B, M, K, D] with M positions; a model's `hidden_cached` reads it and returns the keys and values of
its own positions, of which `write` makes the next cache. Positions count from each row's own first token: rows are
aligned to the left (`align`), so that the block grid is the same in all of them. In outline:

    h, prompt = hidden_cached(x[:, :P], empty(..., 0), 0, mask, block_length)        # the prompt, all at once
    cache = write(empty(..., M), prompt, 0)
    repeat for each block:  h, block = hidden_cached(x_block, cache, start)          # any number of steps
                            cache = write(cache, block, start)                       # when its tokens stand

Without blocks the same cache is an approximation, of a prompt whose keys and values are some steps old (sight.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Layer = dict[
    str, jax.Array
]  # {"k", "v"}: [B, M, K, D] of one layer, or with a leading axis of a stack of them


Cache = dict[str, Layer]


def empty_cache(
    layers: dict[str, int],
    batch: int,
    positions: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> Cache:
    """A cache of `positions` for a model whose stacks have so many layers; with 0 positions, the one to start from."""
    return {
        stack: {
            part: jnp.zeros((count, batch, positions, kv_heads, head_dim), dtype)
            for part in ("k", "v")
        }
        for stack, count in layers.items()
    }


def write_cache(cache: Cache, new: Cache, start: jax.Array | int) -> Cache:
    """The cache with the keys and values `new`, [layers, B, n, K, D], at the positions start ... start + n - 1.

    start: int, or int [B], one per row; start + n must not exceed the cache's positions. What is written beyond the
    last finished block does no harm: nobody sees it before it is overwritten.
    """

    update = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(start) == 0:
        return jax.tree.map(lambda old, part: update(old, part, start, axis=2), cache, new)
    rows = jax.vmap(
        lambda old, part, at: update(old, part, at, axis=1), in_axes=(1, 1, 0), out_axes=1
    )
    return jax.tree.map(lambda old, part: rows(old, part, start), cache, new)


def cache_mask(
    cache: Cache, start: jax.Array, length: int, mask: jax.Array | None, block_length: int | None
) -> jax.Array:
    """Who sees whom: bool [B, 1, n, M + n], queries at start ... start + n - 1, keys of the cache, then their own.

    Of the cache's M positions those before `start`, int [B], are seen. Of the queries' own, those where mask, bool
    [B, n], is True (None: all), up to the end of the query's block (block_length None: all of them are one block, and
    the result is [B, 1, 1, M + n]). A mask [B, M + n] is of the cache's positions, too.
    """
    cached = next(iter(cache.values()))["k"].shape[2]
    own = jnp.ones((start.shape[0], length), bool) if mask is None else mask[:, -length:]
    own = own[:, None, None, :]
    if block_length is not None:
        block = (start[:, None] + jnp.arange(length)[None, :]) // block_length
        own = own & (block[:, None, None, :] <= block[:, None, :, None])
    before = jnp.arange(cached)[None, :] < start[:, None]
    if mask is not None and mask.shape[1] > length:
        before &= mask[:, :cached]
    before = jnp.broadcast_to(before[:, None, None, :], (*own.shape[:3], cached))
    return jnp.concatenate([before, own], axis=-1)


def extend_keys(
    layer: Layer | None, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, Layer | None]:
    """(keys, values) to attend to: a layer's cached ones and then the new k, v [B, n, K, D]; and the new ones to keep.

    Without a cache nothing is kept.
    """
    if layer is None:
        return k, v, None
    keys, values = (
        jnp.concatenate([layer[name], new], axis=1) for name, new in (("k", k), ("v", v))
    )
    return keys, values, {"k": k, "v": v}


def align_left(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x [B, L, ...] with each row's real positions, mask bool [B, L] with padding on the left, moved to its start."""
    first = jnp.argmax(mask, axis=1)
    return jax.vmap(lambda row, shift: jnp.roll(row, -shift, axis=0))(x, first)
