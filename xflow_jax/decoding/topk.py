"""Selection of the k largest of many logits, without a complete sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.types import Array, Float, Int

GROUP = 64  # entries of a group, of which the maximum is computed first

# (z [..., V], k) -> the k largest entries and their indices, [..., k] each.
Select: TypeAlias = Callable[[jax.Array, int], Sequence[jax.Array]]


def top_k(
    z: Float[Array, "*B V"], k: int, recomputable: bool = False
) -> tuple[Float[Array, " k *B"], Int[Array, " k *B"]]:
    """Selects the k largest entries of the last axis.

    jax.lax.top_k sorts the complete axis, on CPUs and TPUs alike. Reductions replace it here.

    Args:
        z: logits of any float dtype.
        k: number of entries to select.
        recomputable: set if z is computed inside this jit. XLA may recompute it for each reduction,
            once with a fused multiply-add and once without. The value of a maximum is then not
            found again at its index, so jax.lax.top_k sorts the last few candidates. It puts 0.0
            before -0.0.

    Returns:
        The entries in float32 and in descending order, and their indices. Equal entries count
        separately, and the lowest index comes first.
    """
    size = z.shape[-1]
    select: Select = jax.lax.top_k if recomputable else _select_by_maxima

    def reduce_float32(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = z.astype(jnp.float32)
        large = size % GROUP == 0 and size >= k * GROUP
        values, ids = _select_by_groups(z, k, select) if large else select(z, k)
        return jnp.moveaxis(values, -1, 0), jnp.moveaxis(ids, -1, 0)

    if recomputable or z.dtype != jnp.bfloat16 or size > 2**16:
        return reduce_float32(z)
    return jax.lax.platform_dependent(z, cpu=reduce_float32, default=lambda z: _select_packed(z, k))


def merge_top_k(
    values: Float[Array, " m *B"], ids: Int[Array, " m *B"], k: int
) -> tuple[Float[Array, " k *B"], Int[Array, " k *B"]]:
    """Selects the k largest of a few values.

    Args:
        values: the values, along the first axis.
        ids: an id for each value.
        k: number of values to select.

    Returns:
        The values in descending order, and their ids. Among equal values the earlier comes first.
    """
    place = jnp.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    above = values[:, None] > values[None, :]
    above |= (values[:, None] == values[None, :]) & (place[:, None] < place[None, :])
    # The rank of a value is the number of values above it.
    chosen = above.sum(axis=0)[None, :] == place[:k, None]
    top = jnp.where(chosen, values[None, :], -jnp.inf).max(axis=1)
    return top, jnp.where(chosen, ids[None, :], 0).sum(axis=1)


def _select_by_maxima(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Selects the k largest by k maxima.

    The indices differ even if all that is left is -inf.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    left = jnp.ones(z.shape, bool)
    values, places = [], []
    for _ in range(k):
        value = jnp.where(left, z, -jnp.inf).max(axis=-1)
        place = jnp.where(left & (z == value[..., None]), ids, z.shape[-1] - 1).min(axis=-1)
        values.append(value)
        places.append(place)
        left &= ids != place[..., None]
    return jnp.stack(values, axis=-1), jnp.stack(places, axis=-1)


def _select_by_groups(z: jax.Array, k: int, select: Select) -> tuple[jax.Array, jax.Array]:
    """Selects the k largest from the k groups with the largest maxima."""
    groups = z.reshape(*z.shape[:-1], -1, GROUP)
    # The groups are sorted, so that among equal entries the lowest index still comes first.
    chosen = jnp.sort(_select_by_maxima(groups.max(axis=-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    top, place = select(candidates.reshape(*z.shape[:-1], -1), k)
    return top, jnp.take_along_axis(chosen, place // GROUP, axis=-1) * GROUP + place % GROUP


def _select_packed(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Selects the k largest of bfloat16 in one reduction, [k, ...].

    Value and index share an integer.
    """
    bits = jax.lax.bitcast_convert_type(z, jnp.int16).astype(jnp.int32)
    # The high bits are integers in the order of the numbers, both zeros 0. The low bits are the
    # index, counted down.
    ordered = jnp.where(bits < 0, (bits ^ 0x7FFF) + 1, bits)
    packed = (ordered << 16) | (0xFFFF - jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1))
    length, least = 1 << (k - 1).bit_length(), jnp.int32(jnp.iinfo(jnp.int32).min)
    # Each entry begins as a descending list of its own.
    lists = (packed, *[jnp.full_like(packed, least)] * (length - 1))
    merged = jax.lax.reduce(lists, (least,) * length, _merge_descending, (z.ndim - 1,))
    best = jnp.stack(merged[:k])
    ordered = best >> 16
    bits = jnp.where(ordered < 0, (ordered - 1) ^ 0x7FFF, ordered).astype(jnp.int16)
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
    return values, 0xFFFF - (best & 0xFFFF)


def _merge_descending(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Merges two descending lists of k into the k largest.

    k is a power of two (Batcher's network).
    """
    found = [jnp.maximum(x, y) for x, y in zip(a, reversed(b), strict=True)]
    step = len(a) // 2
    while step:
        for i in (i for i in range(len(found)) if not i & step):
            x, y = found[i], found[i + step]
            found[i], found[i + step] = jnp.maximum(x, y), jnp.minimum(x, y)
        step //= 2
    return tuple(found)
