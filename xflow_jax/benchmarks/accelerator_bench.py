"""Measurements of one accelerator, section by section.

Each section is a function of a `Bench` that returns numbers for JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from xflow_jax.benchmarks.accelerator import Bench, Numbers, Shapes
from xflow_jax.benchmarks.accelerator_decode import (
    measure_caches,
    measure_experts,
    measure_int8,
    measure_profile,
    measure_steps,
)
from xflow_jax.benchmarks.accelerator_parts import (
    measure_agreement,
    measure_attention,
    measure_belief,
    measure_machine,
    measure_short_pass,
    measure_training,
)

Section: TypeAlias = Callable[[Bench], Numbers]

SECTIONS: dict[str, Section] = {
    "machine": measure_machine,
    "agreement": measure_agreement,
    "steps": measure_steps,
    "caches": measure_caches,
    "profile": measure_profile,
    "short_pass": measure_short_pass,
    "belief": measure_belief,
    "attention": measure_attention,
    "experts": measure_experts,
    "int8": measure_int8,
    "training": measure_training,
}


def run_sections(
    shapes: Shapes,
    seconds: float,
    sections: Sequence[str],
    dtype: str,
    report: Callable[[str], None],
    keep: Callable[[Numbers], None],
) -> Numbers:
    """Runs sections until the time is up.

    A section that fails, for example for lack of memory, has its error in its place.

    Args:
        shapes: models and lengths.
        seconds: time after which no further measurement begins.
        sections: names in SECTIONS.
        dtype: dtype of the models.
        report: receives lines of progress.
        keep: receives the numbers so far after each section.

    Returns:
        Section -> its numbers.
    """
    bench = Bench(shapes, time.monotonic() + seconds, dtype, report)
    numbers: Numbers = {}
    for name in sections:
        began = time.monotonic()
        try:
            numbers[name] = SECTIONS[name](bench)
        except Exception as error:  # noqa: BLE001 - the other sections still count
            numbers[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            report(f"{name} failed: {error!r:.200}")
            bench.free()
        report(f"{name}: {time.monotonic() - began:.0f} s")
        keep(numbers)
    return numbers
