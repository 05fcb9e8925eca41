"""Forward pass for one step, without a cache.

Those with one are in cached_forward.py. Each class turns the canvas, x [B, N, E], into hidden
states. Its cache is in the carry of the decoder's scans: `init_cache` makes it, `begin_block`
updates it once a block, `hidden` reads it in every step and may replace it. B counts the copies for
guidance too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.models import shift_rows
from xflow_jax.types import Array, Backbone, Bool, Cache, Float, Int, Params


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class ExactCache:
    """Exact cache of a model with `logits_shift`: everything before the active block.

    Attributes:
        kv: keys and values of its positions.
        last: hidden states of its last position [B, E], which predict the block's first one.
    """

    kv: Cache
    last: jax.Array


Carry: TypeAlias = Cache | ExactCache | None
# The active block: of all sequences, or of each one.
Block: TypeAlias = Int[Array, ""] | Int[Array, "S 1"]


@dataclasses.dataclass(frozen=True, eq=False)
class FullForward:
    """Forward pass over prompt and canvas.

    Attributes:
        model, params: the backbone and its parameters.
        config: static lengths and switches of the decode.
        prompt_x: embeddings of the prompt, [B, P, E], padded on the left.
        prompt_mask: False at padding, bool [B, P].
        on_canvas: True at positions that the row decodes, bool [B, N].
    """

    model: Backbone
    params: Params
    config: DecodeConfig
    prompt_x: Float[Array, "B P E"]
    prompt_mask: Bool[Array, "B P"]
    on_canvas: Bool[Array, "B N"]

    def init_cache(self) -> Carry:
        """Returns the cache before the first block."""
        return None

    def begin_block(
        self,
        cache: Carry,
        x: Float[Array, "B N E"],
        block: Int[Array, ""],
        any_active: Bool[Array, ""],
    ) -> Carry:
        """Updates the cache when a block begins.

        Args:
            cache: the cache so far.
            x: the canvas, final in the blocks before `block`.
            block: index of the block that begins.
            any_active: True if any sequence decodes this block.

        Returns:
            The cache for the steps of the block.
        """
        return cache

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states.

        With `config.block_only` the result covers the active block alone. The other positions have
        no part in the step, and the head is the more expensive part of it.

        Args:
            cache: the cache of the block.
            x: the canvas.
            step: slice of the schedule.

        Returns:
            Hidden states of the canvas [B, N, E] or of the active block [B, block_length, E], and
            the cache for the next step.
        """
        both = jnp.concatenate([self.prompt_x, x.astype(self.prompt_x.dtype)], axis=1)
        prompt = self.prompt_x.shape[1]
        size = self.config.block_length if self.config.block_causal else None
        h = self._predicting(self._apply("hidden", both, self.mask, size), self.mask)
        if size is None:
            return h[:, prompt:], cache
        return take_columns(h, prompt + self.block_columns(step.block)), cache

    def first_hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> Float[Array, "B 1 E"]:
        """Computes the hidden states that predict the first position of a block.

        With `logits_shift` and block-causal attention they belong to the block before.

        Args:
            cache: the cache of the block.
            x: the canvas, final in the blocks before.
            step: slice of the schedule.
        """
        return self.hidden(cache, x, step)[0][:, :1]

    def block_columns(self, block: Block) -> Int[Array, "B block"]:
        """Returns the canvas positions of a block.

        Under block-causal attention the block grid counts from each row's first token. Positions
        of the first block are then negative as far as the prompt reaches into it.
        """
        size = self.config.block_length
        shift = self.length % size if self.config.block_causal else jnp.zeros_like(self.length)
        first = jnp.reshape(self.row_blocks(block) * size, (-1, 1))
        return first - shift + jnp.arange(size)[None, :]

    def row_blocks(self, block: Block) -> Int[Array, "*rows"]:
        """Returns the active block: a scalar, or [B] with copies for guidance."""
        if block.ndim == 0:
            return block
        return jnp.tile(block[:, 0], self.prompt_x.shape[0] // block.shape[0])

    @property
    def shift(self) -> int:
        """Rows by which a prediction is behind its position, 0 or 1."""
        return int(self.model.config.logits_shift)

    def _predicting(self, h: Float[Array, "B L E"], real: Bool[Array, "B L"]) -> Array:
        """Moves hidden states to the positions that they predict."""
        return shift_rows(h, real) if self.shift else h

    @property
    def mask(self) -> Bool[Array, "B L"]:
        """True at real positions of prompt and canvas."""
        return jnp.concatenate([self.prompt_mask, self.on_canvas], axis=1)

    @property
    def length(self) -> Int[Array, "B 1"]:
        """Tokens of each prompt."""
        return jnp.sum(self.prompt_mask, axis=-1, keepdims=True)

    def _apply(self, method: str, *args: object) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


def take_columns(x: Float[Array, "B L E"], columns: Int[Array, "B n"]) -> Float[Array, "B n E"]:
    """Gathers positions of each row.

    Args:
        x: the rows.
        columns: positions. Those outside the row are clipped, and their values are never used.
    """
    return jnp.take_along_axis(x, jnp.clip(columns, 0, x.shape[1] - 1)[..., None], axis=1)
