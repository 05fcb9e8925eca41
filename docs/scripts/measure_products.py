"""Measures updates of a pretraining on a CPU, with products of float32 and of bfloat16.

    python docs/scripts/measure_products.py

Both run in turns, with the lengths of microcode-long. Nothing else should run beside them.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import xflow_jax as xf
from xflow_jax.models import build
from xflow_jax.training import TrainState, make_pretrain_step

ROWS, PROMPT, RESPONSE, ROUNDS = 32, 96, 128, 5
LAYOUTS: dict[str, tuple[int, ...]] = {"masks anywhere": (), "clean copies": (1,)}


def main() -> None:
    """Prints the seconds of an update."""
    lm = xf.load("tiny-base")
    model, optimizer = build(lm.config, remat="full"), optax.adam(1e-4)
    tokens = jax.random.randint(jax.random.key(0), (ROWS, PROMPT + RESPONSE), 0, 400)
    batch = {
        "prompt": tokens[:, :PROMPT],
        "prompt_mask": jnp.ones((ROWS, PROMPT), bool),
        "response": tokens[:, PROMPT:],
    }
    for layout, blocks in LAYOUTS.items():
        programs = {}
        for precision in ("float32", "bfloat16"):
            step = make_pretrain_step(model, optimizer, optax.constant_schedule(1.0), blocks)
            with jax.default_matmul_precision(precision):
                state = TrainState.create(lm.params, optimizer)
                programs[precision] = jax.jit(step).lower(state, batch, jax.random.key(1)).compile()
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(1 + ROUNDS):
            for name, program in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(state, batch, jax.random.key(1)))
                times[name].append(time.perf_counter() - began)
        for name, seconds in times.items():
            print(f"{layout:<16} {name:<10} {statistics.median(seconds[1:]):.2f} s")


if __name__ == "__main__":
    main()
