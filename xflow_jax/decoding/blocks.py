"""Decoding as a flow: one state, one step, one scan. Start reading here: it is the paper.

Each response position carries a progress t in [0, 1] and a state x in the space of input embeddings, which starts at
the mask embedding m and moves toward the embedding of the token that the model now predicts. A rule (rules.py) says how
far. With steps of 0 and 1 only, the same loop is mask prediction; the schedule is data. Blocks are an outer scan, and
what the model is shown of them is in sight.py.
"""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.errors import UserError, require


def make_schedule(settings: DecodeConfig) -> Step:
    """The steps of all blocks in order, [T] each. Quotas: block_length masks over the steps, the remainder first."""
    s = settings.steps
    local = np.tile(np.arange(s), settings.blocks)
    quota = settings.block_length // s + (local < settings.block_length % s)
    return Step(
        index=np.arange(local.size, dtype=np.int32),
        block=np.repeat(np.arange(settings.blocks, dtype=np.int32), s),
        rho=(local / max(s - 1, 1)).astype(np.float32),
        quota=quota.astype(np.int32),
        steps_left=(s - local).astype(np.float32),
    )


def block_layout(settings: DecodeConfig, prompt_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(block of each canvas position int [B, N], whether the position is on the row's canvas bool [B, N])."""
    index = jnp.arange(settings.canvas)[None, :]
    batch = prompt_mask.shape[0]
    if not settings.block_causal:
        shape = (batch, settings.canvas)
        return jnp.broadcast_to(index // settings.block_length, shape), jnp.ones(shape, bool)
    length = jnp.sum(prompt_mask, axis=-1, keepdims=True)
    size = settings.block_length
    end = -(-(length + settings.gen_length) // size) * size
    return (length + index) // size - length // size, length + index < end


def count_blocks(family: str, gen_length: int, block_length: int | None) -> int:
    """How many blocks the steps of a response divide over; a block is by default 32 in LLaDA2.0, all in LLaDA.

    UserError for lengths below 1, and for one that LLaDA's blocks do not divide.
    """
    require(gen_length >= 1, f"gen_length must be a whole number of at least 1, not {gen_length}")
    require(
        block_length is None or block_length >= 1,
        f"block_length must be at least 1, not {block_length}",
    )
    size = block_length or (32 if family == "llada2" else gen_length)
    if family != "llada2" and gen_length % size:
        near = [str(n) for n in (gen_length // size * size, (gen_length // size + 1) * size) if n]
        raise UserError(
            f"gen_length {gen_length} is not a whole number of blocks of {size}; use {' or '.join(near)}"
        )
    return max(gen_length // size, 1)


def budget_steps(budget: Fraction, gen_length: int, blocks: int = 1) -> int:
    """The steps of a response of `gen_length` tokens: budget * gen_length, which must divide over the blocks.

    UserError names the nearest budgets that would do where it is no whole number or does not divide.
    """
    steps = budget * gen_length
    if steps.denominator == 1 and steps % blocks == 0 and steps >= blocks:
        return int(steps)
    below = int(steps // blocks) * blocks
    near = [str(Fraction(n, gen_length)) for n in (below, below + blocks) if 0 < n <= gen_length]
    over = f" for each of {blocks} blocks" if blocks > 1 else ""
    raise UserError(
        f"the budget {budget} of {gen_length} tokens makes {float(steps):g} steps, which is not a whole number{over}; "
        f"use {' or '.join(near)}"
    )
