"""Measures a step of slots that are at different blocks and steps, with each cache.

    python docs/scripts/measure_slot_caches.py --model mid --slots 4

Random weights or a checkpoint, random prompts, and mask prediction, whose blocks all take the same
number of steps. A measured run is one block of every row. Rows are admitted a few steps apart, so
that their full passes come in different steps. The caches run in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import jax.numpy as jnp
import numpy as np

from xflow_jax.benchmarks import load_or_make
from xflow_jax.benchmarks.timer import median_ratio, time_in_turns
from xflow_jax.decoding import (
    CacheOptions,
    Lane,
    MaskPrediction,
    Slots,
    Snapshot,
    admit,
    init_slots,
    make_decode_config,
    make_row,
    run_passes,
    slot_config,
)
from xflow_jax.evaluation.tables import markdown_table
from xflow_jax.lm import LM

RULE = MaskPrediction()
HEADER = ("cache", "milliseconds a step", "times less than none")


class Bench:
    """A full lane in the middle of its decodes."""

    def __init__(self, lm: LM, cache: str, args: argparse.Namespace) -> None:
        """Fills all slots."""
        self.lm, self.steps = lm, args.steps
        n, p = args.gen_length, args.prompt_length
        config = make_decode_config(lm, p, n, 1, args.steps, args.block_length)
        # A decode ends with its last block, so there are enough blocks for all rounds.
        config = slot_config(lm, RULE, config, CacheOptions(cache))
        self.lane = Lane.of(config, args.slots, p)
        self.slots: Slots = init_slots(lm, RULE, self.lane)
        rng = np.random.default_rng(0)
        row_config = dataclasses.replace(config, trace=False)
        for slot in range(args.slots):
            prompt = rng.integers(0, lm.config.vocab_size, p).tolist()
            row = make_row(self.lane, lm.config.pad_id, prompt, RULE, row_config)
            with lm.scope():
                parts = (lm.model, lm.params, RULE, self.lane, self.slots)
                self.slots = admit(*parts, row, jnp.int32(slot))
            self.run(1)

    def run(self, passes: int) -> Snapshot:
        """Takes some steps with all slots."""
        live = np.ones(self.lane.slots, bool)
        with self.lm.scope():
            parts = (self.lm.model, self.lm.params, RULE, self.lane, self.slots)
            self.slots, snapshot = run_passes(*parts, live, passes)
        return snapshot


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="Measures a step of slots with each cache.")
    parser.add_argument("--model", default="mid", help="as for xflow bench")
    parser.add_argument("--dtype", default="float32", help="as for xflow bench")
    parser.add_argument("--caches", default="none,prompt,prefix,dual", help="with commas")
    for name, value in (
        ("slots", 4), ("prompt-length", 128), ("gen-length", 256), ("block-length", 32),
        ("steps", 8), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    lm = load_or_make(args.model, args.dtype)
    benches = {cache: Bench(lm, cache, args) for cache in args.caches.split(",")}
    for bench in benches.values():
        bench.run(args.steps)  # compiles
    programs = {
        cache: lambda bench=bench: bench.run(args.steps) for cache, bench in benches.items()
    }
    times = time_in_turns(programs, args.rounds)
    for cache, bench in benches.items():
        assert np.asarray(bench.run(1).rows)[:, 2].all(), f"{cache}: give a longer gen-length"
    lines = []
    for cache, seconds in times.items():
        step = 1e3 * statistics.median(seconds) / args.steps
        lines.append((cache, f"{step:.1f}", f"{median_ratio(times['none'], seconds):.2f}"))
    print(markdown_table(HEADER, lines, 1))


if __name__ == "__main__":
    main()
