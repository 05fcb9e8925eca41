"""The few largest of many logits and where they stand, exactly and without a sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

GROUP = 64  # entries whose maximum is taken first


def top_k(z: jax.Array, k: int, rounded: bool = False) -> tuple[jax.Array, jax.Array]:
    """The k largest of z [..., V] as float32, descending, and their indices, [k, ...] each; of equal ones the lowest
    index first, and each counts.

    Without top_k, which would sort all of z, on CPUs and TPUs alike. rounded: z is made by arithmetic here and now. The
    compiler may then compute it anew for each reduction, once with a fused multiply-add and once without, and the index
    of a maximum is not where its value is looked for; so the last few candidates are sorted after all.
    """
    size = z.shape[-1]
    few = jax.lax.top_k if rounded else _rounds

    def plain(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = z.astype(jnp.float32)
        found = _grouped(z, k, few) if size % GROUP == 0 and size >= k * GROUP else few(z, k)
        return tuple(jnp.moveaxis(part, -1, 0) for part in found)

    if rounded or z.dtype != jnp.bfloat16 or size > 2**16:
        return plain(z)
    return jax.lax.platform_dependent(z, cpu=plain, default=lambda z: _packed(z, k))


def merge_top_k(values: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of a few values [m, ...], descending, [k, ...], and their ids; of equal ones the earlier first."""
    place = jnp.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    above = values[:, None] > values[None, :]
    above |= (values[:, None] == values[None, :]) & (place[:, None] < place[None, :])
    here = (
        above.sum(axis=0)[None, :] == place[:k, None]
    )  # a value's rank is how many stand above it
    return jnp.where(here, values[None, :], -jnp.inf).max(axis=1), jnp.where(
        here, ids[None, :], 0
    ).sum(axis=1)


def _rounds(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`largest`, one after the other; the indices are different ones even where all that is left is -inf."""
    ids, found = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1), []
    left = jnp.ones(z.shape, bool)
    for _ in range(k):
        value = jnp.where(left, z, -jnp.inf).max(axis=-1)
        place = jnp.where(left & (z == value[..., None]), ids, z.shape[-1] - 1).min(axis=-1)
        found.append((value, place))
        left &= ids != place[..., None]
    return tuple(jnp.stack(part, axis=-1) for part in zip(*found, strict=True))


def _grouped(z: jax.Array, k: int, few: Callable[..., Any]) -> tuple[jax.Array, jax.Array]:
    """`largest` in one pass: they lie in the k groups of the largest maxima, of equal ones the earlier."""
    groups = z.reshape(*z.shape[:-1], -1, GROUP)
    chosen = jnp.sort(
        _rounds(groups.max(axis=-1), k)[1], axis=-1
    )  # in order, so that ties still go to the lowest id
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    top, place = few(candidates.reshape(*z.shape[:-1], -1), k)
    return top, jnp.take_along_axis(chosen, place // GROUP, axis=-1) * GROUP + place % GROUP


def _packed(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`largest` of bfloat16: value and index fit one integer, so that one reduction finds all k."""
    bits = jax.lax.bitcast_convert_type(z, jnp.int16).astype(jnp.int32)
    # Integers in the order of the numbers, both zeros 0; below them the index, counted down.
    ordered = jnp.where(bits < 0, (bits ^ 0x7FFF) + 1, bits)
    packed = (ordered << 16) | (0xFFFF - jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1))
    length, least = 1 << (k - 1).bit_length(), jnp.int32(jnp.iinfo(jnp.int32).min)
    lists = (packed, *[jnp.full_like(packed, least)] * (length - 1))  # each entry a list of its own
    best = jnp.stack(jax.lax.reduce(lists, (least,) * length, _bitonic, (z.ndim - 1,))[:k])
    ordered = best >> 16
    bits = jnp.where(ordered < 0, (ordered - 1) ^ 0x7FFF, ordered).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32), 0xFFFF - (
        best & 0xFFFF
    )


def _bitonic(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The k largest of two descending lists of k, descending; k a power of two. Batcher's network."""
    found, step = [jnp.maximum(x, y) for x, y in zip(a, reversed(b), strict=True)], len(a) // 2
    while step:
        for i in (i for i in range(len(found)) if not i & step):
            x, y = found[i], found[i + step]
            found[i], found[i + step] = jnp.maximum(x, y), jnp.minimum(x, y)
        step //= 2
    return tuple(found)
