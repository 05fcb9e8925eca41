"""Measurements of the machine: run times, matrix products and peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SIZES = (512, 1024, 2048, 4096, 8192)  # of square matrices
LONG_PRODUCT = 0.02  # seconds, after which the next size, eight times as much work, is left out


def run_seconds(program: Callable[[], object]) -> float:
    """Measures one run in seconds, until its results are ready."""
    began = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - began


def time_in_turns(
    programs: Mapping[str, Callable[[], object]],
    rounds: int,
    timer: Callable[[Callable[[], object]], float] = run_seconds,
) -> dict[str, list[float]]:
    """Times several programs in turns, round by round.

    Another load on the machine therefore slows all of them alike.

    Args:
        programs: name -> program. Each should have run once, since a first run compiles.
        rounds: number of rounds.
        timer: measures the seconds of one run.

    Returns:
        Name -> seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(timer(program))
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Returns the median of the ratios of each round.

    Neighbours in time share the load of the machine, so this is steadier than the ratio of the
    medians.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def matmul_rate(dtype: DTypeLike, rounds: int = 5) -> float:
    """Measures the FLOP/s of square matrix products.

    Nothing else can exceed it: it is the best over sizes and rounds. The matrices are random,
    since accelerators multiply constant ones faster.
    """
    product, best = jax.jit(jnp.matmul), 0.0
    for size in SIZES:
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product(a, a).block_until_ready()

        def multiply(a: jax.Array = a) -> jax.Array:
            return product(a, a)

        seconds = min(run_seconds(multiply) for _ in range(rounds))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_PRODUCT:
            break
    return best


def copy_rate(size: int = 2**31, rounds: int = 5) -> float:
    """Measures the memory's bytes/s, read and written together.

    Args:
        size: bytes of the array that is copied.
        rounds: number of copies, of which the fastest counts.
    """
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)  # an addition is free beside the transfer
    copy(x).block_until_ready()
    return 2 * x.nbytes / min(run_seconds(lambda: copy(x)) for _ in range(rounds))


def peak_memory() -> int:
    """Returns the most bytes that were in use at a time.

    They are those of the first device, or of the process if the device does not count them.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
