"""Arrays of one block on the canvas of all response positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import Belief
from xflow_jax.types import Array, Bool, Int


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
