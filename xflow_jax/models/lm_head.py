"""From hidden states to what a decoder believes: the likeliest token of each position and how sure the model is.

One pass over chunks of the vocabulary with a running maximum, log-sum-exp, entropy and top 4: the logits of a large
vocabulary never stand in memory as a whole. Where a mesh is set, each device does so for its own part of the
vocabulary, and what all of them found, a dozen numbers per position, is gathered at once. Everything after the matrix
product is float32 (SPEC of the decoders: ties go to the lowest index, which only exact comparisons in one dtype keep).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

LogitsFn = Callable[[jax.Array, int | jax.Array, int], jax.Array]


@struct.dataclass
class Head:
    """The matrix behind a model's logits. table [E, V], or [V, E] where `tied`; bias [V] or None.

    head(hidden, start, size): hidden [B, N, E] -> logits [B, N, size] of the entries start ... start + size - 1, in
    hidden's dtype. `gather`: an axis of the mesh over which the table's dimension E is spread.
    """

    table: jax.Array
    bias: jax.Array | None
    tied: bool = struct.field(pytree_node=False, default=False)
    gather: str | None = struct.field(pytree_node=False, default=None)

    @property
    def rows(self) -> int:
        """V, or a device's share of it."""
        return self.table.shape[0 if self.tied else 1]

    def __call__(self, hidden: jax.Array, start: int | jax.Array, size: int) -> jax.Array:
        """As above."""
        dtype, part = hidden.dtype, self.table
        if size != self.rows:
            part = jax.lax.dynamic_slice_in_dim(part, start, size, axis=0 if self.tied else 1)
        part = part.T if self.tied else part
        if self.gather:
            part = jax.lax.all_gather(part, self.gather, axis=0, tiled=True)
        with jax.named_scope("head"):
            logits = jnp.einsum(
                "bne,ev->bnv", hidden, part.astype(dtype), preferred_element_type=jnp.float32
            )
        # The originals' logits come out in the model's dtype; rounding to it keeps their ties.
        logits = logits.astype(dtype)
        if self.bias is not None:
            logits += jax.lax.dynamic_slice_in_dim(self.bias, start, size).astype(dtype)[
                None, None, :
            ]
        return logits


def make_head(model: Any, params: Any) -> Head:
    """The `head` that `believe` wants, of a model with its parameters; products accumulate in float32."""
    if "ff_out" in params:
        return Head(params["ff_out"]["kernel"], params["ff_out"].get("bias"))
    return Head(params["wte"]["embedding"], None, tied=True)
