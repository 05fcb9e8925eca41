"""Pool of isolated, limited processes that run untrusted programs.

A child that passes must return a random token. It receives the token just before the program
starts, and keeps it out of reach of Python code. The program's output and exit code do not count.
Namespaces and Landlock isolate a program if the kernel has them, without root. Namespaces give it
no network, no view of other processes and a file system of its own, and its processes end with it.
Limits and an audit hook apply everywhere. The checks share an interpreter with the program, so
native code that got past the hook could still forge a pass.

worker.py has the parent's side, launch.py the isolation, and child.py the code inside.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from xflow_jax.errors import UserError, require
from xflow_jax.sandbox.limits import FULL_ISOLATION, Limits
from xflow_jax.sandbox.worker import (
    ISOLATION_METHODS,
    Outcome,
    StartError,
    Worker,
    WorkerDied,
    start_worker,
)

_REASONS = ("wrong answer: ", "memory limit", "syntax error: ", "error: ")


@dataclass(frozen=True)
class Result:
    """Verdict on one program.

    Attributes:
        passed: True if the program and its checks ran to their end.
        reason: one line: "passed", "wrong answer: ...", "timeout", "memory limit", "output limit",
            "syntax error: ..." or "error: ...".
        output: the printed text, of both stdout and stderr.
        seconds: wall-clock time, including a cold start.
        isolation: the isolation in force, "namespaces+landlock+limits" at best.
    """

    passed: bool
    reason: str
    output: str
    seconds: float
    isolation: str


class Pool:
    """Warm workers, each of which forks a fresh limited child per program.

    A worker starts on first use and is replaced if it dies. All methods are thread-safe. Close the
    pool, or use it as a context manager.

    Args:
        limits: limits of each program.
        workers: programs at once. None takes one for each core.

    Attributes:
        isolation: the isolation in force, as in Result.

    Raises:
        UserError: processes cannot be limited (Windows), or the isolation on this machine is below
            `limits.minimum`.
    """

    def __init__(self, limits: Limits = Limits(), workers: int | None = None) -> None:  # noqa: B008
        require(os.name == "posix", "the sandbox needs Linux or macOS")
        self.limits, self.workers = limits, workers or os.cpu_count() or 1
        self._slots = threading.BoundedSemaphore(self.workers)
        self._idle: list[Worker] = []
        self._closed = False
        first = self._start_worker()
        self.isolation = first.isolation
        self._idle.append(first)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers now, and the others after their program."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def run(self, program: str, checks: str = "") -> Result:
        """Runs a program and its checks in a warm worker, like `run_program`."""
        require(not self._closed, "the sandbox's pool is closed")
        start = time.monotonic()
        isolation, output = self.isolation, ""
        reason = "error: the process was killed before the checks ended"
        with self._slots:
            # Twice, since the system may have killed a worker, for example for lack of memory.
            for _ in range(2):
                worker = self._take_worker()
                try:
                    isolation = worker.isolation
                    outcome = worker.run(program, checks, self.limits)
                except BaseException as error:
                    worker.close()  # its unread messages belong to this program
                    if not isinstance(error, WorkerDied):
                        raise
                else:
                    self._give_back(worker)
                    reason, output = _reason_of(outcome), outcome.output.decode("utf-8", "replace")
                    break
        return Result(reason == "passed", reason, output, time.monotonic() - start, isolation)

    def run_many(
        self, jobs: Sequence[tuple[str, str]], progress: Callable[[int, int], None] | None = None
    ) -> list[Result]:
        """Runs many programs in the warm workers, like the function `run_many`."""
        with ThreadPoolExecutor(self.workers) as threads:
            runs = {job: threads.submit(self.run, *job) for job in dict.fromkeys(jobs)}
            try:
                for done, run in enumerate(as_completed(runs.values()), start=1):
                    run.result()  # raises errors of the sandbox itself at once
                    if progress is not None:
                        progress(done, len(runs))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        return [runs[job].result() for job in jobs]

    def _take_worker(self) -> Worker:
        with contextlib.suppress(IndexError):
            while True:
                worker = self._idle.pop()
                if worker.is_usable():
                    return worker
                worker.close()
        return self._start_worker()

    def _give_back(self, worker: Worker) -> None:
        if not worker.is_usable():
            worker.close()
            return
        self._idle.append(worker)
        if self._closed:  # closed while the worker ran
            self.close()

    def _start_worker(self) -> Worker:
        worker = _start_best(self.limits.files * self.limits.file_bytes)
        missing = set(self.limits.minimum.split("+")) - set(worker.isolation.split("+"))
        if missing:
            worker.close()
        require(
            not missing,
            f"the sandbox has only {worker.isolation} here, "
            f"which is below its minimum of {self.limits.minimum}: "
            "allow user namespaces, install bubblewrap, or lower the minimum",
        )
        return worker


def run_program(program: str, checks: str = "", limits: Limits = Limits()) -> Result:  # noqa: B008
    """Runs an untrusted program and its checks in one child.

    A Pool is faster for many programs. A program passes only if both run to their end. An
    AssertionError that the checks themselves raise is a wrong answer. `__name__` is "program", so a
    main guard does not run. Before the checks, builtins and the modules that they name are
    restored. A name of the program hides a builtin only from checks that use no other name of the
    program. `==` calls the answer's own `__eq__`, so strict checks compare types too.

    Args:
        program: untrusted Python source.
        checks: trusted Python source that uses the program's names.
        limits: limits of the child.

    Raises:
        UserError: see Pool.
    """
    start = time.monotonic()
    with Pool(limits, 1) as pool:
        result = pool.run(program, checks)
    return replace(result, seconds=time.monotonic() - start)


def run_many(
    jobs: Sequence[tuple[str, str]],
    limits: Limits = Limits(),  # noqa: B008
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Runs (program, checks) pairs and returns their results in order.

    Equal pairs run once and share one result.

    Args:
        jobs: (program, checks) pairs.
        limits: limits of each child.
        workers: children at once. None takes one for each core.
        progress: called as progress(done, total) after each run.

    Raises:
        UserError: see Pool.
    """
    if not jobs:
        return []
    with Pool(limits, workers) as pool:
        return pool.run_many(jobs, progress)


_detection_lock = threading.Lock()
# Isolation methods that may work here. After the first start, only the one that worked.
_methods: tuple[str, ...] = ISOLATION_METHODS


def _start_best(scratch_bytes: int) -> Worker:
    """Starts a worker in the best isolation of this machine.

    Warns once in a process if that is not the full isolation.
    """
    global _methods
    with _detection_lock if len(_methods) > 1 else contextlib.nullcontext():
        try:
            worker = start_worker(scratch_bytes, _methods)
        except StartError as error:
            raise UserError(f"the sandbox cannot start a process: {error}") from None
        first, _methods = len(_methods) > 1, (worker.method,)
    if first and worker.isolation != FULL_ISOLATION:
        instead = f"{worker.isolation} instead of {FULL_ISOLATION}"
        reasons = worker.failures and f" ({worker.failures})"
        warnings.warn(
            f"the sandbox is not fully isolated: {instead}{reasons}", RuntimeWarning, stacklevel=4
        )
    return worker


def _reason_of(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if outcome.stop_reason == "output limit" or not verdict:
        return outcome.stop_reason
    if verdict == outcome.token:
        return "passed"
    reason = "".join(c if c.isprintable() else " " for c in verdict.decode("utf-8", "replace"))
    if reason.startswith(_REASONS):
        return reason
    return "error: the program wrote to the channel of the verdict"
