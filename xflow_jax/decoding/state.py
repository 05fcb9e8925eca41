"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

SETTLED = 0.99  # progress from which a position counts as decided


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The static part of a decode: what a compilation is for.

    gen_length N; block_length must divide it where `block_causal` is off. steps: forward passes in each block.
    block_causal: LLaDA2.0's blocks, aligned to each sequence's first token and seen only backwards. cache: with it,
    finished blocks are read once and kept; the result is the same. refresh: the prompt's keys and values are read anew
    in every so many steps of a block only, an approximation; 0 or 1 = in every step, and only without block_causal.
    early_exit: skip passes of blocks whose positions all have a progress of at least `settled` (or of which the rule's
    own `open` says that nothing more can happen).
    stop_at_eos: no further blocks after one that holds EOS. eos_early_stop: stop as soon as everything up to the first
    EOS is settled. trace: keep every step; notes: with it what the rule noted. eot_id: the end-of-turn token, where it
    matters.
    """

    gen_length: int
    block_length: int
    steps: int
    block_causal: bool = False
    cache: bool = False
    refresh: int = 0
    early_exit: bool = False
    settled: float = SETTLED
    stop_at_eos: bool = False
    eos_early_stop: bool = False
    trace: bool = False
    notes: bool = False
    eot_id: int | None = None

    @property
    def canvas(self) -> int:
        """Response positions that are decoded: N, and what rounding up to a whole block can add."""
        return self.gen_length + (self.block_length - 1 if self.block_causal else 0)

    @property
    def blocks(self) -> int:
        """How many blocks the canvas can touch."""
        return -(-self.canvas // self.block_length)


@struct.dataclass
class DecodeState:
    """The carry of the scan.

    x float32 [B, N, E] and t float32 [B, N]: the flow. tokens int [B, N]: where t = 1 the token that stands there,
    elsewhere the last prediction (the mask token where nothing was predicted yet): at the end, the read-out.
    forward_passes int [B]: passes that the sequence took part in. finished bool [B]: ended by its EOS. memory: what the
    rule keeps from step to step, a tree of arrays [B, ...] of its `init_memory(batch, canvas)`; None where it has none.
    """

    x: jax.Array
    t: jax.Array
    tokens: jax.Array
    forward_passes: jax.Array
    finished: jax.Array
    memory: Any = None


@struct.dataclass
class Trace:
    """One step as it went, [B, N] each; stacked to [T, B, N] by the scan.

    tokens: the step's predictions. progress: t after the step. confidence: of the predictions. step_fraction: the
    rule's a. reedited: where it was reset. top, top_tokens [B, N, 4]: the belief's. notes: what the rule handed out,
    arrays [B, ...], where Settings.notes asks. Steps that were skipped have confidence, step_fraction, top and notes 0.
    Outside the active block of block-causal attention the model is not asked: there tokens are those that stand there,
    and confidence is 0.
    """

    tokens: jax.Array
    progress: jax.Array
    confidence: jax.Array
    step_fraction: jax.Array
    reedited: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    notes: Any = None


@struct.dataclass
class Step:
    """What a rule is told of a step: a slice of the schedule, and which positions it is about.

    index, block, rho (position in the block's steps, 0 ... 1), quota (how many masks mask prediction writes),
    steps_left (in the block, this one included): scalars. candidates bool [B, N]: the positions of the active block.
    keys [B]: a random key per sequence, for rules that draw.
    """

    index: jax.Array
    block: jax.Array
    rho: jax.Array
    quota: jax.Array
    steps_left: jax.Array
    candidates: Any = None
    keys: Any = None


def read_out(
    settings: DecodeConfig, state: DecodeState, eos_id: int
) -> tuple[jax.Array, jax.Array]:
    """(tokens int [B, N], final progress float32 [B, N]) of a decode; behind a sequence's end there is only EOS."""
    tokens, n = state.tokens[:, : settings.gen_length], settings.gen_length
    if settings.stop_at_eos or settings.eos_early_stop:
        is_eos = tokens == eos_id
        after = jnp.cumsum(is_eos, axis=-1) - is_eos > 0
        cut = after if settings.stop_at_eos else after & state.finished[:, None]
        tokens = jnp.where(cut, eos_id, tokens)
    return tokens, state.t[:, :n]
