"""Gradients over the parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from xflow_jax.types import Array, Key, Metrics, Params

Rows = TypeVar("Rows")  # a tree of arrays [B, ...]
Kept = TypeVar("Kept")  # a tree of arrays [B, ...] that a part returns


def mean_gradients(
    grad_fn: Callable[[Params, Rows, jax.Array], tuple[Params, tuple[Metrics, Kept]]],
    params: Params,
    rows: Rows,
    key: Key[Array, ""],
    count: int,
) -> tuple[Params, tuple[Metrics, Kept]]:
    """Averages gradients and metrics over equal parts of a batch.

    Sums are float32. optax.microbatching.microbatch would add bfloat16 gradients in bfloat16, and
    it has no random key for each part.

    Args:
        grad_fn: (params, rows of a part, key) -> (gradients, (metrics, rows to keep)).
        params: the trained parameters.
        rows: a tree of arrays [B, ...].
        key: a random key. With one part it is that of the part.
        count: number of parts.

    Returns:
        The mean gradients, the mean metrics, and the kept rows of all parts in their order.
    """
    if count == 1:
        return grad_fn(params, rows, key)
    # Part i has the rows i, i + count, ..., so each part is sharded as the batch is.
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), rows)

    def visit(total: Params, part: tuple[Rows, jax.Array]) -> tuple[Params, tuple[Metrics, Kept]]:
        grads, aux = grad_fn(params, *part)
        return jax.tree.map(lambda t, g: t + g / count, total, grads), aux

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, (metrics, kept) = jax.lax.scan(visit, zero, (parts, jax.random.split(key, count)))
    kept = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), kept)
    return grads, (jax.tree.map(jnp.mean, metrics), kept)
