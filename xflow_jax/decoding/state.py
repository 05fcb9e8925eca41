"""Data of a decode: configuration, carry of the scan, step and trace."""

from __future__ import annotations

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from xflow_jax.types import Array, Bool, Float, Int

SETTLED = 0.99  # progress from which a position counts as decided

# Keys and values that a decode keeps (cached_forward.py).
CACHES = ("none", "exact", "prompt", "prefix", "dual")
# Passes with an approximate cache: on all that is kept, over all positions, or over the canvas.
REUSE, RENEW, RENEW_CANVAS = range(3)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static part of a decode.

    One compilation serves all decodes with an equal configuration.

    Attributes:
        gen_length: N, positions of the response.
        block_length: positions of a block. It divides gen_length unless block_causal is set.
        steps: forward passes in each block.
        block_causal: True for blocks that count from each sequence's first token and attend to
            earlier blocks only (LLaDA2.0).
        cache: one of CACHES. "exact" keeps those of finished blocks, with the same result, and
            needs block_causal. "prompt", "prefix" and "dual" are approximations for the others.
        refresh: renew an approximate cache every `refresh` steps of a block, by a pass over all
            positions. 0: only in its first step.
        window: positions on each side of the block that a pass with the dual cache reads as well.
        prompt_every: renew the prompt's keys and values only in the first step of every
            `prompt_every`-th block. Other blocks begin with a pass over the canvas.
        early_exit: skip passes of blocks in which no position is open (see Rule.is_open).
        stop_at_eos: decode no block after one that holds EOS, or another of the stop ids.
        eos_early_stop: stop as soon as all positions up to the first of them are settled.
        trace: return every step.
        notes: with `trace`, include the rule's notes.
        eot_id: id of the end-of-turn token, if a rule constrains it.
        extra_steps: steps of a block, the last ones, in which the schedule writes no mask.
        eps: end of Dream's times, which go from 1 to eps in even steps. None: there are none.
        cut_at_eos: repeat the first EOS of a response up to its end, however the decode went on.
        infill: P if the prompt stands on the canvas, so that its masks are decoded too. They belong
            to the first block, and masks that a block leaves are open in the next one. Otherwise 0.
    """

    gen_length: int
    block_length: int
    steps: int
    block_causal: bool = False
    cache: str = "none"
    refresh: int = 0
    window: int = 0
    prompt_every: int = 1
    early_exit: bool = False
    stop_at_eos: bool = False
    eos_early_stop: bool = False
    trace: bool = False
    notes: bool = False
    eot_id: int | None = None
    extra_steps: int = 0
    eps: float | None = None
    cut_at_eos: bool = False
    infill: int = 0

    @property
    def canvas(self) -> int:
        """Positions that are decoded.

        These are N, plus those that rounding up to a whole block can add, and P with `infill`.
        """
        surplus = self.block_length - 1 if self.block_causal else 0
        return self.infill + self.gen_length + surplus

    @property
    def blocks(self) -> int:
        """Largest number of blocks that the canvas can touch."""
        return -(-(self.canvas - self.infill) // self.block_length)

    @property
    def block_only(self) -> bool:
        """True if a step computes hidden states of the active block alone."""
        return self.block_causal or self.cache in ("prefix", "dual")


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class DecodeState:
    """Carry of the scan.

    Attributes:
        x: input-space state, float32 [B, N, E].
        t: progress in [0, 1], float32 [B, N].
        tokens: int [B, N]. At t = 1 the committed token, elsewhere the last prediction, or the
            mask token before the first one.
        forward_passes: passes that the sequence took part in, int [B].
        finished: True if the sequence ended by its EOS, bool [B].
        memory: what the rule keeps from step to step, a tree of arrays [B, ...], or None.
        finite: False if a prediction came from logits with NaN or infinity, bool [B], or None.
    """

    x: jax.Array
    t: jax.Array
    tokens: jax.Array
    forward_passes: jax.Array
    finished: jax.Array
    memory: Any = None
    finite: Any = None


@struct.dataclass
class Trace:
    """Record of one step, arrays [B, N].

    The scan stacks them to [T, B, N], and `generate` returns NumPy arrays.

    Skipped steps have zero confidence, step_fraction, top and notes. Under block-causal attention,
    and with a prefix or dual cache, positions outside the active block keep their tokens and have
    confidence 0.

    Attributes:
        tokens: predictions of the step.
        progress: t after the step.
        confidence: probability of each prediction.
        step_fraction: the rule's a.
        reedited: True where the position was reset.
        top, top_tokens: the four largest probabilities and their tokens, [B, N, 4].
        notes: what the rule returned as notes, a tree of arrays [B, ...], or None.
    """

    tokens: jax.Array | np.ndarray
    progress: jax.Array | np.ndarray
    confidence: jax.Array | np.ndarray
    step_fraction: jax.Array | np.ndarray
    reedited: jax.Array | np.ndarray
    top: jax.Array | np.ndarray
    top_tokens: jax.Array | np.ndarray
    notes: Any = None


@no_type_check  # as for DecodeState
@struct.dataclass
class Step:
    """Slice of the schedule, with the positions that may move.

    Numbers are scalars if all rows are at one step. With rows that are each at their own block and
    step they are arrays [B, 1] (slots.py).

    Attributes:
        index: number of the step in the whole decode.
        block: index of the active block.
        rho: position in the block's steps, 0 to 1.
        quota: masks that mask prediction writes in this step.
        steps_left: steps of the block from this one on.
        cache_pass: pass with an approximate cache, REUSE, RENEW or RENEW_CANVAS.
        share: share of the remaining masks that Dream's times write in this step, or None.
        candidates: True at positions of the active block that may move, bool [B, N].
        keys: one random key per sequence [B], or None if the rule draws nothing.
        writes: True for rows without candidates whose pass serves the cache alone, bool [B], or
            None.
    """

    index: jax.Array
    block: jax.Array
    rho: jax.Array
    quota: jax.Array
    steps_left: jax.Array
    cache_pass: Any = None
    share: Any = None
    candidates: Any = None
    keys: Any = None
    writes: Any = None


def is_stop(tokens: Int[Array, "*shape"], stop_ids: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """Returns True at tokens that end a text."""
    found = tokens == stop_ids[0]
    for token in stop_ids[1:]:
        found |= tokens == token
    return found


def read_out(
    config: DecodeConfig, state: DecodeState, stop_ids: tuple[int, ...]
) -> tuple[Int[Array, "B N"], Float[Array, "B N"]]:
    """Returns (tokens, final progress).

    After the end of a sequence all tokens are EOS, the first of `stop_ids`. The progress of a
    sequence is NaN if its logits were not finite. With `infill` the prompt comes first.
    """
    n = config.infill + config.gen_length
    tokens = state.tokens[:, :n]
    always = config.stop_at_eos or config.cut_at_eos
    if always or config.eos_early_stop:
        is_eos = is_stop(tokens, stop_ids) & (jnp.arange(n)[None, :] >= config.infill)
        after = jnp.cumsum(is_eos, axis=-1) - is_eos > 0
        cut = after if always else after & state.finished[:, None]
        tokens = jnp.where(cut, stop_ids[0], tokens)
    progress = state.t[:, :n]
    if state.finite is not None:
        progress = jnp.where(state.finite[:, None], progress, jnp.nan)
    return tokens, progress
