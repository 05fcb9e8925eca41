"""Measures head and belief in bfloat16 on a CPU, with chunks cut as integers and as bfloat16.

    python docs/scripts/measure_head_slices.py

Both run in turns. Their CPU time depends little on other programs.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from xflow_jax.decoding import compute_belief
from xflow_jax.models import Head, LogitsFn

WIDTH, VOCABULARY, POSITIONS, STEPS, ROUNDS = 320, 126464, 256, 4, 5  # of the model `mid`


def plain_head(table: jax.Array) -> LogitsFn:
    """Returns a head that cuts its chunks as bfloat16."""

    def head(hidden: jax.Array, start: int | jax.Array, size: int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(table, start, size, axis=1)
        logits = jnp.einsum("bne,ev->bnv", hidden, part, preferred_element_type=jnp.float32)
        return logits.astype(hidden.dtype)

    return head


def compile_steps(integers: bool, table: jax.Array, h: jax.Array) -> jax.stages.Compiled:
    """Compiles a few steps, each of which depends on the one before."""

    def step(table: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        belief = compute_belief(Head(table, None) if integers else plain_head(table), h, VOCABULARY)
        return h + (0 * belief.confidence[..., None]).astype(h.dtype), belief.tokens

    def steps(table: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(lambda h, _: step(table, h), h, None, length=STEPS)

    return jax.jit(steps).lower(table, h).compile()


def main() -> None:
    """Prints CPU time of a step and temporary memory."""
    table = 0.05 * jax.random.normal(jax.random.key(0), (WIDTH, VOCABULARY), jnp.bfloat16)
    h = jax.random.normal(jax.random.key(1), (1, POSITIONS, WIDTH), jnp.bfloat16)
    programs = {"integers": compile_steps(True, table, h)}
    programs["bfloat16"] = compile_steps(False, table, h)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + ROUNDS):
        for name, program in programs.items():
            began = time.process_time()
            jax.block_until_ready(program(table, h))
            times[name].append((time.process_time() - began) / STEPS)
    for name, program in programs.items():
        memory = program.memory_analysis()
        assert memory is not None
        print(
            f"{name}: {1e3 * statistics.median(times[name][1:]):.0f} ms of CPU time a step, "
            f"{memory.temp_size_in_bytes / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
