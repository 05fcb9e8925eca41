"""Everything that stays the same during one decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import BeliefOptions
from xflow_jax.decoding.blocks import block_layout, block_starts
from xflow_jax.decoding.cached_forward import FORWARDS, make_forward
from xflow_jax.decoding.forward import Block, FullForward
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import DecodeConfig
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


def make_context(
    model: Backbone,
    params: Params,
    rule: Rule,
    config: DecodeConfig,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    keys: Key[Array, " B"],
    scan: Scan = jax.lax.scan,
    forwards: Mapping[str, type[FullForward]] = FORWARDS,
    positions: Int[Array, " B"] | None = None,
    fixed: Bool[Array, "B N"] | None = None,
) -> DecodeContext:
    """Builds the context of a decode.

    Args:
        model: the backbone.
        params: its parameters.
        rule: how far each position moves in a step.
        config: static lengths and switches.
        prompt: token ids, padded on the left.
        prompt_mask: False at padding.
        keys: one random key per sequence.
        scan: jax.lax.scan, or a plain loop of its signature.
        forwards: class of the forward pass with each cache.
        positions: canvas positions that each row decodes, or None for those of `config`.
        fixed: canvas positions that hold the prompt, or None.

    Returns:
        The context.
    """
    block_of, on_canvas = block_layout(config, prompt_mask)
    if positions is not None:
        on_canvas = jnp.arange(config.canvas)[None, :] < positions[:, None]
    if config.infill:  # the prompt stands on the canvas
        prompt, prompt_mask = prompt[:, :0], prompt_mask[:, :0]
    options = rule.belief_options(model.config, config.eot_id)
    ids, masks = prompt, (prompt_mask, on_canvas)
    if options.guidance:
        ids = jnp.concatenate([prompt, jnp.full_like(prompt, model.config.mask_id)])
        masks = (jnp.tile(prompt_mask, (2, 1)), jnp.tile(on_canvas, (2, 1)))
    prompt_x = model.apply({"params": params}, ids, method="embed")
    forward = make_forward(model, params, config, prompt_x, *masks, forwards)
    starts = block_starts(config, prompt_mask) if model.config.logits_shift else None
    return DecodeContext(
        model,
        params,
        rule,
        config,
        forward,
        options,
        keys,
        block_of,
        on_canvas,
        scan,
        starts,
        fixed,
    )
