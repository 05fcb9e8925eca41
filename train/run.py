"""Training run in its folder: lock, checkpoints, metrics, stop at SIGTERM."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from tqdm import tqdm

from train.event_file import EventFile
from train.state_store import StateStore
from train.step_clock import StepClock
from xflow_jax.benchmarks import StepProfiler
from xflow_jax.checkpoints import (
    append_text,
    close_text,
    exists,
    folder_lock,
    locked_by_first_process,
    require_orbax,
    write_atomic,
)
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import absolute, is_cloud
from xflow_jax.parallel import multihost
from xflow_jax.training import BatchIterator, read_records
from xflow_jax.types import PyTree

State = TypeVar("State")


class Run:
    """A training run in its folder. It is a context manager.

    It continues from the last checkpoint. The folder has checkpoints/ (state, position in the data,
    notes), metrics.jsonl, times.json and tensorboard/. Metrics after the last checkpoint are
    dropped, because their steps are repeated. With several processes, each writes its shards, and
    the first one everything else. The folder is locked until the block ends.

    Args:
        folder: the folder.
        seed: seed of the run. Only a run of the same seed is continued.
        keep: number of checkpoints that stay.
        devices: number of devices that the run uses.

    Attributes:
        latest: step of the last checkpoint, or None.
        frozen: fingerprint of the weights that the run does not change, or None. Once it is set,
            only a run of the same ones is continued.
        stopped: True after SIGTERM.
        profile: folder and number of steps of a trace, as `--profile` gives them.
        ended_early: True if the last run of this program was stopped before its last step.
        began: time at which the program began, in seconds since 1970, or None. The next run takes
            it.
        clock: the times of the run.
        bar: the progress bar, while `steps` runs.

    Raises:
        UserError: if another process writes the folder, if its checkpoints are damaged, or for
            errors of the disk.
    """

    bar: tqdm
    ended_early: ClassVar[bool] = False
    profile: ClassVar[str] = ""
    began: ClassVar[float | None] = None

    def __init__(self, folder: str | Path, seed: int, keep: int = 2, devices: int = 1):
        require_orbax(folder)
        self.folder, self.seed = absolute(folder), seed
        self.first_process = multihost.is_first_process()
        self.metrics_file = self.folder / "metrics.jsonl"
        self.stopped = False
        Run.ended_early = False
        self.frozen: str | None = None
        began, Run.began = Run.began, None
        self.clock = StepClock(self.folder / "times.json", began, devices, self.first_process)
        self._events: EventFile | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked_by_first_process(folder_lock(self.folder)))
            self.store = stack.enter_context(
                StateStore(self.folder / "checkpoints", keep, self.clock.written)
            )
            self._drop_metrics()
            if self.first_process and not is_cloud(self.folder):  # tensorboardX writes to disks
                first = 0 if self.latest is None else self.latest + 1
                self._events = EventFile(self.folder / "tensorboard", first)
                stack.callback(self._events.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.first_process and error is None:
            close_text(self.metrics_file)
            if summary := self.clock.summary():
                print(f"{self.folder}: {summary}")
        self._stack.__exit__(kind, error, traceback)

    @property
    def latest(self) -> int | None:
        """Step of the last checkpoint, or None."""
        return self.store.latest

    def restore(
        self, state: State, data: BatchIterator | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Restores the last checkpoint (`latest`).

        Args:
            state: tree of arrays or jax.ShapeDtypeStruct with the shardings to restore to. They
                may differ from those of the checkpoint.
            data: iterator that is moved to its position, or None if the step alone determines the
                data.

        Returns:
            (state, notes).

        Raises:
            UserError: if the checkpoint is of another model, optimiser, seed or frozen weights. No
                array is read then.
        """
        restored, beside = self.store.restore(state, self.seed, self.frozen)
        self._drop_metrics()  # an earlier checkpoint may have taken the place of the last one
        if data is not None:
            data.set_state(beside["position"])
        return restored, beside["notes"]

    def save(
        self,
        step: int,
        state: PyTree,
        data: BatchIterator | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a checkpoint in the background. An incomplete one is never restored.

        The metrics of its step have to be logged before, because a resumed run does not repeat it.

        Args:
            step: number of the step.
            state: tree of arrays.
            data: iterator whose position is saved.
            notes: JSON values to save.

        Raises:
            UserError: for errors of the disk, also of the checkpoint before.
        """
        position = None if data is None else data.get_state()
        beside = {"position": position, "notes": notes or {}, "seed": self.seed}
        with self.clock.paused(state):
            start = time.perf_counter()
            if self.store.save(step, state, beside | {"frozen": self.frozen}):
                self.clock.saved(step, time.perf_counter() - start)

    def log(self, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Appends a line to metrics.jsonl, and writes the metrics for TensorBoard.

        Args:
            step: number of the step.
            metrics: scalars by name. Nine digits keep float32 exactly.

        Raises:
            UserError: for errors of the disk, or if the loss is NaN or infinite.
        """
        values = {k: float(f"{float(np.asarray(v)):.9g}") for k, v in metrics.items()}
        loss = values.get("loss", 0.0)
        require(
            math.isfinite(loss),
            f"{self.folder}: the loss is {loss} at step {step}, so the training has diverged. "
            "Start anew with a smaller learning rate.",
        )
        if self.first_process:
            append_text(self.metrics_file, json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            self._events.add(step, values)

    def log_step(self, step: int, metrics: Mapping[str, ArrayLike], shown: str) -> None:
        """Logs a step with its times, also in the progress bar.

        Args:
            step: number of the step.
            metrics: scalars by name.
            shown: the one in the progress bar.

        Raises:
            UserError: as `log`.
        """
        times = self.clock.report(metrics)
        self.log(step, {**metrics, **times})
        texts = {shown: f"{float(np.asarray(metrics[shown])):.4g}"}
        if "tokens_per_second" in times:
            texts["tokens/s"] = f"{times['tokens_per_second']:,.0f}"
        if "model_flops_share" in times:
            texts["FLOPs"] = f"{times['model_flops_share']:.1%}"
        self.bar.set_postfix(texts | {"goodput": f"{times['goodput']:.1%}"})

    def metrics(self) -> list[dict[str, float]]:
        """Returns all lines of metrics so far.

        Raises:
            UserError: if a line is none of metrics.
        """
        lines = []
        for where, line in read_records(self.metrics_file):
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise UserError(f"{where}: no metrics of a step. Correct or remove the line.")
            lines.append(line)
        return lines

    def steps(self, first: int, last: int, description: str) -> Iterator[int]:
        """Counts steps behind a progress bar, until SIGTERM reaches a process.

        Args:
            first: the first step.
            last: the end of the steps, itself not included.
            description: text in front of the bar.

        Yields:
            first, first + 1, ..., last - 1.
        """

        def stop(*_: object) -> None:
            self.stopped = True

        self.clock.start(first)
        before = signal.signal(signal.SIGTERM, stop)
        self.bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            desc=description,
            dynamic_ncols=True,
            disable=not self.first_process,
        )
        try:
            with StepProfiler(self.profile) as profiler:
                yield from self._steps(last, profiler)
            if not Run.ended_early:
                self.clock.finish()
        finally:
            signal.signal(signal.SIGTERM, before)
            self.bar.close()

    def _steps(self, last: int, profiler: StepProfiler) -> Iterator[int]:
        for step in self.bar:
            with self.clock.paused(()):  # a trace is written in the seconds after its last step
                profiler.step()
            if jax.process_count() > 1:  # all processes must leave after the same step
                self.stopped = bool(
                    multihost_utils.process_allgather(np.asarray(self.stopped)).any()
                )
            yield step
            if self.stopped:
                Run.ended_early = step + 1 < last
                break

    def wait(self) -> None:
        """Waits until all checkpoints are on the disk.

        Raises:
            UserError: for errors of the disk.
        """
        self.store.wait()

    def _drop_metrics(self) -> None:
        """Removes the metrics of steps after the last checkpoint from the file."""
        if not self.first_process or not exists(self.metrics_file):
            return
        last = -1 if self.latest is None else self.latest
        kept = [m for m in self.metrics() if m["step"] <= last]
        write_atomic(self.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
