"""Logits head: a matrix with an optional bias, or the embedding table.

The decoder reads the head in chunks of the vocabulary (decoding/belief.py). The logits of a large
vocabulary never stand in memory as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.parallel import platform
from xflow_jax.types import Array, Bool, Float, Int, Params

# (hidden [B, N, E], start, size) -> logits [B, N, size]. `Head` is one.
LogitsFn: TypeAlias = Callable[[jax.Array, int | jax.Array, int], jax.Array]


@struct.dataclass
class Head:
    """Matrix and bias behind a model's logits.

    Attributes:
        table: [E, V], or [V, E] if `tied`.
        bias: [V] or None.
        tied: True if the table is the embedding table.
        gather: mesh axis over which the dimension E of the table is spread, or None.
    """

    table: jax.Array
    bias: jax.Array | None
    tied: bool = struct.field(pytree_node=False, default=False)
    gather: str | None = struct.field(pytree_node=False, default=None)

    @property
    def rows(self) -> int:
        """V, or a device's share of it."""
        return self.table.shape[0 if self.tied else 1]

    @property
    def kernel(self) -> jax.Array:
        """The matrix as [E, V]."""
        return self.table.T if self.tied else self.table

    def project(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Computes all logits, with products in the dtype of `hidden`."""
        table = self.table.astype(hidden.dtype)
        logits = hidden @ (table.T if self.tied else table)
        if self.bias is None:
            return logits
        return logits + self.bias.astype(hidden.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))

    def __call__(
        self, hidden: Float[Array, "B N E"], start: int | jax.Array, size: int
    ) -> Float[Array, "B N _"]:
        """Computes the logits of consecutive vocabulary entries. Products accumulate in float32.

        Args:
            hidden: final hidden states.
            start: the first entry.
            size: number of entries.

        Returns:
            Logits [B, N, size] in the dtype of `hidden`.
        """
        dtype, part, axis = hidden.dtype, self.table, 0 if self.tied else 1
        if size != self.rows and platform() == "cpu":
            part = _slice_bits(part, start, size, axis)
        elif size != self.rows:
            part = jax.lax.dynamic_slice_in_dim(part, start, size, axis)
        part = part.T if self.tied else part
        if self.gather:
            part = jax.lax.all_gather(part, self.gather, axis=0, tiled=True)
        with jax.named_scope("head"):
            logits = jnp.einsum(
                "bne,ev->bnv", hidden, part.astype(dtype), preferred_element_type=jnp.float32
            )
        # The originals' logits come out in the model's dtype. Rounding to it keeps their ties.
        logits = logits.astype(dtype)
        if self.bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(self.bias, start, size)
            logits += bias.astype(dtype)[None, None, :]
        return logits


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _slice_bits(
    table: Float[Array, "R C"], start: int | Int[Array, ""], size: int, axis: int
) -> Float[Array, "r c"]:
    """Cuts consecutive rows or columns as integers, which no compiler converts.

    XLA for CPUs has no slices of bfloat16. It keeps a whole matrix in float32 beside the loop, and
    converts each slice of it back.
    """
    if table.dtype.itemsize != 2:
        return jax.lax.dynamic_slice_in_dim(table, start, size, axis)
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    part = jax.lax.dynamic_slice_in_dim(bits, start, size, axis)
    return jax.lax.bitcast_convert_type(part, table.dtype)


@_slice_bits.defjvp
def _slice_tangent(
    size: int, axis: int, primals: tuple[Array, int | Array], tangents: tuple[Array, object]
) -> tuple[Array, Array]:
    """Differentiates the slice, as JAX does not look through bits."""
    (table, start), tangent = primals, tangents[0]
    slope = jax.lax.dynamic_slice_in_dim(tangent, start, size, axis)
    return _slice_bits(table, start, size, axis), slope


def make_head(params: Params) -> Head:
    """Returns the head in a model's parameters.

    It is `ff_out`, or the embedding table if there is no `ff_out`.
    """
    untied = params.get("ff_out")
    if untied is None:
        return Head(jnp.asarray(params["wte"]["embedding"]), None, tied=True)
    bias = untied.get("bias")
    return Head(jnp.asarray(untied["kernel"]), None if bias is None else jnp.asarray(bias))


def shift_rows(h: Float[Array, "B L E"], real: Bool[Array, "B L"]) -> Float[Array, "B L E"]:
    """Moves each hidden state to the position that it predicts.

    This is for models with `logits_shift`. A position without a token before it keeps its own row.

    Args:
        h: hidden states.
        real: True at tokens, False at padding.
    """
    moves = jnp.roll(real, 1, axis=1).at[:, 0].set(False)
    return jnp.where(moves[..., None], jnp.roll(h, 1, axis=1), h)
