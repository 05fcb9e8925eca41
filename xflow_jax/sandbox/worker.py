"""The parent's side of one zygote (child.py): how it is started, handed a program, listened to and ended."""

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
from pathlib import Path

from xflow_jax.sandbox.limits import Limits

_LONGEST_VERDICT = 2000  # bytes


_PATIENCE = 60.0  # seconds for what the machine does: to start, and to end what was killed


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


# Into isolation, the best first. Where not even "plain" works, with Landlock alone, the interpreter keeps its libraries
# in a place that `readable` does not know.
WAYS = ("unshare", "bubblewrap", "plain", "bare")


class NotStarted(Exception):
    """Why a zygote could not start."""


class Died(Exception):
    """The zygote is gone, and with it what it ran."""


@dataclass(frozen=True)
class Outcome:
    """`verdict`: what the child wrote to the channel; `token`: what it writes if all passes; `cut`: what to say where
    there is no verdict, or "output limit"."""

    verdict: bytes
    token: bytes
    output: bytes
    cut: str


def interpreter() -> list[str]:
    """The one behind the links of a virtual environment, as isolated as with -I -S, but not deaf to the hash seed."""
    return [
        os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
        "-P",
        "-s",
        "-S",
        "-B",
    ]


def readable() -> list[str]:
    """What a program may read: the interpreter, its standard library, what these load, and time zones."""
    homes = [
        f"{prefix}/{lib}"
        for prefix in (sys.base_prefix, sys.base_exec_prefix)
        for lib in ("lib", "lib64")
    ]
    paths = [interpreter()[0], os.path.dirname(os.__file__), *homes, *_FOLDERS, *_FILES]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def bubblewrap() -> str | None:
    """Its path, where it is installed."""
    return shutil.which("bwrap")


def launcher(way: str, landlock: bool, scratch: str, scratch_bytes: int, control: int) -> list[str]:
    """The command that isolates itself and then runs the command that follows it; the arguments are launch.py's."""
    spec = {
        "way": {"bubblewrap": "inside", "bare": "plain"}.get(way, way),
        "landlock": landlock,
        "readable": readable(),
        "scratch": scratch,
        "scratch_bytes": scratch_bytes,
        "control": control,
    }
    command = [
        *interpreter(),
        "-c",
        Path(__file__).with_name("launch.py").read_text(),
        json.dumps(spec),
    ]
    if way != "bubblewrap":
        return command
    shown = sorted({*readable(), *map(os.path.realpath, readable())})
    return [
        bubblewrap() or "bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session",
        "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534",
        *(part for path in shown for part in ("--ro-bind", os.path.realpath(path), path)),
        *(part for path in _DEVICES for part in ("--dev-bind", path, path)),
        "--size", str(scratch_bytes), "--tmpfs", scratch, "--remount-ro", "/", "--", *command,
    ]  # fmt: skip


class Worker:
    """One warm zygote and its folder; runs one program at a time. NotStarted where this way does not work here."""

    def __init__(self, way: str, scratch_bytes: int) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="xflow-sandbox-", ignore_cleanup_errors=True
        )
        self.control, theirs = socket.socketpair()
        scratch = os.path.realpath(self.folder.name)
        command = [
            *launcher(way, way != "bare", scratch, scratch_bytes, theirs.fileno()),
            *interpreter(), "-c", Path(__file__).with_name("child.py").read_text(), str(theirs.fileno()), scratch,
        ]  # fmt: skip
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if way == "bubblewrap" else None,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                self.control.close()
                self.folder.cleanup()
                raise NotStarted(str(error)) from None
        self.close = weakref.finalize(
            self, _end, os.getpid(), self.process, self.control, self.folder
        )
        self.control.settimeout(_PATIENCE)
        try:
            hello = self.control.recv(4096).decode()
        except OSError as error:
            hello = json.dumps(str(error))
        if not hello or hello.startswith('"'):
            self.close()
            raise NotStarted(json.loads(hello or '"it ended at once"'))
        self.way, self.isolation, self.why = way, hello, ""

    def run(self, program: str, checks: str, limits: Limits) -> Outcome:
        """Runs a program and its checks; Died where the zygote ended meanwhile, and the worker is of no more use."""
        deadline, token = time.monotonic() + limits.seconds, secrets.token_bytes(32)
        job = marshal.dumps((program, checks, limits.resources(), limits.files))
        ours, theirs = socket.socketpair()
        output, printed = os.pipe()
        with ours, open(output, "rb", buffering=0) as output:
            with theirs, open(printed, "wb", buffering=0) as printed:
                self._tell(b"r", [printed.fileno(), theirs.fileno()])
            ours.settimeout(limits.seconds)
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError, TimeoutError
            ):  # of a child that has ended
                ours.sendall(len(job).to_bytes(8, "little") + job)
                ours.sendall(token)  # by itself: such a short one arrives whole
            return _listen(self, ours, output, deadline, limits.output_bytes, token)

    def _tell(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.control, [message], descriptors)
        except OSError:
            raise Died from None

    def alive(self) -> bool:
        """Whether it can run another program: not where it has gone, or a process of the last one got away."""
        if not self.close.alive or self.process.poll() is not None:
            return False
        with contextlib.suppress(OSError):  # none where the kernel does not tell
            task = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
            return len(Path(task).read_text().split()) <= 1
        return True


def _end(
    owner: int,
    process: subprocess.Popen,
    control: socket.socket,
    folder: tempfile.TemporaryDirectory,
) -> None:
    """Ends a worker; the zygote ends by itself when its control closes, and all that it started with it."""
    control.close()
    if os.getpid() != owner:  # a fork of this process: the worker is not its own
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # PermissionError: macOS, of a dead group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    folder.cleanup()


def _listen(
    worker: Worker, ours: socket.socket, output, deadline: float, most: int, token: bytes
) -> Outcome:
    """Until the child has ended or must be; holds at most `most` bytes of output. Died where the zygote has."""
    verdict, printed, cut, answer = b"", b"", "", b""
    asked = 0.0  # when the zygote was told to end the program
    ours.setblocking(False)
    os.set_blocking(output.fileno(), False)
    with selectors.DefaultSelector() as selector:
        for source in (output, ours, worker.control):
            selector.register(source, selectors.EVENT_READ)
        while len(answer) < 5:
            now = time.monotonic()
            if not cut and (now >= deadline or len(printed) > most):
                cut, asked = ("output limit" if len(printed) > most else "timeout"), now
                worker._tell(b"k")
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(
                        worker.process.pid, signal.SIGCONT
                    )  # where the program could stop the zygote
            if cut and now - asked > _PATIENCE:
                worker.close()
                raise Died
            for key, _ in selector.select(asked + _PATIENCE - now if cut else deadline - now):
                if key.fileobj is worker.control:
                    data = _read(worker.control.fileno())
                    if not data:
                        raise Died
                    answer += data
                elif not (data := _read(key.fd)):
                    selector.unregister(key.fileobj)
                elif key.fileobj is ours:
                    verdict = (verdict + data)[:_LONGEST_VERDICT]
                elif not cut:
                    printed += data
    # All has ended; what it wrote before is there to read.
    while len(verdict) < _LONGEST_VERDICT and (data := _read(ours.fileno())):
        verdict += data
    while len(printed) <= most and (data := _read(output.fileno())):
        printed += data
    status, clean = struct.unpack("=i?", answer)
    if not clean:
        worker.close()
    code = os.waitstatus_to_exitcode(status)
    if len(printed) > most:
        cut = "output limit"
    elif not cut and code == -signal.SIGXCPU:
        cut = "timeout"
    elif not cut:
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
        cut = f"error: the process {how} before the checks ended"
    return Outcome(verdict, token, printed[:most], cut)


def _read(descriptor: int) -> bytes:
    """What is there to read; nothing at the end, and where there is nothing yet."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        return os.read(descriptor, 1 << 16)
    return b""


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # a real-time signal has none
        return signal.Signals(number).name
    return f"signal {number}"


def start(scratch_bytes: int, ways: Sequence[str] = WAYS) -> Worker:
    """A worker by the best of the ways that works, `why` not by a better one; NotStarted says why by none."""
    why = []
    for way in ways:
        if (way == "unshare" and sys.platform != "linux") or (
            way == "bubblewrap" and not bubblewrap()
        ):
            continue
        try:
            worker = Worker(way, scratch_bytes)
            worker.why = "; ".join(why)
            return worker
        except NotStarted as error:
            why.append(f"{way}: {error}")
    raise NotStarted("; ".join(why))
