"""Pool of isolated, limited processes that run untrusted programs.

A program runs alone. Its process never holds the checks, their expected values or a channel for a
verdict: it only answers calls. A second process, the judge, evaluates the checks, in which the
names of the program are stubs. Values cross in an encoding of exact builtin types.

Namespaces and Landlock isolate both processes if the kernel has them, without root. Namespaces give
no network, no view of other processes and a file system of its own, and the processes end with
them. A filter of system calls (seccomp) forbids everything that a calculation does not need. Limits
and an audit hook apply everywhere.

commands.py has the commands of the processes, worker.py the parent's side, and launch.py the
isolation. The code inside is zygote.py, program.py and judge.py.
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
from xflow_jax.sandbox.commands import ISOLATION_METHODS
from xflow_jax.sandbox.limits import FULL_ISOLATION, Limits
from xflow_jax.sandbox.worker import Outcome, StartError, Worker, WorkerDied, start_worker

SAME_INTERPRETER = "passed in the same interpreter"
_FORGED = "error: the program sent bytes that are no answer to a call"


@dataclass(frozen=True)
class Result:
    """Verdict on one program.

    Attributes:
        passed: True if the program and its checks ran to their end.
        reason: one line: "passed", "passed in the same interpreter", "wrong answer: ...",
            "timeout", "memory limit", "output limit", "syntax error: ..." or "error: ...".
        output: the printed text, of both stdout and stderr.
        seconds: wall-clock time, including a cold start.
        isolation: the isolation in force, "namespaces+landlock+seccomp+limits" at best. "cgroup"
            is a part of it if the system has delegated control groups.
        same_interpreter: True if the checks ran in the program's process, because they need more
            than calls with plain values. A hostile program can forge such a pass.
    """

    passed: bool
    reason: str
    output: str
    seconds: float
    isolation: str
    same_interpreter: bool = False


class Pool:
    """Warm workers, each of which forks two fresh limited children per program.

    A worker starts on first use. It is replaced if it dies, after 256 programs, and after a program
    that broke the protocol or its interpreter, or left something behind. All methods are
    thread-safe. Close the pool, or use it as a context manager.

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
                    reason, output = _reason_of(outcome), outcome.output.decode("utf-8", "replace")
                    if reason == _FORGED:
                        worker.close()
                    self._give_back(worker)
                    break
        passed, there = reason in ("passed", SAME_INTERPRETER), reason == SAME_INTERPRETER
        return Result(passed, reason, output, time.monotonic() - start, isolation, there)

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
        worker = _start_best(self.limits)
        if not self.limits.is_met_by(worker.isolation):
            worker.close()
            raise UserError(
                f"the sandbox has only {worker.isolation} here, which is below its minimum of "
                f"{self.limits.minimum or 'namespaces or landlock'}: allow user namespaces, "
                'install bubblewrap, or lower the minimum, as in Limits(minimum="limits")'
            )
        return worker


def run_program(program: str, checks: str = "", limits: Limits = Limits()) -> Result:  # noqa: B008
    """Runs an untrusted program, and its checks in another process.

    A Pool is faster for many programs. A program passes only if both run to their end. An
    AssertionError that the checks themselves raise is a wrong answer. `__name__` is "program", so a
    main guard does not run.

    In the checks, the names that they do not define are the program's. Constants have their plain
    value, and modules are the judge's own. Calls of functions and methods run in the program's
    process, and arguments that change there change here. Results are None, bool, int, float,
    complex, str, bytes, list, tuple, dict, set or frozenset. Instances of their subclasses and
    numbers of numpy become these types. Other objects stay in the program's process. They can be
    called and iterated, have attributes, and equal only themselves. A name of the program hides a
    builtin only from checks that use no other name of the program.

    The checks run in the program's process if they pass a function or object of their own to it,
    or use a name of the program in `except`, `isinstance`, `with` or as a base class. Then
    `Result.same_interpreter` is True.

    Args:
        program: untrusted Python source.
        checks: trusted Python source that uses the program's names.
        limits: limits of each of the two processes.

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


def _start_best(limits: Limits) -> Worker:
    """Starts a worker in the best isolation of this machine.

    Warns once in a process if that is not the full isolation. Only a minimum that allows it leads
    to the method "bare".
    """
    global _methods
    bare = limits.minimum == "limits"
    with _detection_lock if len(_methods) > 1 else contextlib.nullcontext():
        allowed = [method for method in _methods if bare or method != "bare"]
        if not allowed:  # an earlier pool allowed it
            allowed = [method for method in ISOLATION_METHODS if method != "bare"]
        try:
            worker = start_worker(limits, allowed)
        except StartError as error:
            raise UserError(f"the sandbox cannot start a process: {error}") from None
        first, _methods = len(_methods) > 1, (worker.method,)
    if first and set(FULL_ISOLATION.split("+")) - set(worker.isolation.split("+")):
        instead = f"{worker.isolation} instead of {FULL_ISOLATION}"
        reasons = worker.failures and f" ({worker.failures})"
        warnings.warn(
            f"the sandbox is not fully isolated: {instead}{reasons}", RuntimeWarning, stacklevel=4
        )
    return worker


def _reason_of(outcome: Outcome) -> str:
    kind, text = outcome.verdict[:1], outcome.verdict[1:].decode("utf-8", "replace")
    if outcome.stop_reason == "output limit" or kind not in (b"P", b"T", b"F", b"M"):
        return outcome.stop_reason
    if kind in (b"P", b"T"):
        return "passed" if kind == b"P" else SAME_INTERPRETER
    if kind == b"M":
        return _FORGED
    return "".join(c if c.isprintable() else " " for c in text)
