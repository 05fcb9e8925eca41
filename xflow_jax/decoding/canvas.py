"""Start of the canvas, and arrays of one block on it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import DecodeConfig, DecodeState
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Params


def onto_canvas(
    belief: Belief,
    first: Int[Array, "B 1"],
    here: Bool[Array, "B N"],
    tokens: Int[Array, "B N"],
) -> Belief:
    """Scatters the belief of one block onto the canvas.

    Args:
        belief: of the block's positions, [B, block_length, ...].
        first: canvas position at which each row's block begins. It may be negative.
        here: the block's positions on the canvas.
        tokens: the canvas. Positions outside the block keep them, with confidence 0.

    Returns:
        The belief at every canvas position.
    """
    slot = jnp.arange(here.shape[1])[None, :] - first
    slot = jnp.clip(slot, 0, belief.tokens.shape[1] - 1)

    def scatter(x: Array) -> Array:
        rest = (...,) + (None,) * (x.ndim - 2)
        picked = jnp.take_along_axis(x, slot[rest], axis=1)
        return jnp.where(here[rest], picked, jnp.zeros((), x.dtype))

    belief = jax.tree.map(scatter, belief)
    # A certain distribution outside the block, so that no rule divides by a sum of zero.
    certain = jnp.arange(belief.top.shape[-1])[None, None, :] == 0
    top = jnp.where(here[..., None], belief.top, certain)
    return dataclasses.replace(belief, tokens=jnp.where(here, belief.tokens, tokens), top=top)


def start_state(
    model: Backbone,
    params: Params,
    rule: Rule,
    config: DecodeConfig,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
) -> tuple[DecodeState, Bool[Array, "B N"] | None]:
    """Returns the state of a canvas before the first step.

    Args:
        model: the backbone.
        params: its parameters.
        rule: the rule, which has the first memory.
        config: lengths of the decode.
        prompt: token ids, padded on the left.
        prompt_mask: False at padding.

    Returns:
        The state, and True at canvas positions that hold the prompt and never move. With
        `config.infill` these are its padding and its tokens but for masks. Otherwise None.
    """
    batch, canvas, mask = prompt.shape[0], config.canvas, model.config.mask_id
    m = embed(params, jnp.full((1, 1), mask))
    x, t = jnp.broadcast_to(m, (batch, canvas, m.shape[-1])), jnp.zeros((batch, canvas))
    tokens, fixed = jnp.full((batch, canvas), mask, jnp.int32), None
    if config.infill:
        behind = ((0, 0), (0, canvas - config.infill))
        fixed = jnp.pad(~prompt_mask | (prompt != mask), behind)
        tokens = jnp.where(fixed, jnp.pad(prompt, behind), tokens)
        x, t = jnp.where(fixed[..., None], embed(params, tokens), x), fixed.astype(t.dtype)
    state = DecodeState(
        x=x,
        t=t,
        tokens=tokens,
        forward_passes=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        memory=rule.init_memory(batch, canvas),
        finite=jnp.ones(batch, bool),
    )
    return state, fixed


def embed(params: Params, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape E"]:
    """Reads rows of the embedding table in float32."""
    return params["wte"]["embedding"][tokens].astype(jnp.float32)
