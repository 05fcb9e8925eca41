"""Times of a run: steps, checkpoints, model-FLOPs share and goodput across restarts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.typing import ArrayLike

from xflow_jax.checkpoints import exists, write_atomic
from xflow_jax.errors import UserError
from xflow_jax.input_files import read_json
from xflow_jax.planning import find_chip
from xflow_jax.types import PyTree

# Metrics that differ between runs that are otherwise equal.
TIME_METRICS = (
    "seconds_per_step",
    "tokens_per_second",
    "model_flops_share",
    "goodput",
    "checkpoint_seconds",
    "checkpoint_write_seconds",
)


@dataclass
class History:
    """Times of a run since its first start, as times.json has them.

    Attributes:
        began: time of the first start, in seconds since 1970.
        starts: number of starts.
        ended: time at which the run reached its last step, or None.
        idle: seconds between such an end and a later start, which are nobody's loss.
        steps: step of a checkpoint -> seconds in the steps up to it. Steps that were repeated after
            a kill are in no checkpoint, so they count once.
    """

    began: float
    starts: int = 0
    ended: float | None = None
    idle: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)


@dataclass
class Interval:
    """Counts and times since the last report.

    Attributes:
        seconds: time in the steps.
        steps: number of steps.
        tokens: tokens of them.
        work: (FLOPs of a pass, passes) of each step.
        saves: time for which each checkpoint held the steps up.
        writes: time until each checkpoint was whole.
    """

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    work: list[tuple[float, ArrayLike]] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)


class StepClock:
    """Measures the steps of a run on the clock of the wall.

    A step that compiles counts as lost time, and so do evaluations, checkpoints, the start of the
    program, the time until a killed run is started again, and steps that have to be repeated.

    Args:
        file: times.json of the run, which other starts continue.
        began: time at which the program began, in seconds since 1970, or None for now.
        devices: number of devices of the run.
        writes: False in processes that write nothing.
    """

    def __init__(self, file: Path, began: float | None, devices: int, writes: bool):
        self.file, self._writes = file, writes
        self._began = began or time.time()
        chip = find_chip(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.flops * devices
        self._history = History(self._began)
        self._in_steps = 0.0
        self._mark: float | None = None
        self._compiled: set[int] = set()
        self._now = Interval()
        self._held: list[float] = []

    def start(self, step: int) -> None:
        """Starts the clock before the first step of this start.

        Args:
            step: number of steps that the run has, those of its last checkpoint.

        Raises:
            UserError: if times.json is not one, or for errors of the disk.
        """
        if self._writes and exists(self.file):
            self._history = _read_history(self.file)
        history = self._history
        if history.ended is not None:
            history.idle += max(self._began - history.ended, 0.0)
            history.ended = None
        history.starts += 1
        history.steps = {n: s for n, s in history.steps.items() if int(n) <= step}
        self._in_steps = max(history.steps.values(), default=0.0)
        self._write()
        self._mark = time.perf_counter()

    def count(
        self, result: PyTree, tokens: int, flops: float = 0.0, passes: ArrayLike = 1.0
    ) -> None:
        """Counts a step that was dispatched.

        Args:
            result: arrays of the step. The first step of a shape compiles, and is waited for.
            tokens: tokens of the step, which stand for its shape.
            flops: model FLOPs of a pass.
            passes: passes of the step, read at the next report.
        """
        if tokens not in self._compiled:
            self._compiled.add(tokens)
            jax.block_until_ready(result)
            self._mark = time.perf_counter()
            return
        self._add_elapsed()
        self._now.steps += 1
        self._now.tokens += tokens
        self._now.work.append((flops, passes))

    @contextlib.contextmanager
    def paused(self, result: PyTree) -> Iterator[None]:
        """Leaves a block out of the time in the steps.

        Args:
            result: arrays of the last step, which are waited for before.
        """
        if self._mark is not None:
            jax.block_until_ready(result)
            self._add_elapsed()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark = time.perf_counter()

    def saved(self, step: int, held: float) -> None:
        """Records a checkpoint.

        Args:
            step: its step.
            held: seconds for which it held the steps up.
        """
        self._now.saves.append(held)
        self._held.append(held)
        self._history.steps[str(step)] = self._in_steps
        self._write()

    def written(self, seconds: float) -> None:
        """Records the seconds until a checkpoint was whole."""
        self._now.writes.append(seconds)

    def finish(self) -> None:
        """Records that the run has reached its last step."""
        self._mark = None
        self._history.ended = time.time()
        self._write()

    def report(self, result: PyTree) -> dict[str, float]:
        """Returns the times since the last report, and begins a new interval.

        Args:
            result: arrays of the last step, which are waited for.

        Returns:
            TIME_METRICS, without those that are not known: the times of steps if all of them
            compiled, the share on an unknown chip, and the times of checkpoints without one.
        """
        with self.paused(result):
            now, self._now = self._now, Interval()
        values = {"goodput": self.goodput}
        if now.steps and now.seconds > 0:
            values["seconds_per_step"] = now.seconds / now.steps
            values["tokens_per_second"] = now.tokens / now.seconds
            flops = sum(size * float(np.asarray(passes)) for size, passes in now.work)
            if self._peak and flops:
                values["model_flops_share"] = flops / now.seconds / self._peak
        for name, times in (("", now.saves), ("write_", now.writes)):
            if times:
                values[f"checkpoint_{name}seconds"] = sum(times) / len(times)
        return values

    @property
    def goodput(self) -> float:
        """Share of the time since the first start in steps."""
        return min(self._in_steps / max(self._wall, 1e-9), 1.0)

    @property
    def _wall(self) -> float:
        """Seconds since the first start in which the run was not complete."""
        end = self._history.ended or time.time()
        return end - self._history.began - self._history.idle

    def summary(self) -> str | None:
        """Returns a sentence on the run, or None without a step."""
        if not self._in_steps:
            return None
        starts = self._history.starts
        over = f" over {starts} starts" if starts > 1 else ""
        text = f"{self.goodput:.1%} of {self._wall:.1f} s{over} were spent in steps (goodput)"
        if self._held:
            mean = sum(self._held) / len(self._held)
            text += f". A checkpoint held them up for {mean:.2f} s"
        return text

    def _add_elapsed(self) -> None:
        """Adds the time since the mark to the steps."""
        assert self._mark is not None
        elapsed = time.perf_counter() - self._mark
        self._mark += elapsed
        self._in_steps += elapsed
        self._now.seconds += elapsed

    def _write(self) -> None:
        if self._writes:
            write_atomic(self.file, json.dumps(asdict(self._history)) + "\n")


def _read_history(file: Path) -> History:
    """Reads times.json.

    Raises:
        UserError: if it has another form.
    """
    value = read_json(file)
    try:
        if not isinstance(value, dict):
            raise TypeError
        history = History(**value)
        assert history.began + history.idle + history.starts > 0
        assert (history.ended or 0.0) >= 0
        assert all(int(step) >= 0 and seconds >= 0 for step, seconds in history.steps.items())
    except (TypeError, ValueError, AttributeError, AssertionError):
        raise UserError(f"{file}: it holds no times of a run. Remove it.") from None
    return history
