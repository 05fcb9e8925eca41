"""Runs untrusted programs in isolated, limited processes of their own and says whether they pass a task's checks.

The verdict is the harness's: a passing child must hand back a random token, which it is given just before the program
starts and keeps where Python code cannot see it. What a program prints, and how it exits, counts for nothing.
What holds a program: namespaces (no network, no process of others to see, a file system of its own, its processes
dead with it) and Landlock, each where the kernel gives it, without being root; limits and an audit hook everywhere. The
checks share an interpreter with the program, so that native code which got past the hook could still forge a pass.

Read worker.py for the parent's side, launch.py for the isolation, child.py for what runs inside.
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
from xflow_jax.sandbox.limits import FULL, Limits
from xflow_jax.sandbox.worker import WAYS, Died, NotStarted, Outcome, Worker, start

_REASONS = ("wrong answer: ", "memory limit", "syntax error: ", "error: ")


@dataclass(frozen=True)
class Result:
    """`reason`, in one line: "passed", "wrong answer: ...", "timeout", "memory limit", "output limit",
    "syntax error: ..." or "error: ..."; `output` is what was printed; `seconds` of wall clock, a cold start included;
    `isolation` is what was in force, "namespaces+landlock+limits" at best."""

    passed: bool
    reason: str
    output: str
    seconds: float
    isolation: str


class Pool:
    """Warm workers, each of which forks a fresh limited child for each program; close it, or use it in a `with`.

    A worker starts when it is first needed, and is replaced when it dies. All methods may be called from any thread.
    workers: programs at once, one for each core by default. `isolation`: as in Result. UserError where processes cannot
    be limited (Windows), and where the isolation here is below `limits.minimum`.
    """

    def __init__(self, limits: Limits = Limits(), workers: int | None = None) -> None:  # noqa: B008
        require(os.name == "posix", "the sandbox needs Linux or macOS")
        self.limits, self.workers = limits, workers or os.cpu_count() or 1
        self._slots = threading.BoundedSemaphore(self.workers)
        self._idle: list[Worker] = []
        self._closed = False
        first = self._start()
        self.isolation = first.isolation
        self._idle.append(first)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers: the idle ones now, the others after what they run."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def run(self, program: str, checks: str = "") -> Result:
        """As `run_program`, by a warm worker."""
        require(not self._closed, "the sandbox's pool is closed")
        start = time.monotonic()
        isolation, reason, output = (
            self.isolation,
            "error: the process was killed before the checks ended",
            "",
        )
        with self._slots:
            for _ in range(
                2
            ):  # a worker may have been killed from outside, by a machine out of memory for example
                worker = self._take()
                try:
                    isolation = worker.isolation
                    outcome = worker.run(program, checks, self.limits)
                except BaseException as error:
                    worker.close()  # what it still has to say belongs to this program
                    if not isinstance(error, Died):
                        raise
                else:
                    self._give_back(worker)
                    reason, output = _reason(outcome), outcome.output.decode("utf-8", "replace")
                    break
        return Result(reason == "passed", reason, output, time.monotonic() - start, isolation)

    def run_many(
        self, jobs: Sequence[tuple[str, str]], progress: Callable[[int, int], None] | None = None
    ) -> list[Result]:
        """As the function `run_many`, by warm workers."""
        with ThreadPoolExecutor(self.workers) as threads:
            runs = {job: threads.submit(self.run, *job) for job in dict.fromkeys(jobs)}
            try:
                for done, run in enumerate(as_completed(runs.values()), start=1):
                    run.result()  # raises here and now what is wrong with the harness
                    if progress is not None:
                        progress(done, len(runs))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        return [runs[job].result() for job in jobs]

    def _take(self) -> Worker:
        with contextlib.suppress(IndexError):
            while True:
                worker = self._idle.pop()
                if worker.alive():
                    return worker
                worker.close()
        return self._start()

    def _give_back(self, worker: Worker) -> None:
        if not worker.alive():
            worker.close()
            return
        self._idle.append(worker)
        if self._closed:  # meanwhile
            self.close()

    def _start(self) -> Worker:
        worker = _start(self.limits.files * self.limits.file_bytes)
        missing = set(self.limits.minimum.split("+")) - set(worker.isolation.split("+"))
        if missing:
            worker.close()
        require(
            not missing,
            f"the sandbox has only {worker.isolation} here, which is below its minimum of {self.limits.minimum}: allow"
            " user namespaces, install bubblewrap, or lower the minimum",
        )
        return worker


def run_program(program: str, checks: str = "", limits: Limits = Limits()) -> Result:  # noqa: B008
    """Runs `program`, untrusted source, and then `checks`, the task's source, in one child, by the program's names.

    Passes only if both run to their end; an AssertionError that the checks themselves raise is a wrong answer.
    `__name__` is "program", so a main guard does not run. Builtins, and the modules that the checks name, are for them
    as before the program; a program's name hides a builtin one only from checks that use no other name of it. `==` asks
    the answer's own `__eq__`: checks that want to be sure compare types too. UserError as of Pool, the quick way to run
    many.
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
    """The results of (program, checks) pairs, in their order; equal pairs run once and share one result.

    workers: children at once, one for each core by default. progress(done, total) is called after each run.
    """
    if not jobs:
        return []
    with Pool(limits, workers) as pool:
        return pool.run_many(jobs, progress)


_detecting = threading.Lock()


_ways = WAYS  # of isolation that may work here: only the best one that does, once one did


def _start(scratch_bytes: int) -> Worker:
    """A worker in the best isolation that there is here, with one warning in the process where that is not all."""
    global _ways
    with _detecting if len(_ways) > 1 else contextlib.nullcontext():
        try:
            started = start(scratch_bytes, _ways)
        except NotStarted as error:
            raise UserError(f"the sandbox cannot start a process: {error}") from None
        first, _ways = len(_ways) > 1, (started.way,)
    if first and started.isolation != FULL:
        less = f"the sandbox is not fully isolated: {started.isolation} instead of {FULL}"
        warnings.warn(f"{less}{started.why and f' ({started.why})'}", RuntimeWarning, stacklevel=4)
    return started


def _reason(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if outcome.cut == "output limit" or not verdict:
        return outcome.cut
    if verdict == outcome.token:
        return "passed"
    reason = "".join(c if c.isprintable() else " " for c in verdict.decode("utf-8", "replace"))
    return (
        reason
        if reason.startswith(_REASONS)
        else "error: the program wrote where only the harness may"
    )
