"""Time of a decode and of its parts.

Three programs are timed in turns: the decode itself, its backbone with the head's matrix product,
and the backbone alone. The differences of their medians are the parts.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.benchmarks.timer import median_ratio, peak_memory, run_seconds, time_in_turns
from xflow_jax.benchmarks.workload import random_prompts
from xflow_jax.decoding import (
    DecodeConfig,
    ExactCache,
    Rule,
    Step,
    block_layout,
    decode_batch,
    make_forward,
    make_schedule,
    pass_positions,
)
from xflow_jax.lm import LM
from xflow_jax.models import forward_flops, make_head
from xflow_jax.types import Backbone, Cache, ModelConfig, Params

LEAST_SECONDS = 3.0  # least time of the measurement of each batch size
MOST_ROUNDS = 99  # most rounds to reach it

Program: TypeAlias = Callable[[], object]
Carry: TypeAlias = tuple[jax.Array, Cache | ExactCache | None, jax.Array]  # x, cache, logits


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one batch size, in seconds.

    A step is one forward pass with all that the decoder does around it.

    Attributes:
        batch: number of sequences.
        tokens_per_second: response tokens of a whole decode.
        step: time of a step.
        backbone: its part in the backbone.
        head: its part in the matrix product to the logits.
        outside: the rest of the step: belief, rule and update.
        outside_share: outside / step, as the median of the rounds' own ratios.
        floor: time of a step's matrix products at the measured rate of the machine.
        floor_share: floor / step.
        cold: first decode of the process, with compilation.
        warm: median of the later ones.
        peak_memory: bytes, see `peak_memory`.
    """

    batch: int
    tokens_per_second: float
    step: float
    backbone: float
    head: float
    outside: float
    outside_share: float
    floor: float
    floor_share: float
    cold: float
    warm: float
    peak_memory: int


def measure_decode(
    lm: LM,
    rule: Rule,
    decode_config: DecodeConfig,
    batch: int,
    prompt_length: int,
    rate: float,
    rounds: int,
    seconds: float | None = None,
) -> Timing:
    """Times a decode of random prompts and its parts.

    Args:
        lm: the model.
        rule: the rule.
        decode_config: lengths and steps. EOS ends no sequence.
        batch: number of prompts.
        prompt_length: tokens of each prompt.
        rate: FLOP/s of `matmul_rate`.
        rounds: least number of rounds.
        seconds: least time of the measurement, or None for LEAST_SECONDS.
    """
    decode_config = dataclasses.replace(decode_config, stop_at_eos=False)
    ids, mask, keys = random_prompts(lm, batch, prompt_length)
    copies = 2 if rule.belief_options(lm.config, None).guidance else 1  # guidance doubles the batch

    def decode_once() -> tuple[object, ...]:
        return decode_batch(lm.model, lm.params, rule, decode_config, ids, mask, keys)

    began = time.perf_counter()
    with lm.scope():
        steps = int(
            decode_batch(lm.model, lm.params, rule, decode_config, ids, mask, keys)[2].max()
        )
    cold = time.perf_counter() - began
    tiled = jnp.tile(ids, (copies, 1)), jnp.tile(mask, (copies, 1))
    programs = {"decode": decode_once, **_partial_programs(lm, decode_config, *tiled, steps)}
    with lm.scope():
        for program in programs.values():
            run_seconds(program)  # compiles
        once = sum(map(run_seconds, programs.values()))
        # Short programs need more rounds for a steady median.
        least = LEAST_SECONDS if seconds is None else seconds
        enough = min(MOST_ROUNDS, int(least / once))
        times = time_in_turns(programs, max(rounds, enough))
    warm, with_head, backbone = (statistics.median(t) for t in times.values())
    length = ids.shape[1] + decode_config.canvas
    logit_positions = decode_config.canvas
    if decode_config.block_only and decode_config.cache != "none":
        logit_positions = decode_config.block_length
    # With an approximate cache the passes of a block differ, and the floor is of their mean.
    taken = pass_positions(decode_config, ids.shape[1])[: -(-steps // decode_config.steps)]
    rows = batch * copies
    flops = statistics.fmean(
        step_flops(lm.config, rows, int(queries), length, logit_positions) for queries in taken.flat
    )
    return Timing(
        batch=batch,
        tokens_per_second=batch * decode_config.gen_length / warm,
        step=warm / steps,
        backbone=backbone / steps,
        head=(with_head - backbone) / steps,
        outside=(warm - with_head) / steps,
        outside_share=1 - median_ratio(times["with_head"], times["decode"]),
        floor=flops / rate,
        floor_share=flops / rate * steps / warm,
        cold=cold,
        warm=warm,
        peak_memory=peak_memory(),
    )


def _partial_programs(
    lm: LM, decode_config: DecodeConfig, prompt: jax.Array, mask: jax.Array, steps: int
) -> dict[str, Program]:
    """Builds the forward passes of a decode, with and without the head.

    Args:
        lm: the model.
        decode_config: lengths and steps.
        prompt: token ids of the rows that the backbone computes, int [B, P].
        mask: False at padding, bool [B, P].
        steps: forward passes of the decode.
    """
    args = lm.model, lm.params, decode_config
    if decode_config.cache != "none":
        blocks = steps // decode_config.steps
        return {
            "with_head": lambda: _cached_passes(*args, True, blocks, prompt, mask),
            "backbone": lambda: _cached_passes(*args, False, blocks, prompt, mask),
        }
    length = prompt.shape[1] + decode_config.canvas
    shape = (prompt.shape[0], length, lm.params["wte"]["embedding"].shape[1])
    x = jax.random.normal(jax.random.key(0), shape, lm.dtype)
    padding = ((0, 0), (0, decode_config.canvas))
    on_row = jnp.pad(mask, padding, constant_values=True)
    return {
        "with_head": lambda: _full_passes(*args, True, x, on_row),
        "backbone": lambda: _full_passes(*args, False, x, on_row),
    }


@partial(jax.jit, static_argnames=("model", "decode_config", "head"))
def _full_passes(
    model: Backbone,
    params: Params,
    decode_config: DecodeConfig,
    head: bool,
    x: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward passes of a decode over all positions.

    Each pass is on the result of the last one.

    Args:
        model: the backbone.
        params: its parameters.
        decode_config: lengths and steps.
        head: True to run the head on the canvas as well.
        x: [B, L, E].
        mask: False at padding, bool [B, L].

    Returns:
        The last hidden states [B, L, E] and logits [B, canvas, V], a scalar without the head.
    """
    logits_of = make_head(params)
    rows, canvas = model.config.vocab_rows, decode_config.canvas

    def one_pass(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        h = model.apply({"params": params}, carry[0], mask, method="hidden")
        # The logits stay in the carry, so that XLA cannot remove them as unused.
        return (h, logits_of(h[:, -canvas:], 0, rows) if head else carry[1]), None

    logits = jnp.zeros((x.shape[0], canvas, rows) if head else (), x.dtype)
    steps = decode_config.blocks * decode_config.steps
    return jax.lax.scan(one_pass, (x, logits), None, length=steps)[0]


@partial(jax.jit, static_argnames=("model", "decode_config", "head", "blocks"))
def _cached_passes(
    model: Backbone,
    params: Params,
    decode_config: DecodeConfig,
    head: bool,
    blocks: int,
    prompt: jax.Array,
    mask: jax.Array,
) -> Carry:
    """Runs the forward passes of a decode with a cache.

    With the exact cache these are the pass of the prompt, the steps of each block, and the pass
    that adds it to the cache.

    Args:
        model: the backbone.
        params: its parameters.
        decode_config: lengths and steps.
        head: True to run the head on the active block as well.
        blocks: number of blocks.
        prompt: token ids, int [B, P].
        mask: False at padding, bool [B, P].

    Returns:
        The last hidden states [B, canvas, E], the cache, and the logits of the positions that a
        step computes [B, n, V], a scalar without the head.
    """
    logits_of, rows = make_head(params), model.config.vocab_rows
    prompt_x = model.apply({"params": params}, prompt, method="embed")
    on_canvas = block_layout(decode_config, mask)[1]
    forward = make_forward(model, params, decode_config, prompt_x, mask, on_canvas)

    def one_step(carry: Carry, step: Step) -> tuple[Carry, None]:
        x, cache, logits = carry
        h, cache = forward.hidden(cache, x, step)
        # Each pass depends on the result of the last one.
        x = jax.lax.dynamic_update_slice_in_dim(x, h, 0, axis=1)
        return (x, cache, logits_of(h, 0, rows) if head else logits), None

    def one_block(carry: Carry, steps: Step) -> tuple[Carry, None]:
        x, cache, logits = carry
        cache = forward.begin_block(cache, x, steps.block[0], jnp.array(True))
        return jax.lax.scan(one_step, (x, cache, logits), steps)[0], None

    x = jnp.zeros((prompt.shape[0], decode_config.canvas, prompt_x.shape[-1]), prompt_x.dtype)
    width = decode_config.block_length if decode_config.block_only else decode_config.canvas
    logits = jnp.zeros((x.shape[0], width, rows) if head else (), x.dtype)
    steps = jax.tree.map(
        lambda part: part.reshape(decode_config.blocks, -1)[:blocks], make_schedule(decode_config)
    )
    start: Carry = (x, forward.init_cache(), logits)
    return jax.lax.scan(one_block, start, steps)[0]


def step_flops(
    config: ModelConfig, rows: int, queries: int, keys: int, logit_positions: int
) -> float:
    """Computes the FLOPs of the matrix products of one step.

    Args:
        config: the model.
        rows: sequences of the batch.
        queries: positions of each row that the layers compute.
        keys: positions that these attend to.
        logit_positions: positions of each row that the head computes.
    """
    head = 2.0 * rows * logit_positions * config.hidden_size * config.vocab_rows
    return forward_flops(config, rows, queries, keys) + head


def timing_table(timings: Sequence[Timing]) -> str:
    """Formats a line for each batch size: milliseconds and percent."""
    times = ("step ms", "backbone", "head", "outside")
    header = ("batch", "tokens/s", *times, "outside %", "of floor %", "cold s", "warm s", "peak MB")
    lines: list[tuple[str, ...]] = [header]
    for t in timings:
        parts = (f"{1e3 * s:.3f}" for s in (t.step, t.backbone, t.head, t.outside))
        shares = (f"{100 * t.outside_share:.1f}", f"{100 * t.floor_share:.1f}")
        ends = (f"{t.cold:.2f}", f"{t.warm:.3f}", f"{t.peak_memory / 1e6:.0f}")
        lines.append((str(t.batch), f"{t.tokens_per_second:.0f}", *parts, *shares, *ends))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
