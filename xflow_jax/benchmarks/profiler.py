"""Traces of jax.profiler, which xprof and Perfetto open."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from xflow_jax.checkpoints import make_directory
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import is_cloud, to_path, upload

STEPS = 3  # of a trace
FIRST = 2  # steps before it, in which programs are compiled


class StepProfiler:
    """Traces steps of a program behind those that compile.

    It is a context manager.

    Args:
        option: "DIR" or "DIR:STEPS", or empty for no trace.

    Raises:
        UserError: for a place that cannot be one.
    """

    def __init__(self, option: str):
        self.folder, self.steps = parse_profile(option)
        self._count = 0
        self._stack = contextlib.ExitStack()

    def step(self) -> None:
        """Counts a step that begins."""
        if self.folder is None:
            return
        if self._count == FIRST:
            self._stack.enter_context(trace(self.folder))
        if self._count == FIRST + self.steps:
            self._stack.close()
        self._count += 1

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def profile_calls(option: str | None, call: Callable[[], object]) -> None:
    """Traces calls of a function whose programs are compiled.

    Args:
        option: "DIR" or "DIR:CALLS" for 3 or CALLS of them, or None for no trace.
        call: the function.

    Raises:
        UserError: as StepProfiler.
    """
    folder, calls = parse_profile(option or "")
    if folder is not None:
        with trace(folder):
            for _ in range(calls):
                call()


def parse_profile(option: str) -> tuple[Path | None, int]:
    """Parses "DIR" or "DIR:STEPS".

    Returns:
        (folder or None, number of steps).

    Raises:
        UserError: for a place that cannot be one, or for no steps.
    """
    if not option:
        return None, STEPS
    match = re.fullmatch(r"(.+?)(?::([0-9]{1,6}))?", option)
    if match is None or match[2] is not None and int(match[2]) < 1:
        raise UserError(f"profile is {option!r}, but it must be DIR or DIR:STEPS")
    return to_path(match[1]), int(match[2] or STEPS)


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Writes a trace of the block.

    Args:
        folder: the folder, on a disk or in object storage. Each trace has a folder of its own in
            it, plugins/profile/TIME.

    Raises:
        UserError: if it cannot be written.
    """
    with disk_errors(folder), contextlib.ExitStack() as stack:
        local = folder
        if is_cloud(folder):  # the profiler writes to disks
            temporary = tempfile.TemporaryDirectory(prefix="xflow-profile-")
            local = to_path(stack.enter_context(temporary))
        make_directory(local)
        with jax.profiler.trace(str(local)):
            yield
        if local is not folder:
            for file in local.rglob("*"):
                if file.is_file():
                    upload(file, folder / file.relative_to(local))
