"""Attention on CPUs with products of bfloat16.

A few rows at a time, so that their scores stay in the cache. The backward pass computes the scores
anew, in both orders: XLA for CPUs has fast products of bfloat16 only for factors that are not
transposed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xflow_jax.models.products import multiply_rounded
from xflow_jax.types import Array, Bool, Float

CACHE_BYTES = 8 * 2**20  # scores of the rows at a time
_MASKED = -1e30


def rounded_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    allowed: Bool[Array, "#B 1 #L M"] | None,
) -> Float[Array, "B L H D"]:
    """Computes softmax attention with factors rounded to bfloat16.

    Sums, scores and softmax are float32.

    Args:
        q: queries.
        k: keys, of as many heads.
        v: values.
        allowed: pairs (query, key) that may attend. None: all.

    Returns:
        The weighted sums of values, in the dtype of `v`.
    """
    b, length, h, d = q.shape
    if allowed is None:
        allowed = jnp.ones((1, 1, 1, k.shape[1]), bool)
    allowed = jnp.broadcast_to(allowed, (b, *allowed.shape[1:]))
    rows = _rows_at_a_time(b, 4 * h * length * k.shape[1])
    heads = (*(_heads_first(x) for x in (q * d**-0.5, k, v)), allowed)
    parts = jax.tree.map(lambda x: x.reshape(b // rows, rows, *x.shape[1:]), heads)
    out = jax.lax.map(lambda part: _attend(*part), parts)
    return out.reshape(b, h, length, d).transpose(0, 2, 1, 3).astype(v.dtype)


def _rows_at_a_time(rows: int, row_bytes: int) -> int:
    """Returns a divisor of the rows.

    A mesh splits rows itself, so it gets all of them.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return rows
    most = max(1, CACHE_BYTES // row_bytes)
    return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def _heads_first(x: jax.Array) -> jax.Array:
    """Returns [B, H, L, D] in bfloat16.

    The barrier keeps the transposition out of the products.
    """
    y = x.astype(jnp.float32).transpose(0, 2, 1, 3)
    flat = jax.lax.optimization_barrier(y.reshape(-1))
    return flat.astype(jnp.bfloat16).reshape(y.shape)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    return _forward(q, k, v, allowed)[0]


def _scores(q: jax.Array, k: jax.Array, allowed: jax.Array) -> jax.Array:
    return jnp.where(allowed, multiply_rounded(q, k, 3), _MASKED)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    scores = _scores(q, k, allowed)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = multiply_rounded(weights.astype(jnp.bfloat16), v, 2) / total
    return out, (q, k, v, allowed, out, largest + jnp.log(total))


def _backward(kept: tuple[Any, ...], slope: jax.Array) -> tuple[Any, ...]:
    q, k, v, allowed, out, total = kept
    swap = partial(jnp.swapaxes, axis1=2, axis2=3)
    mean = (slope * out).sum(axis=-1, keepdims=True)
    slope = slope.astype(jnp.bfloat16)

    weights = jnp.exp(_scores(q, k, allowed) - total)
    of_scores = weights * (multiply_rounded(slope, v, 3) - mean)
    of_q = multiply_rounded(of_scores.astype(jnp.bfloat16), k, 2)

    weights = jnp.exp(_scores(k, q, swap(allowed)) - swap(total))
    of_v = multiply_rounded(weights.astype(jnp.bfloat16), slope, 2)
    of_scores = weights * (multiply_rounded(v, slope, 3) - swap(mean))
    of_k = multiply_rounded(of_scores.astype(jnp.bfloat16), q, 2)
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
