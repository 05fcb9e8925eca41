"""Shapes and state of a measurement of one accelerator.

Weights are random and are made on the device. Shapes are those of the released models, or small
ones for a trial on a CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.benchmarks.timer import (
    copy_rate,
    matmul_rate,
    run_seconds,
)
from xflow_jax.benchmarks.workload import load_or_make, random_prompts
from xflow_jax.decoding import (
    DecodeConfig,
    Rule,
    decode_batch,
)
from xflow_jax.lm import LM

Numbers: TypeAlias = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Models and lengths of the measurements.

    Attributes:
        llada: bidirectional model: key of RANDOM_MODELS.
        llada2: block-causal mixture of experts: key of RANDOM_MODELS.
        prompt: tokens of a prompt.
        response: tokens of a response.
        block: positions of a block.
        passes: forward passes of a block.
        batches: batch sizes of decodes.
        train_batches: batch sizes of the alignment step, of which the largest that fits counts.
        copy_bytes: size of the array that is copied.
        rounds: least rounds of each measurement.
    """

    llada: str
    llada2: str
    prompt: int
    response: int
    block: int
    passes: int
    batches: tuple[int, ...]
    train_batches: tuple[int, ...]
    copy_bytes: int
    rounds: int


SHAPES = {
    "released": Shapes(
        llada="llada-8b",
        llada2="llada2-mini",
        prompt=128,
        response=512,
        block=32,
        passes=12,
        batches=(1, 8, 32),
        train_batches=(256, 128, 64, 32, 16, 8, 4),
        copy_bytes=2**31,
        rounds=3,
    ),
    "small": Shapes("small", "llada2-20m", 16, 32, 16, 2, (1, 2), (2,), 2**24, 1),
}

LONG_MEASUREMENT = 3.0  # seconds of runs after which none is repeated


@dataclasses.dataclass
class Bench:
    """State of one run: shapes, time left, and the model in memory.

    Attributes:
        shapes: models and lengths.
        deadline: time.monotonic() at which no measurement may begin.
        dtype: dtype of the models.
        report: receives a line of progress.
    """

    shapes: Shapes
    deadline: float
    dtype: str
    report: Callable[[str], None]
    _lm: LM | None = None
    _made: tuple[str, str] = ("", "")
    _rate: float = 0.0
    _bandwidth: float = 0.0

    def model(self, name: str, dtype: str | None = None) -> LM:
        """Makes a model with random weights, and frees the one before.

        Args:
            name: key of RANDOM_MODELS.
            dtype: dtype of its weights, or None for `self.dtype`.
        """
        wanted = name, dtype or self.dtype
        if wanted != self._made:
            self.free()
            began = time.perf_counter()
            self._lm, self._made = load_or_make(*wanted), wanted
            jax.block_until_ready(self._lm.params)
            seconds = time.perf_counter() - began
            self.report(f"{name}: weights in {wanted[1]} made in {seconds:.1f} s")
        assert self._lm is not None
        return self._lm

    def free(self) -> None:
        """Frees the model in memory and all compiled programs."""
        self._lm, self._made = None, ("", "")
        jax.clear_caches()
        gc.collect()

    @property
    def rate(self) -> float:
        """FLOP/s of large matrix products, measured once."""
        self._rate = self._rate or matmul_rate(jnp.dtype(self.dtype))
        return self._rate

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the memory, measured once."""
        self._bandwidth = self._bandwidth or copy_rate(self.shapes.copy_bytes)
        return self._bandwidth

    def record(self, results: list[Numbers], numbers: Numbers) -> None:
        """Adds and reports the numbers of a measurement.

        So a run that is cut off has printed them.

        Args:
            results: the measurements of a section so far.
            numbers: the numbers of another one.
        """
        results.append(numbers)
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in numbers.items())
        self.report("  " + ", ".join(shown))

    def has_time(self, label: str, seconds: float = 20.0) -> bool:
        """Returns True if there is time for a measurement."""
        enough = time.monotonic() + seconds < self.deadline
        self.report(label if enough else f"{label}: left out, since the time is up")
        return enough


def memory_limit() -> int | None:
    """Returns the memory of the first device in bytes, if known."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def decode_program(
    lm: LM, rule: Rule, config: DecodeConfig, batch: int, prompt_length: int
) -> Callable[[], tuple[jax.Array, ...]]:
    """Builds a decode of random prompts."""
    arrays = random_prompts(lm, batch, prompt_length)

    def decode() -> tuple[jax.Array, ...]:
        return decode_batch(lm.model, lm.params, rule, config, *arrays)[:3]

    return decode


def best_seconds(program: Callable[[], object]) -> float:
    """Measures the fastest of up to three runs.

    Long runs are not repeated.
    """
    times: list[float] = []
    while len(times) < 3 and sum(times) < LONG_MEASUREMENT:
        times.append(run_seconds(program))
    return min(times)
