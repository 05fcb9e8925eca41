"""Key/value cache for decoding. It is exact under block-causal attention.

Under block-causal attention nothing later changes a finished block. Its keys and values, once
written, stay right, and a step costs one block of queries. A cache is a dict of the model's stacks
of layers, each {"k", "v"}: [layers, B, M, K, D] with M positions. A model's `hidden_cached` reads
it and returns the keys and values of its own positions. `write_cache` makes the next cache of
them. Positions count from each row's own first token: rows are aligned to the left (`align_left`),
so that the block grid is the same in all of them. In outline:

    h, prompt = hidden_cached(x[:, :P], empty_cache(B, 0), 0, mask, block_length)  # all at once
    cache = write_cache(empty_cache(B, M), prompt, 0)
    for each block, at start:
        h, block = hidden_cached(x_block, cache, start)  # any number of steps
        cache = write_cache(cache, block, start)  # once its tokens are final

Without block-causal attention a cache is an approximation, since its keys and values are some
steps old (decoding/cached_forward.py). It can then hold positions after the queries too, and the
queries' own keys and values take the place of those at their positions (`replace_keys`).
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from xflow_jax.types import Array, Bool, Cache, Float, Int

# {"k", "v"}: [B, M, K, D] of one layer. With "column", a scalar or [B], the keys and values of the
# queries take the place of those from this position on.
LayerCache: TypeAlias = dict[str, jax.Array]


def empty_cache(
    layers: dict[str, int],
    batch: int,
    positions: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> Cache:
    """Makes a cache of zeros.

    Args:
        layers: number of layers of each stack.
        batch: B.
        positions: M. Zero for the first pass of a decode.
        kv_heads: K.
        head_dim: D.
        dtype: dtype of keys and values.

    Returns:
        The cache.
    """
    return {
        stack: {
            part: jnp.zeros((count, batch, positions, kv_heads, head_dim), dtype)
            for part in ("k", "v")
        }
        for stack, count in layers.items()
    }


def write_cache(
    cache: Cache, new: Cache, start: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"]
) -> Cache:
    """Writes keys and values to consecutive positions.

    Positions beyond the last finished block may hold anything: they are overwritten before a query
    attends to them.

    Args:
        cache: the cache.
        new: keys and values to write, [layers, B, n, K, D].
        start: position of the first one, or int [B] with one for each row. start + n must not
            exceed the positions of the cache.

    Returns:
        The new cache.
    """
    update = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(start) == 0:
        return jax.tree.map(lambda old, part: update(old, part, start, axis=2), cache, new)
    rows = jax.vmap(
        lambda old, part, at: update(old, part, at, axis=1), in_axes=(1, 1, 0), out_axes=1
    )
    return jax.tree.map(lambda old, part: rows(old, part, start), cache, new)


def cache_mask(
    cache: Cache,
    start: Int[Array, " B"],
    length: int,
    mask: Bool[Array, "B _"] | None,
    block_length: int | None,
) -> Bool[Array, "B 1 _ _"]:
    """Builds the attention mask for cached decoding.

    A query attends to the cached positions before `start`, and to the queries' own positions up to
    the end of its block.

    Args:
        cache: the cache, of M positions.
        start: position of each row's first query.
        length: n, number of queries.
        mask: real positions among the queries' own [B, n], or also among the cached [B, M + n].
            None: all are.
        block_length: positions of a block. None: all queries are one block.

    Returns:
        bool [B, 1, n, M + n], or [B, 1, 1, M + n] if block_length is None: the keys of the cache,
        then the queries' own.
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
    layer: LayerCache | None, k: Float[Array, "B L K D"], v: Float[Array, "B L K D"]
) -> tuple[Float[Array, "B M K D"], Float[Array, "B M K D"], LayerCache | None]:
    """Joins a layer's cached keys and values with the new ones.

    The new ones come after the cached ones, or with "column" in their place.

    Args:
        layer: the layer's cache, or None.
        k: new keys.
        v: new values.

    Returns:
        (keys, values, cache entry). The first two are what queries attend to. The entry holds k
        and v, or is None without a cache.
    """
    if layer is None:
        return k, v, None
    pairs = ((layer["k"], k), (layer["v"], v))
    if "column" in layer:
        keys, values = (_put(old, new, layer["column"]) for old, new in pairs)
    else:
        keys, values = (jnp.concatenate(pair, axis=1) for pair in pairs)
    return keys, values, {"k": k, "v": v}


def _put(
    old: Float[Array, "B M K D"], new: Float[Array, "B n K D"], start: Int[Array, "*rows"]
) -> Float[Array, "B M K D"]:
    """Writes new positions over old ones, which begin at `start`."""
    update = jax.lax.dynamic_update_slice_in_dim
    if start.ndim:
        return jax.vmap(functools.partial(update, axis=0))(old, new, start)
    return update(old, new, start, axis=1)


def replace_keys(cache: Cache, start: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"]) -> Cache:
    """Marks where the queries' keys and values replace cached ones.

    Args:
        cache: the cache.
        start: position of the first query, or int [B] with one for each row.

    Returns:
        The cache with a "column" for each layer, as `extend_keys` reads it.
    """
    first = jnp.asarray(start, jnp.int32)
    return {
        stack: {**part, "column": jnp.broadcast_to(first, (len(part["k"]), *first.shape))}
        for stack, part in cache.items()
    }


def align_left(x: ArrayLike, mask: Bool[ArrayLike, "B L"]) -> jax.Array:
    """Moves each row's real positions to its start.

    Args:
        x: [B, L, ...].
        mask: real positions. Padding is on the left.

    Returns:
        x with its rows rolled.
    """
    first = jnp.argmax(jnp.asarray(mask), axis=1)
    return jax.vmap(lambda row, shift: jnp.roll(row, -shift, axis=0))(jnp.asarray(x), first)
