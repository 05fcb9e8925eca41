"""Worker of the sandbox: the parent's side of a zygote (child.py)."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import secrets
import selectors
import shutil
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

from xflow_jax.sandbox.limits import Limits

_MAX_VERDICT_BYTES = 2000
_SYSTEM_TIMEOUT = 60.0  # seconds for the machine to start a process or to end a killed one
_FOLDERS = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
)
_DEVICES = (os.devnull, "/dev/urandom")
_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo", *_DEVICES)

# Ways to isolate a process, the best first. "bare" goes without Landlock. It is for interpreters
# whose libraries lie in a place that `readable_paths` does not know, so that even "plain" fails.
ISOLATION_METHODS = ("unshare", "bubblewrap", "plain", "bare")


class StartError(Exception):
    """A zygote cannot start. The text is the reason."""


class WorkerDied(Exception):
    """The zygote has ended, and the program that it ran too."""


@dataclass(frozen=True)
class Outcome:
    """Raw result of one program.

    Attributes:
        verdict: bytes that the child wrote to the channel.
        token: the verdict if all checks pass.
        output: bytes that were printed.
        stop_reason: the reason to report if there is no verdict. "output limit" takes precedence
            over a verdict.
    """

    verdict: bytes
    token: bytes
    output: bytes
    stop_reason: str


def interpreter_command() -> list[str]:
    """Returns the command of an isolated Python interpreter.

    It is the one behind the links of a virtual environment. The flags isolate it like -I -S, except
    that it reads PYTHONHASHSEED.
    """
    return [
        os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
        "-P",
        "-s",
        "-S",
        "-B",
    ]


def readable_paths() -> list[str]:
    """Returns the existing paths that a program may read.

    These are the interpreter, its standard library, the libraries of both, and time zones.
    """
    homes = [
        f"{prefix}/{lib}"
        for prefix in (sys.base_prefix, sys.base_exec_prefix)
        for lib in ("lib", "lib64")
    ]
    paths = [interpreter_command()[0], os.path.dirname(os.__file__), *homes, *_FOLDERS, *_FILES]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def find_bubblewrap() -> str | None:
    """Returns the path of bubblewrap, or None if it is not installed."""
    return shutil.which("bwrap")


def launch_command(
    method: str, landlock: bool, scratch: str, scratch_bytes: int, control: int
) -> list[str]:
    """Returns the command that isolates another command.

    The other command follows as its last arguments.

    Args:
        method: one of ISOLATION_METHODS.
        landlock: True to use Landlock if the kernel has it.
        scratch: an empty folder, the only one that may be written.
        scratch_bytes: size of the folder's file system.
        control: descriptor for error messages, inherited by the command.
    """
    spec = {
        "method": {"bubblewrap": "inside", "bare": "plain"}.get(method, method),
        "landlock": landlock,
        "readable": readable_paths(),
        "scratch": scratch,
        "scratch_bytes": scratch_bytes,
        "control": control,
    }
    command = [
        *interpreter_command(),
        "-c",
        Path(__file__).with_name("launch.py").read_text(),
        json.dumps(spec),
    ]
    if method != "bubblewrap":
        return command
    mounted = sorted({*readable_paths(), *map(os.path.realpath, readable_paths())})
    return [
        find_bubblewrap() or "bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1",
        "--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534",
        *(part for path in mounted for part in ("--ro-bind", os.path.realpath(path), path)),
        *(part for path in _DEVICES for part in ("--dev-bind", path, path)),
        "--size", str(scratch_bytes), "--tmpfs", scratch, "--remount-ro", "/", "--", *command,
    ]  # fmt: skip


class Worker:
    """One warm zygote with its folder, for one program at a time.

    Attributes:
        method: the isolation method, one of ISOLATION_METHODS.
        isolation: the isolation in force, a part of FULL_ISOLATION.
        failures: the better methods with the reasons why they failed.
        close: ends the zygote and removes the folder.

    Raises:
        StartError: the method does not work on this machine.
    """

    def __init__(self, method: str, scratch_bytes: int) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="xflow-sandbox-", ignore_cleanup_errors=True
        )
        self.control, theirs = socket.socketpair()
        scratch = os.path.realpath(self.folder.name)
        command = [
            *launch_command(method, method != "bare", scratch, scratch_bytes, theirs.fileno()),
            *interpreter_command(), "-c", Path(__file__).with_name("child.py").read_text(),
            str(theirs.fileno()), scratch,
        ]  # fmt: skip
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
                self.folder.cleanup()
                raise StartError(str(error)) from None
        self.close = weakref.finalize(
            self, _end_worker, os.getpid(), self.process, self.control, self.folder
        )
        self.control.settimeout(_SYSTEM_TIMEOUT)
        try:
            hello = self.control.recv(4096).decode()
        except OSError as error:
            hello = json.dumps(str(error))
        if not hello or hello.startswith('"'):
            self.close()
            raise StartError(json.loads(hello or '"it ended at once"'))
        self.method, self.isolation, self.failures = method, hello, ""

    def run(self, program: str, checks: str, limits: Limits) -> Outcome:
        """Runs a program and its checks.

        Raises:
            WorkerDied: the zygote ended meanwhile. The worker cannot be used again.
        """
        deadline, token = time.monotonic() + limits.seconds, secrets.token_bytes(32)
        job = marshal.dumps((program, checks, limits.resources(), limits.files))
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        with ours, open(read_end, "rb", buffering=0) as output:
            with theirs, open(write_end, "wb", buffering=0) as printed:
                self.send(b"r", [printed.fileno(), theirs.fileno()])
            ours.settimeout(limits.seconds)
            # A child that has ended causes these errors.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                ours.sendall(len(job).to_bytes(8, "little") + job)
                ours.sendall(token)  # by itself, since so short a message arrives whole
            return _wait_for_outcome(self, ours, output, deadline, limits.output_bytes, token)

    def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends a command to the zygote.

        b"r" with two descriptors runs a program, b"k" ends it.
        """
        try:
            socket.send_fds(self.control, [message], descriptors)
        except OSError:
            raise WorkerDied from None

    def is_usable(self) -> bool:
        """Returns True if the worker can run another program.

        It cannot if the zygote has ended, or if a process of the last program escaped from it.
        """
        if not self.close.alive or self.process.poll() is not None:
            return False
        with contextlib.suppress(OSError):  # some kernels have no such file
            task = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
            return len(Path(task).read_text().split()) <= 1
        return True


def _end_worker(
    owner: int,
    process: subprocess.Popen[bytes],
    control: socket.socket,
    folder: tempfile.TemporaryDirectory[str],
) -> None:
    """Ends a worker, whose zygote ends once its control closes."""
    control.close()
    if os.getpid() != owner:  # a fork of this process does not own the worker
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        # macOS raises PermissionError for a group whose processes have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    folder.cleanup()


def _wait_for_outcome(
    worker: Worker,
    ours: socket.socket,
    output: FileIO,
    deadline: float,
    max_output: int,
    token: bytes,
) -> Outcome:
    """Reads verdict and output until the child has ended.

    Ends the child at the deadline or above `max_output` bytes. Raises WorkerDied if the zygote
    ends.
    """
    verdict, printed, stop_reason, answer = b"", b"", "", b""
    stopped_at = 0.0  # time of the command that ends the program
    ours.setblocking(False)
    os.set_blocking(output.fileno(), False)
    with selectors.DefaultSelector() as selector:
        for source in (output, ours, worker.control):
            selector.register(source, selectors.EVENT_READ)
        while len(answer) < 5:
            now = time.monotonic()
            if not stop_reason and (now >= deadline or len(printed) > max_output):
                stop_reason = "output limit" if len(printed) > max_output else "timeout"
                stopped_at = now
                worker.send(b"k")
                # The program may have stopped the zygote by a signal.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.process.pid, signal.SIGCONT)
            if stop_reason and now - stopped_at > _SYSTEM_TIMEOUT:
                worker.close()
                raise WorkerDied
            timeout = stopped_at + _SYSTEM_TIMEOUT - now if stop_reason else deadline - now
            for key, _ in selector.select(timeout):
                if key.fileobj is worker.control:
                    data = _read_available(worker.control.fileno())
                    if not data:
                        raise WorkerDied
                    answer += data
                elif not (data := _read_available(key.fd)):
                    selector.unregister(key.fileobj)
                elif key.fileobj is ours:
                    verdict = (verdict + data)[:_MAX_VERDICT_BYTES]
                elif not stop_reason:
                    printed += data
    # All processes have ended, but their last bytes may be unread.
    while len(verdict) < _MAX_VERDICT_BYTES and (data := _read_available(ours.fileno())):
        verdict += data
    while len(printed) <= max_output and (data := _read_available(output.fileno())):
        printed += data
    status, clean = struct.unpack("=i?", answer)
    if not clean:
        worker.close()
    if len(printed) > max_output:
        stop_reason = "output limit"
    elif not stop_reason:
        stop_reason = _describe_exit(os.waitstatus_to_exitcode(status))
    return Outcome(verdict, token, printed[:max_output], stop_reason)


def _read_available(descriptor: int) -> bytes:
    """Reads the available bytes, b"" at the end or without any."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        return os.read(descriptor, 1 << 16)
    return b""


def _describe_exit(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "timeout"
    how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
    return f"error: the process {how} before the checks ended"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no name
        return signal.Signals(number).name
    return f"signal {number}"


def start_worker(scratch_bytes: int, methods: Sequence[str] = ISOLATION_METHODS) -> Worker:
    """Starts a worker by the first method that works.

    Args:
        scratch_bytes: size of its folder's file system.
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
            worker = Worker(method, scratch_bytes)
            worker.failures = "; ".join(failures)
            return worker
        except StartError as error:
            failures.append(f"{method}: {error}")
    raise StartError("; ".join(failures))
