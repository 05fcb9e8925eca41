"""Runs untrusted programs in limited processes of their own and says whether they pass a task's checks.

The verdict is the harness's: a passing child must hand back a random token, which it is given just before the program
starts and keeps where Python code cannot see it. What a program prints, and how it exits, counts for nothing.
This holds against accidents and cheap tricks. The checks share an interpreter with the program, so against a determined
attacker put the whole run into a container.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import marshal
import math
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields

from xflow_jax.strict import require

_REASONS = ("wrong answer: ", "memory limit", "syntax error: ", "error: ")
_LONGEST_VERDICT = 2000  # bytes


@dataclass(frozen=True)
class Limits:
    """What one program may use; UserError where a limit is not above 0."""

    seconds: float = 5.0  # of wall clock
    memory_mb: int = 512  # of address space
    output_bytes: int = 1 << 18  # printed; one more ends the run
    file_bytes: int = 1 << 20  # in each file
    files: int = 32  # open at once, and opened for writing in all
    processes: int = 1  # of this user in all, so none can be started; root is held by the audit hook alone

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(value > 0, f"the sandbox limit {field.name} must be above 0, not {value}")


@dataclass(frozen=True)
class Result:
    """`reason`, in one line: "passed", "wrong answer: ...", "timeout", "memory limit", "output limit",
    "syntax error: ..." or "error: ..."; `output` is what was printed; `seconds` of wall clock, start-up included."""

    passed: bool
    reason: str
    output: str
    seconds: float


def run_program(program: str, checks: str = "", limits: Limits = Limits()) -> Result:  # noqa: B008
    """Runs `program`, untrusted source, and then `checks`, the task's source, in the same namespace of one child.

    Passes only if both run to their end; an AssertionError that the checks themselves raise is a wrong answer.
    `__name__` is "program", so a main guard does not run. `==` asks the answer's own `__eq__`: checks that want to be
    sure compare types too. UserError where processes cannot be limited (Windows).
    """
    require(os.name == "posix", "the sandbox needs Linux or macOS")
    start = time.monotonic()
    token = secrets.token_bytes(32)
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="xflow-sandbox-", ignore_cleanup_errors=True) as scratch, ours:
        with theirs:
            job = (program, checks, theirs.fileno(), os.path.realpath(scratch), _resources(limits), limits.files)
            ours.sendall(token)
            child = subprocess.Popen(
                # As isolated as -I -S, but not deaf to the hash seed: a verdict must not depend on the order of a set.
                [sys.executable, "-P", "-s", "-S", "-B", "-c", _child_source()],
                env={"PYTHONHASHSEED": "0"},
                cwd=scratch,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(marshal.dumps(job))
            verdict, output, cut = _listen(child, ours, start + limits.seconds, limits.output_bytes)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, of a dead group
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
    reason = "".join(c if c.isprintable() else " " for c in verdict.decode("utf-8", "replace"))
    if cut == "output limit" or not verdict:
        reason = cut
    elif verdict == token:
        reason = "passed"
    elif not reason.startswith(_REASONS):
        reason = "error: the program wrote where only the harness may"
    return Result(reason == "passed", reason, output.decode("utf-8", "replace"), time.monotonic() - start)


def run_many(
    jobs: Sequence[tuple[str, str]],
    limits: Limits = Limits(),  # noqa: B008
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """The results of (program, checks) pairs, in their order; equal pairs run once and share one result.

    workers: children at once, one for each core by default. progress(done, total) is called after each run.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        runs = {job: pool.submit(run_program, *job, limits) for job in dict.fromkeys(jobs)}
        try:
            for done, run in enumerate(as_completed(runs.values()), start=1):
                run.result()  # raises here and now what is wrong with the harness
                if progress is not None:
                    progress(done, len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [runs[job].result() for job in jobs]


def _resources(limits: Limits) -> dict[int, int]:
    import resource  # not on Windows, where this module must still import

    table = {
        resource.RLIMIT_CPU: math.ceil(limits.seconds) + 1,  # ends a busy child whose parent is gone
        resource.RLIMIT_AS: limits.memory_mb << 20,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "darwin":  # refuses to limit the address space
        del table[resource.RLIMIT_AS]
    return table


def _listen(child: subprocess.Popen, ours: socket.socket, deadline: float, most: int) -> tuple[bytes, bytes, str]:
    """(verdict, output, what to say where there is no verdict); holds at most `most` bytes of output."""
    verdict, output = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        selector.register(ours, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return verdict, output, "timeout"
            ended = _status(child) is not None  # asked first: what it wrote before it ended is then there to read
            ready = selector.select(0 if ended else min(left, 0.1))
            if not ready and ended:
                break  # a process that got away still holds the pipes
            for key, _ in ready:
                data = b""
                with contextlib.suppress(ConnectionResetError):  # it ended before it took the token
                    data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is ours:
                    verdict = (verdict + data)[: _LONGEST_VERDICT]
                else:
                    output += data
                    if len(output) > most:
                        return verdict, output[:most], "output limit"
    while not verdict and (status := _status(child)) is None:  # both ends are closed: it is about to be gone
        if time.monotonic() > deadline:
            return verdict, output, "timeout"
        time.sleep(0.001)
    if verdict or status == -signal.SIGXCPU:
        return verdict, output, "timeout"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return verdict, output, f"error: the process {how} before the checks ended"


def _status(child: subprocess.Popen) -> int | None:
    """The exit status, negative for a signal, None while it runs; an ended child stays a zombie, so that the number of
    its group cannot pass to another before the group is killed."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return child.poll()
    info = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


@functools.cache
def _child_source() -> str:
    return inspect.getsource(_child) + "\n_child()\n"


def _child() -> None:
    """The child's side. Its source is all that the child gets of this module, so it imports for itself, and only what
    costs nothing to import."""
    import _signal
    import builtins
    import marshal
    import os
    import resource
    import sys
    import types

    program, checks, channel, scratch, resources, writable = marshal.loads(sys.stdin.buffer.read())
    _signal.alarm(resources[resource.RLIMIT_CPU] + 1)  # ends a sleeping child whose parent is gone
    for number, most in resources.items():
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (most, most))

    # The functions below keep the builtins they are made with: a program that replaces some must not reach the guard.
    pristine = globals()["__builtins__"] = dict(vars(builtins))
    # Audit hooks cannot be removed, and they stop root too, whom permissions and the limit on processes do not.
    forbidden = (
        "ctypes.", "fcntl.", "gc.", "socket.", "sqlite3.", "subprocess.", "shutil.chown", "signal.pthread_kill",
        "os.chdir", "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fchdir", "os.fork", "os.kill", "os.link",
        "os.mkdir", "os.posix_spawn", "os.removexattr", "os.rmdir", "os.setxattr", "os.spawn", "os.symlink",
        "os.system", "os.truncate", "os.utime", "resource.prlimit", "resource.setrlimit", "sys._current",
        "sys.addaudithook", "sys.monitoring", "sys.setprofile", "sys.settrace",
    )  # fmt: skip
    unimportable = ("_ctypes", "_dbm", "_gdbm", "_interp", "_posixsubprocess", "_test", "_xx", "readline")
    frames = ("ag_frame", "cr_frame", "gi_frame", "tb_frame")
    readable = (os.path.dirname(os.__file__) + "/", scratch, "/usr/share/zoneinfo/", os.devnull, "/dev/urandom")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    fspath, stdout, leave = os.fspath, sys.stdout, os._exit
    stage, guarded = "compile", True

    def within(path: object, folders: tuple[str, ...]) -> bool:
        path = fspath(path)  # nothing here may ask a function or a method that a program can replace or override
        if isinstance(path, bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        return ".." not in str.split(path, "/") and (str.startswith(path, folders) or not str.startswith(path, "/"))

    def guard(event: str, args: tuple) -> None:
        nonlocal writable
        if event == "open":
            path, _, flags = args
            if flags & writing and not isinstance(path, int):
                writable -= 1
                allowed = writable >= 0 and within(path, (scratch, os.devnull))
            else:
                allowed = isinstance(path, int) or within(path, readable)
        elif event in ("os.remove", "os.rename"):
            allowed = all(arg == -1 if isinstance(arg, int) else within(arg, (scratch,)) for arg in args)
        elif event == "import" and args[0].startswith(unimportable):
            raise ImportError(f"{args[0]} is not available here")
        elif event == "sys._getframe":
            raise ValueError("call stack is not deep enough")  # what namedtuple, enum and typing are prepared for
        else:
            allowed = not event.startswith(forbidden)
            if event == "object.__getattr__" and guarded:
                allowed = args[1] not in frames
        if not allowed:
            raise PermissionError(f"{event} is not allowed here")

    def run() -> bytes:
        nonlocal stage
        judge = compile(checks, "<checks>", "exec", dont_inherit=True)
        module = types.ModuleType("program")
        sys.modules["program"] = sys.modules["__main__"] = module
        sys.addaudithook(guard)
        code = compile(program, "<program>", "exec", dont_inherit=True)
        stage = "program"
        exec(code, vars(module))
        vars(builtins).update(pristine)
        vars(module)["__builtins__"] = builtins
        stage = "checks"
        exec(judge, vars(module))
        return b""

    def describe(error: BaseException) -> str:
        nonlocal guarded
        if stage == "compile":
            where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
            return f"syntax error: {error.msg if where else error}{where}"
        guarded, last = False, error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        source, guarded = last.tb_frame.f_code.co_filename, True
        if stage == "checks" and isinstance(error, AssertionError) and source == "<checks>":
            return f"wrong answer: {str(error) or checks.splitlines()[last.tb_lineno - 1].strip()}"
        return f"error: {type(error).__name__}: {error}"

    try:
        # The token waits on the evaluation stack, in no variable, and both calls are looked up before the program runs.
        os.write(channel, os.read(channel, 32) + run())
    except MemoryError:
        os.write(channel, b"memory limit")
    except BaseException as error:
        try:
            reason = describe(error)
        except BaseException:
            reason = "error: an exception that cannot be shown"
        os.write(channel, reason[:500].encode("utf-8", "replace"))
    try:
        stdout.flush()
    finally:
        leave(0)
