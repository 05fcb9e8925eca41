"""Worker of the sandbox: the parent's side of its two zygotes."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from xflow_jax.sandbox import cgroup
from xflow_jax.sandbox.commands import (
    find_bubblewrap,
    launch_command,
    library_folders,
    zygote_command,
)
from xflow_jax.sandbox.limits import Limits

MAX_RUNS = 256  # programs of one worker, before fresh zygotes take over
_MAX_VERDICT_BYTES = 2000
_SYSTEM_TIMEOUT = 60.0  # seconds for the machine to start a process or to end a killed one
_JOB_SIZE = struct.Struct("<I")
# Exit codes of programs that broke their interpreter, after which fresh zygotes take over.
_DOUBTFUL = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGSYS}


class StartError(Exception):
    """A zygote cannot start. The text is the reason."""


class WorkerDied(Exception):
    """A zygote has ended, and the program that it ran too."""


@dataclass(frozen=True)
class Outcome:
    """Raw result of one program.

    Attributes:
        verdict: bytes that the judge wrote, b"" if there are none.
        output: bytes that the program printed.
        stop_reason: the reason to report if there is no verdict. "output limit" takes precedence
            over a verdict.
    """

    verdict: bytes
    output: bytes
    stop_reason: str


class Zygote:
    """One isolated zygote process.

    Attributes:
        control: connection with it.
        process: its outermost process.

    Args:
        role: "program" or "judge".
        method: the isolation method, one of ISOLATION_METHODS.
        scratch: an empty folder that its children may write.
        limits: limits of the programs.

    Raises:
        StartError: the process cannot be created.
    """

    def __init__(self, role: str, method: str, scratch: str, limits: Limits) -> None:
        self.control, theirs = socket.socketpair()
        libraries = library_folders(limits.libraries)
        group = cgroup.create(limits)
        command = [
            *launch_command(
                method,
                scratch,
                limits.files * limits.file_bytes,
                theirs.fileno(),
                libraries,
                group,
            ),
            *zygote_command(role, scratch, theirs.fileno(), libraries),
        ]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if method == "bubblewrap" else None,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                self.control.close()
                cgroup.remove(group)
                raise StartError(str(error)) from None
        self.close = weakref.finalize(
            self, _end_zygote, os.getpid(), self.process, self.control, group
        )
        self.control.settimeout(_SYSTEM_TIMEOUT)

    def wait_until_ready(self) -> str:
        """Waits for the first message, and returns the isolation in force.

        Raises:
            StartError: the process cannot isolate itself.
        """
        try:
            hello = self.control.recv(4096).decode()
        except OSError as error:
            hello = json.dumps(str(error))
        if not hello or hello.startswith('"'):
            raise StartError(json.loads(hello or '"it ended at once"'))
        return hello

    def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends a command.

        b"r" with two descriptors runs a child, b"k" ends it.
        """
        try:
            socket.send_fds(self.control, [message], descriptors)
        except OSError:
            raise WorkerDied from None

    def stop_child(self) -> None:
        """Ends the child."""
        self.send(b"k")
        # The program may have stopped the zygote by a signal.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGCONT)

    def is_clean(self) -> bool:
        """Returns True if the zygote lives and no child escaped from it."""
        if not self.close.alive or self.process.poll() is not None:
            return False
        with contextlib.suppress(OSError):  # some kernels have no such file
            task = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
            return len(Path(task).read_text().split()) <= 1
        return True


class Worker:
    """Two warm zygotes with their folders, for one program at a time.

    Attributes:
        method: the isolation method, one of ISOLATION_METHODS.
        isolation: the isolation in force, as in Result.
        failures: the better methods with the reasons why they failed.
        programs, judges: the two zygotes.

    Raises:
        StartError: the method does not work on this machine.
    """

    def __init__(self, method: str, limits: Limits) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="xflow-sandbox-", ignore_cleanup_errors=True
        )
        self.method, self.failures, self.runs = method, "", 0
        zygotes: list[Zygote] = []
        try:
            for role in ("program", "judge"):
                scratch = os.path.join(os.path.realpath(self.folder.name), role)
                os.mkdir(scratch, 0o700)
                zygotes.append(Zygote(role, method, scratch, limits))
            self.isolation = [zygote.wait_until_ready() for zygote in zygotes][0]
        except StartError:
            _end_worker(os.getpid(), zygotes, self.folder)
            raise
        self.programs, self.judges = zygotes
        self.close = weakref.finalize(self, _end_worker, os.getpid(), zygotes, self.folder)

    def run(self, program: str, checks: str, limits: Limits) -> Outcome:
        """Runs a program and its checks.

        Raises:
            WorkerDied: a zygote ended meanwhile. The worker cannot be used again.
        """
        deadline = time.monotonic() + limits.seconds
        self.runs += 1
        job = marshal.dumps((program, checks, limits.resources(), limits.files, limits.processes))
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        with ours, open(read_end, "rb", buffering=0) as output:
            first, second = socket.socketpair()
            with theirs, first, second, open(write_end, "wb", buffering=0) as printed:
                self.programs.send(b"r", [printed.fileno(), first.fileno()])
                self.judges.send(b"r", [second.fileno(), theirs.fileno()])
            ours.settimeout(limits.seconds)
            # A judge that has ended causes these errors.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                ours.sendall(_JOB_SIZE.pack(len(job)) + job)
            return _Run(self, ours, output, deadline, limits.output_bytes).wait()

    def is_usable(self) -> bool:
        """Returns True if the worker can run another program."""
        return (
            self.close.alive
            and self.runs < MAX_RUNS
            and self.programs.is_clean()
            and self.judges.is_clean()
        )


def _end_zygote(
    owner: int, process: subprocess.Popen[bytes], control: socket.socket, group: str
) -> None:
    """Ends a zygote, which ends by itself once its control closes."""
    control.close()
    if os.getpid() != owner:  # a fork of this process does not own the zygote
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        # macOS raises PermissionError for a group whose processes have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    cgroup.remove(group)


def _end_worker(
    owner: int, zygotes: Sequence[Zygote], folder: tempfile.TemporaryDirectory[str]
) -> None:
    for zygote in zygotes:
        zygote.close()
    if os.getpid() == owner:
        folder.cleanup()


class _Run:
    """Reads verdict and output of one program until both children end.

    Args:
        worker: the worker that runs the program.
        verdict: connection with the judge.
        output: what the program prints.
        deadline: time.monotonic() at which both children are ended.
        max_output: bytes of output above which both are ended.
    """

    def __init__(
        self,
        worker: Worker,
        verdict: socket.socket,
        output: FileIO,
        deadline: float,
        max_output: int,
    ) -> None:
        self._worker, self._deadline, self._max_output = worker, deadline, max_output
        self._source, self._output = verdict, output
        self._verdict, self._printed, self._stop_reason = b"", b"", ""
        self._answers = {worker.programs: b"", worker.judges: b""}
        self._stopped_at = 0.0  # time of the command that ends the children

    def wait(self) -> Outcome:
        """Returns the outcome.

        Raises:
            WorkerDied: a zygote ended.
        """
        self._source.setblocking(False)
        os.set_blocking(self._output.fileno(), False)
        with selectors.DefaultSelector() as selector:
            for source in (self._output, self._source):
                selector.register(source, selectors.EVENT_READ, source)
            for zygote in self._answers:
                selector.register(zygote.control, selectors.EVENT_READ, zygote)
            while any(len(answer) < 5 for answer in self._answers.values()):
                for key, _ in selector.select(self._time_left()):
                    if not self._read(key.data, key.fd):
                        selector.unregister(key.fileobj)
        return self._outcome()

    def _time_left(self) -> float:
        """Returns the time to wait, and ends the children above a limit."""
        now = time.monotonic()
        if self._stop_reason:
            if now - self._stopped_at > _SYSTEM_TIMEOUT:
                self._worker.close()
                raise WorkerDied
            return self._stopped_at + _SYSTEM_TIMEOUT - now
        if now < self._deadline and len(self._printed) <= self._max_output:
            return self._deadline - now
        self._stop_reason = "output limit" if now < self._deadline else "timeout"
        self._stopped_at = now
        for zygote, answer in self._answers.items():
            if not answer:
                zygote.stop_child()
        return _SYSTEM_TIMEOUT

    def _read(self, source: Zygote | socket.socket | FileIO, descriptor: int) -> bytes:
        """Reads what a source has. Returns b"" at its end."""
        data = _read_available(descriptor)
        if isinstance(source, Zygote):
            if not data:
                raise WorkerDied
            self._answers[source] += data
            # The program has nothing more to answer once its judge has ended.
            if source is self._worker.judges and not self._answers[self._worker.programs]:
                self._worker.programs.stop_child()
        elif source is self._source:
            self._verdict = (self._verdict + data)[:_MAX_VERDICT_BYTES]
        elif not self._stop_reason:
            self._printed += data
        return data

    def _outcome(self) -> Outcome:
        # All processes have ended, but their last bytes may be unread.
        while len(self._verdict) < _MAX_VERDICT_BYTES and (
            data := _read_available(self._source.fileno())
        ):
            self._verdict += data
        while len(self._printed) <= self._max_output and (
            data := _read_available(self._output.fileno())
        ):
            self._printed += data
        answers = [struct.unpack("=i?", answer) for answer in self._answers.values()]
        codes = [os.waitstatus_to_exitcode(status) for status, _ in answers]
        if not all(clean for _, clean in answers) or _DOUBTFUL.intersection(codes):
            self._worker.close()
        if len(self._printed) > self._max_output:
            self._stop_reason = "output limit"
        elif not self._stop_reason:
            self._stop_reason = _describe_exits(*codes)
        return Outcome(self._verdict, self._printed[: self._max_output], self._stop_reason)


def _read_available(descriptor: int) -> bytes:
    """Reads the available bytes, b"" at the end or without any."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        return os.read(descriptor, 1 << 16)
    return b""


def _describe_exits(program: int, judge: int) -> str:
    """Describes, by the exit codes of both children, why no verdict came."""
    if -signal.SIGXCPU in (program, judge):
        return "timeout"
    if judge != 0:
        return f"error: the process of the checks {_describe_exit(judge)}"
    return f"error: the process {_describe_exit(program)} before the checks ended"


def _describe_exit(code: int) -> str:
    return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no name
        return signal.Signals(number).name
    return f"signal {number}"


def start_worker(limits: Limits, methods: Sequence[str]) -> Worker:
    """Starts a worker by the first method that works.

    Args:
        limits: limits of its programs.
        methods: isolation methods, the best first.

    Raises:
        StartError: no method works. The text has the reason of each.
    """
    failures: list[str] = []
    for method in methods:
        if (method == "unshare" and sys.platform != "linux") or (
            method == "bubblewrap" and not find_bubblewrap()
        ):
            continue
        try:
            worker = Worker(method, limits)
            worker.failures = "; ".join(failures)
            return worker
        except StartError as error:
            failures.append(f"{method}: {error}")
    raise StartError("; ".join(failures))
