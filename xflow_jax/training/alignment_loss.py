"""Losses as functions of arrays. Shapes: B batch, N response length, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xflow_jax.parallel import BATCH, LOGICAL, constrain_lookup, divides


def alignment_errors(
    hidden: jax.Array,
    kernel: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
    bias: jax.Array | None = None,
    chunk: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """What Eq. 12 averages: |softmax(Z) W_in - X_0|^2 summed over E, and -log p(token), both float32 [B, N].

    Z = hidden [B, N, E] kernel [E, V] + bias [V]; table [V, E]: W_in; tokens int [B, N]: the clean response, X_0 its
    rows. Table and X_0 are constants of the loss, or the embedding would collapse. Forward and backward pass go over
    the vocabulary in chunks of at most `chunk` rows, as attention kernels do over keys: Z never stands in memory, the
    gradient of the kernel is written once, and a vocabulary sharded over the tensor axis stays where it is.
    """
    table = jax.lax.stop_gradient(table)
    target = constrain_lookup(table[tokens]).astype(jnp.float32)
    return _errors(
        _chunk_layout(kernel.shape[1], chunk), hidden, kernel, bias, table, target, tokens
    )


class _Layout(NamedTuple):
    """Row v of the vocabulary is [shard, part, row] of [shards, parts, rows]: each chunk has as much of every shard."""

    shards: int
    parts: int
    rows: int


def _chunk_layout(vocabulary: int, chunk: int) -> _Layout:
    mesh = jax.sharding.get_abstract_mesh()
    axis = LOGICAL["vocab"]
    shards = mesh.shape[axis] if divides(vocabulary, (axis,)) else 1
    own = vocabulary // shards
    parts = next(
        n for n in range(1, own + 1) if own % n == 0 and vocabulary <= n * chunk or n == own
    )
    return _Layout(shards, parts, own // parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _errors(layout: _Layout, hidden: jax.Array, kernel: jax.Array, bias: Any, *rest: jax.Array):
    return _errors_forward(layout, hidden, kernel, bias, *rest)[0]


def _errors_forward(layout, hidden, kernel, bias, table, target, tokens):
    """((error, nll), what the backward pass needs), by a running maximum of Z and sums relative to it."""
    logits, rows, _ = _chunks(layout, hidden, kernel, bias, table)
    b, n, e = hidden.shape

    def visit(state, part):
        top, total, mean, chosen = state
        z = logits(part)
        new = jnp.maximum(top, z.max(axis=(2, 3)))
        weight, shrink = jnp.exp(z - new[..., None, None]), jnp.exp(top - new)
        moved = jnp.einsum(
            "bnsv,sve->bne",
            weight.astype(table.dtype),
            rows(part),
            preferred_element_type=jnp.float32,
        )
        mean = mean * shrink[..., None] + moved
        chosen = chosen + jnp.where(_is_token(layout, part, tokens), z, 0).sum(axis=(2, 3))
        return new, total * shrink + weight.sum(axis=(2, 3)), mean, chosen

    zero = jnp.zeros((b, n))
    first = jnp.full((b, n), -jnp.inf), zero, jnp.zeros((b, n, e)), zero
    top, total, mean, chosen = _each(layout, visit, first)
    log_sum, x_pred = top + jnp.log(total), mean / total[..., None]
    error = jnp.sum((x_pred - target) ** 2, axis=-1)
    return (error, log_sum - chosen), (hidden, kernel, bias, table, target, tokens, log_sum, x_pred)


def _errors_backward(layout, kept, cotangents):
    hidden, kernel, bias, table, target, tokens, log_sum, x_pred = kept
    of_error, of_nll = cotangents
    logits, rows, columns = _chunks(layout, hidden, kernel, bias, table)
    # d error / d Z_v = p_v (W_in,v - x_pred) . 2 (x_pred - X_0)
    pull = 2 * of_error[..., None] * (x_pred - target)
    mean_pull = jnp.sum(pull * x_pred, axis=-1)[..., None, None]
    pull, of_nll = pull.astype(table.dtype), of_nll[..., None, None]

    def visit(state, part):
        d_hidden, d_kernel, d_bias = state
        p = jnp.exp(logits(part) - log_sum[..., None, None])
        d_p = jnp.einsum("bne,sve->bnsv", pull, rows(part), preferred_element_type=jnp.float32)
        d_z = p * (d_p - mean_pull) + of_nll * (p - _is_token(layout, part, tokens))
        if bias is not None:
            d_bias = _put(layout, d_bias, d_z.sum(axis=(0, 1)).astype(bias.dtype), part, 0)
        d_z = d_z.astype(hidden.dtype)
        d_hidden += jnp.einsum(
            "bnsv,esv->bne", d_z, columns(part), preferred_element_type=jnp.float32
        )
        of_part = jnp.einsum(
            "bne,bnsv->esv", hidden, d_z, preferred_element_type=jnp.float32
        ).astype(kernel.dtype)
        of_part = _constrain_sharding(of_part, LOGICAL["embed"], LOGICAL["vocab"], None)
        return d_hidden, _put(layout, d_kernel, of_part, part, 1), d_bias

    d_kernel = _constrain_sharding(jnp.zeros_like(kernel), LOGICAL["embed"], LOGICAL["vocab"])
    first = (
        jnp.zeros(hidden.shape, jnp.float32),
        d_kernel,
        None if bias is None else jnp.zeros_like(bias),
    )
    d_hidden, d_kernel, d_bias = _each(layout, visit, first)
    return d_hidden.astype(hidden.dtype), d_kernel, d_bias, None, None, None


_errors.defvjp(_errors_forward, _errors_backward)


def _chunks(layout: _Layout, hidden: jax.Array, kernel: jax.Array, bias: Any, table: jax.Array):
    """Functions of a part's number: its logits float32 [B, N, s, v], rows of W_in [s, v, E], columns of W [E, s, v]."""

    # Each chunk is gathered over fsdp when its turn comes; left alone, the compiler would move activations instead.
    def columns(part: jax.Array) -> jax.Array:
        return _constrain_sharding(
            _take(layout, kernel, part, 1), None, LOGICAL["vocab"], None
        ).astype(hidden.dtype)

    def rows(part: jax.Array) -> jax.Array:
        return _constrain_sharding(_take(layout, table, part, 0), LOGICAL["vocab"], None, None)

    def logits(part: jax.Array) -> jax.Array:
        z = jnp.einsum("bne,esv->bnsv", hidden, columns(part), preferred_element_type=jnp.float32)
        if bias is not None:
            z += _take(layout, bias, part, 0).astype(jnp.float32)[None, None]
        return _constrain_sharding(z, BATCH, None, LOGICAL["vocab"], None)

    return logits, rows, columns


def _take(layout: _Layout, x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
    """A part [.., s, v, ..] of x [.., V, ..]."""
    if layout.shards == 1:  # without a reshape of the whole, before which XLA would copy it
        return jnp.expand_dims(
            jax.lax.dynamic_slice_in_dim(x, part * layout.rows, layout.rows, axis), axis
        )
    x = x.reshape(*x.shape[:axis], *layout, *x.shape[axis + 1 :])
    return jax.lax.dynamic_index_in_dim(x, part, axis + 1, keepdims=False)


def _put(layout: _Layout, x: jax.Array, piece: jax.Array, part: jax.Array, axis: int) -> jax.Array:
    """x [.., V, ..] with `piece` [.., s, v, ..] as that part of it."""
    if layout.shards == 1:
        return jax.lax.dynamic_update_slice_in_dim(
            x, jnp.squeeze(piece, axis), part * layout.rows, axis
        )
    whole = x.reshape(*x.shape[:axis], *layout, *x.shape[axis + 1 :])
    return jax.lax.dynamic_update_index_in_dim(whole, piece, part, axis + 1).reshape(x.shape)


def _is_token(layout: _Layout, part: jax.Array, tokens: jax.Array) -> jax.Array:
    """bool [B, N, s, v]: where a part holds the position's own token."""
    shards, parts, size = layout
    ids = (jnp.arange(shards)[:, None] * parts + part) * size + jnp.arange(size)[None]
    return ids[None, None] == tokens[..., None, None]


def _each(layout: _Layout, visit: Callable[[Any, jax.Array], Any], state: Any) -> Any:
    if layout.parts == 1:
        return visit(state, jnp.int32(0))
    return jax.lax.fori_loop(0, layout.parts, lambda part, state: visit(state, part), state)


def _constrain_sharding(x: jax.Array, *axes: Any) -> jax.Array:
    """x sharded over these axes of the mesh, as far as there is one and it divides."""
    wanted = [axis if isinstance(axis, tuple) else (axis,) for axis in axes]
    spec = [
        axis if axis is not None and divides(size, names) else None
        for axis, names, size in zip(axes, wanted, x.shape, strict=True)
    ]
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
