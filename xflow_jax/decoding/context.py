"""Everything that stays the same during one decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from xflow_jax.decoding.belief import BeliefOptions
from xflow_jax.decoding.forward import Block, FullForward
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import require
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, Params

Scan: TypeAlias = Callable[..., Any]  # the signature of jax.lax.scan


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeContext:
    """Model, rule, lengths and layout of one decode.

    Attributes:
        model, params: the backbone and its parameters.
        rule: how far each position moves in a step.
        config: static lengths and switches.
        forward: computes hidden states of the canvas, with or without a cache.
        options: constraints and noise of the belief.
        keys: one random key per sequence, [B].
        block_of: block of each canvas position, int [B, N].
        on_canvas: True at positions that the row decodes, bool [B, N].
        scan: jax.lax.scan, or a plain loop of its signature.
        starts: True at positions that begin a block and come from the block before, bool [B, N].
            None for models without such positions.
        fixed: True at positions of the canvas that hold the prompt, bool [B, N]. None if the
            prompt is not on the canvas.
    """

    model: Backbone
    params: Params
    rule: Rule
    config: DecodeConfig
    forward: FullForward
    options: BeliefOptions
    keys: Key[Array, " B"]
    block_of: Int[Array, "B N"]
    on_canvas: Bool[Array, "B N"]
    scan: Scan
    starts: Bool[Array, "B N"] | None = None
    fixed: Bool[Array, "B N"] | None = None

    def __post_init__(self) -> None:
        crosses = self.config.block_causal and self.model.config.logits_shift
        require(
            self.starts is not None or not crosses,
            f"the first position of a block of {self.model.config.family} is predicted by the "
            "block before, which this program does not support",
        )

    def positions(self, block: Block, t: Float[Array, "B N"]) -> Bool[Array, "B N"]:
        """Returns the positions that the steps of a block move.

        Args:
            block: the block.
            t: progress of all positions. With the prompt on the canvas, masks of earlier blocks
                are still open.
        """
        here = (self.block_of == block) & self.on_canvas
        if self.fixed is not None:
            left = (self.block_of < block) & self.on_canvas & (t == 0)
            return (here | left) & ~self.fixed
        return here if self.starts is None else here & ~self.starts

    @property
    def copies(self) -> int:
        """Rows per sequence in a forward pass.

        Guidance adds one whose prompt is masked.
        """
        return 2 if self.options.guidance else 1

    def model_rows(self, x: Float[Array, "B N E"]) -> Float[Array, "R N E"]:
        """Repeats the canvas for each copy: [copies B, N, E]."""
        if self.copies == 1:
            return x
        free = x
        if self.fixed is not None:
            m = self.params["wte"]["embedding"][self.model.config.mask_id].astype(x.dtype)
            free = jnp.where(self.fixed[..., None], m[None, None, :], x)
        return jnp.concatenate([x, free])
