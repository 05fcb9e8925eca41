"""Fused cross-entropy, with or without the errors of the alignment (Eq. 12).

Forward and backward pass visit the vocabulary in chunks, as attention kernels visit keys. The
logits Z of all chunks together are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xflow_jax.parallel import BATCH, LOGICAL, constrain_lookup, divides
from xflow_jax.types import Array, Bool, Float, Int

State = TypeVar("State")
_VOCAB, _EMBED = LOGICAL["vocab"], LOGICAL["embed"]  # axes of the mesh


def alignment_errors(
    hidden: Float[Array, "B N E"],
    kernel: Float[Array, "E V"],
    table: Float[Array, "V E"],
    tokens: Int[Array, "B N"],
    bias: Float[Array, " V"] | None = None,
    chunk: int = 4096,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Computes the squared errors of Eq. 12 and the cross-entropy.

    The logits are Z = hidden kernel + bias. The table and the clean state are constants of the
    loss, because otherwise the embedding would collapse. The gradient of the kernel is written
    once, and a vocabulary that is sharded over the tensor axis stays sharded.

    Args:
        hidden: hidden states of the response.
        kernel: matrix of the head.
        table: embedding table W_in.
        tokens: the clean response. Its rows of the table are the clean state X_0.
        bias: bias of the head, if any.
        chunk: largest number of vocabulary rows in a chunk.

    Returns:
        |softmax(Z) W_in - X_0|^2 summed over E, and -log p(token), both float32.
    """
    table = jax.lax.stop_gradient(table)
    target = constrain_lookup(table[tokens]).astype(jnp.float32)
    layout = _chunk_layout(kernel.shape[1], chunk)
    error, nll = _errors(layout, hidden, kernel, bias, table, target, tokens)
    assert error is not None
    return error, nll


def chunked_cross_entropy(
    hidden: Float[Array, "B N E"],
    kernel: Float[Array, "E V"],
    tokens: Int[Array, "B N"],
    bias: Float[Array, " V"] | None = None,
    chunk: int = 4096,
) -> Float[Array, "B N"]:
    """Computes the cross-entropy as `alignment_errors` does, without the errors.

    Args:
        hidden: hidden states.
        kernel: matrix of the head.
        tokens: the right tokens.
        bias: bias of the head, if any.
        chunk: largest number of vocabulary rows in a chunk.

    Returns:
        -log p(token), float32.
    """
    layout = _chunk_layout(kernel.shape[1], chunk)
    return _errors(layout, hidden, kernel, bias, None, None, tokens)[1]


class _ChunkLayout(NamedTuple):
    """Vocabulary as [shards, parts, rows].

    A chunk is one part of every shard.
    """

    shards: int
    parts: int
    rows: int


def _chunk_layout(vocabulary: int, chunk: int) -> _ChunkLayout:
    """Divides the vocabulary into the fewest equal chunks that are small enough."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape[_VOCAB] if _VOCAB and divides(vocabulary, (_VOCAB,)) else 1
    own = vocabulary // shards
    parts = next(
        n for n in range(1, own + 1) if own % n == 0 and vocabulary <= n * chunk or n == own
    )
    return _ChunkLayout(shards, parts, own // parts)


class _Residuals(NamedTuple):
    """Arrays that the forward pass keeps for the backward pass."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    table: jax.Array | None  # None, as target and x_pred, for the cross-entropy alone
    target: jax.Array | None
    tokens: jax.Array
    log_sum: jax.Array
    x_pred: jax.Array | None


class _Running(NamedTuple):
    """Sums over the chunks so far, relative to the maximum of Z."""

    top: jax.Array
    total: jax.Array
    mean: jax.Array | None
    token_logit: jax.Array


class _Gradients(NamedTuple):
    """Gradients summed over the chunks so far."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _errors(
    layout: _ChunkLayout,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    table: jax.Array | None,
    target: jax.Array | None,
    tokens: jax.Array,
) -> tuple[jax.Array | None, jax.Array]:
    """Computes (error, nll). The error is None without a table."""
    return _errors_forward(layout, hidden, kernel, bias, table, target, tokens)[0]


def _errors_forward(
    layout: _ChunkLayout,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    table: jax.Array | None,
    target: jax.Array | None,
    tokens: jax.Array,
) -> tuple[tuple[jax.Array | None, jax.Array], _Residuals]:
    """Computes ((error, nll), residuals) with a running maximum of Z."""
    head = _Head(layout, hidden, kernel, bias, table)
    b, n, e = hidden.shape

    def visit(state: _Running, part: jax.Array) -> _Running:
        z = head.logits(part)
        top = jnp.maximum(state.top, z.max(axis=(2, 3)))
        weight, shrink = jnp.exp(z - top[..., None, None]), jnp.exp(state.top - top)
        mean = None
        if table is not None and state.mean is not None:
            added = jnp.einsum(
                "bnsv,sve->bne",
                weight.astype(table.dtype),
                head.rows(part),
                preferred_element_type=jnp.float32,
            )
            mean = state.mean * shrink[..., None] + added
        is_token = _is_token(layout, part, tokens)
        token_logit = state.token_logit + jnp.where(is_token, z, 0).sum(axis=(2, 3))
        total = state.total * shrink + weight.sum(axis=(2, 3))
        return _Running(top, total, mean, token_logit)

    zero = jnp.zeros((b, n))
    no_mean = None if table is None else jnp.zeros((b, n, e))
    start = _Running(jnp.full((b, n), -jnp.inf), zero, no_mean, zero)
    end = _loop_over_chunks(layout, visit, start)
    log_sum, x_pred, error = end.top + jnp.log(end.total), None, None
    if end.mean is not None and target is not None:
        x_pred = end.mean / end.total[..., None]
        error = jnp.sum((x_pred - target) ** 2, axis=-1)
    residuals = _Residuals(hidden, kernel, bias, table, target, tokens, log_sum, x_pred)
    return (error, log_sum - end.token_logit), residuals


def _errors_backward(
    layout: _ChunkLayout, residuals: _Residuals, cotangents: tuple[jax.Array | None, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """Computes the gradients of hidden, kernel and bias. The rest are constants."""
    hidden, kernel, bias, table, target, tokens, log_sum, x_pred = residuals
    of_error, of_nll = cotangents
    head = _Head(layout, hidden, kernel, bias, table)
    pull, of_nll = None, of_nll[..., None, None]
    if not (table is None or target is None or x_pred is None or of_error is None):
        # d error / d Z_v = p_v (W_in,v - x_pred) . 2 (x_pred - X_0)
        pull = 2 * of_error[..., None] * (x_pred - target)
        mean_pull = jnp.sum(pull * x_pred, axis=-1)[..., None, None]
        pull = pull.astype(table.dtype)

    def visit(state: _Gradients, part: jax.Array) -> _Gradients:
        d_hidden, d_kernel, d_bias = state
        p = jnp.exp(head.logits(part) - log_sum[..., None, None])
        d_z = of_nll * (p - _is_token(layout, part, tokens))
        if pull is not None:
            d_p = jnp.einsum(
                "bne,sve->bnsv", pull, head.rows(part), preferred_element_type=jnp.float32
            )
            d_z = p * (d_p - mean_pull) + d_z
        if d_bias is not None:
            d_bias = _write_chunk(
                layout, d_bias, d_z.sum(axis=(0, 1)).astype(d_bias.dtype), part, 0
            )
        d_z = d_z.astype(hidden.dtype)
        d_hidden += jnp.einsum(
            "bnsv,esv->bne", d_z, head.columns(part), preferred_element_type=jnp.float32
        )
        d_columns = jnp.einsum(
            "bne,bnsv->esv", hidden, d_z, preferred_element_type=jnp.float32
        ).astype(kernel.dtype)
        d_columns = _constrain_sharding(d_columns, _EMBED, _VOCAB, None)
        return _Gradients(d_hidden, _write_chunk(layout, d_kernel, d_columns, part, 1), d_bias)

    d_kernel = _constrain_sharding(jnp.zeros_like(kernel), _EMBED, _VOCAB)
    d_hidden = jnp.zeros(hidden.shape, jnp.float32)
    start = _Gradients(d_hidden, d_kernel, None if bias is None else jnp.zeros_like(bias))
    end = _loop_over_chunks(layout, visit, start)
    return end.hidden.astype(hidden.dtype), end.kernel, end.bias, None, None, None


_errors.defvjp(_errors_forward, _errors_backward)


class _Head(NamedTuple):
    """Head and embedding table, read chunk by chunk.

    Each chunk is gathered over fsdp when it is visited. Without the constraints the compiler would
    move activations instead.
    """

    layout: _ChunkLayout
    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    table: jax.Array | None

    def columns(self, part: jax.Array) -> Float[Array, "E s v"]:
        """Returns the columns of the kernel in a chunk."""
        columns = _read_chunk(self.layout, self.kernel, part, 1)
        return _constrain_sharding(columns, None, _VOCAB, None).astype(self.hidden.dtype)

    def rows(self, part: jax.Array) -> Float[Array, "s v E"]:
        """Returns the rows of the embedding table in a chunk."""
        assert self.table is not None
        return _constrain_sharding(
            _read_chunk(self.layout, self.table, part, 0), _VOCAB, None, None
        )

    def logits(self, part: jax.Array) -> Float[Array, "B N s v"]:
        """Computes the logits of a chunk, float32."""
        z = jnp.einsum(
            "bne,esv->bnsv", self.hidden, self.columns(part), preferred_element_type=jnp.float32
        )
        if self.bias is not None:
            bias = _read_chunk(self.layout, self.bias, part, 0)
            z += bias.astype(jnp.float32)[None, None]
        return _constrain_sharding(z, BATCH, None, _VOCAB, None)


def _read_chunk(layout: _ChunkLayout, x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
    """Returns a chunk [..., s, v, ...] of x [..., V, ...]."""
    if layout.shards == 1:  # XLA would copy the complete array before a reshape
        return jnp.expand_dims(
            jax.lax.dynamic_slice_in_dim(x, part * layout.rows, layout.rows, axis), axis
        )
    x = x.reshape(*x.shape[:axis], *layout, *x.shape[axis + 1 :])
    return jax.lax.dynamic_index_in_dim(x, part, axis + 1, keepdims=False)


def _write_chunk(
    layout: _ChunkLayout, x: jax.Array, chunk: jax.Array, part: jax.Array, axis: int
) -> jax.Array:
    """Writes a chunk [..., s, v, ...] into x [..., V, ...]."""
    if layout.shards == 1:
        return jax.lax.dynamic_update_slice_in_dim(
            x, jnp.squeeze(chunk, axis), part * layout.rows, axis
        )
    divided = x.reshape(*x.shape[:axis], *layout, *x.shape[axis + 1 :])
    return jax.lax.dynamic_update_index_in_dim(divided, chunk, part, axis + 1).reshape(x.shape)


def _is_token(
    layout: _ChunkLayout, part: jax.Array, tokens: Int[Array, "B N"]
) -> Bool[Array, "B N s v"]:
    """Returns True at each position's own token in a chunk."""
    shards, parts, size = layout
    ids = (jnp.arange(shards)[:, None] * parts + part) * size + jnp.arange(size)[None]
    return ids[None, None] == tokens[..., None, None]


def _loop_over_chunks(
    layout: _ChunkLayout, visit: Callable[[State, jax.Array], State], state: State
) -> State:
    """Calls visit(state, part) for every chunk."""
    if layout.parts == 1:
        return visit(state, jnp.int32(0))
    return jax.lax.fori_loop(0, layout.parts, lambda part, state: visit(state, part), state)


def _constrain_sharding(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Shards each dimension over an axis of the mesh that divides it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = []
    for axis, size in zip(axes, x.shape, strict=True):
        names = (axis,) if isinstance(axis, str) else axis
        spec.append(axis if names is not None and divides(size, names) else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
