"""The zygote, a warm interpreter that forks one limited child for each program, and what such a child does.

A script, whose text is all that its process gets of this package: child.py CONTROL SCRATCH ISOLATION OTHERS. The zygote
never sees a program: it is handed two descriptors, of the output and of the channel, and the child reads its job from
the channel. It runs one program at a time, and all that a program started or wrote is gone before the next.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import marshal
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable
from types import CodeType, ModuleType

# What programs and checks import most. What checks name of it is also put back as it was before they run.
WARM = (
    "abc array bisect cmath collections contextlib copy datetime decimal enum fractions functools "
    "heapq io itertools json math numbers operator random re statistics string struct textwrap time typing"
)


# Audit hooks cannot be removed, and they hold wherever the kernel gives little.
FORBIDDEN = (
    "ctypes.", "fcntl.", "gc.", "socket.", "sqlite3.", "subprocess.", "shutil.chown", "signal.pthread_kill",
    "os.chdir", "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fchdir", "os.fork", "os.kill", "os.link",
    "os.mkdir", "os.posix_spawn", "os.removexattr", "os.rmdir", "os.setxattr", "os.spawn", "os.symlink",
    "os.system", "os.truncate", "os.utime", "resource.prlimit", "resource.setrlimit", "sys._current",
    "sys.addaudithook", "sys.monitoring", "sys.setprofile", "sys.settrace",
)  # fmt: skip


UNIMPORTABLE = (
    "_ctypes",
    "_dbm",
    "_gdbm",
    "_interp",
    "_posixsubprocess",
    "_test",
    "_xx",
    "readline",
)


FRAMES = ("ag_frame", "cr_frame", "gi_frame", "tb_frame")


def serve(control: socket.socket, scratch: str, isolation: str, others: int) -> None:
    """Until the other end closes: "r" and two descriptors run a program, "k" ends it; answers (wait status, clean).

    Where it could not clean up, it ends itself after the answer, and is replaced.
    """
    for name in WARM.split():
        __import__(name)
    compile("", "", "exec")  # makes the compiler's types, once
    gc.collect()
    gc.freeze()  # or the collections of each child would copy these pages
    wake, bell = os.pipe()
    os.set_blocking(bell, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    control.sendall(isolation.encode())
    clean = True
    while clean:
        message, given, *_ = socket.recv_fds(control, 1, 2)
        if message == b"k":  # came too late
            continue
        if len(given) != 2:
            return
        pid = os.fork()
        if pid == 0:
            try:
                run_child(*given, scratch, others)
            finally:
                os._exit(1)
        quietly(os.setpgid, pid, pid)  # the child does so too: whoever is first
        for descriptor in given:
            os.close(descriptor)
        status = wait(pid, control, wake)
        clean = wipe(scratch)
        control.sendall(struct.pack("=i?", status, clean))


def quietly(call: Callable[..., None], *args: int) -> None:
    """Calls for processes that may be gone; PermissionError: macOS, of a group whose members have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        call(*args)


def wait(pid: int, control: socket.socket, wake: int) -> int:
    """Until the child ends or the other side wants it ended; its wait status, after all of its processes are gone."""
    ended, status = 0, 0
    while True:
        # Looked at, not reaped: the number of its group must not pass to another before the group is killed.
        if hasattr(os, "waitid"):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
        else:  # macOS before Python 3.13
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if control in ready:
            control.recv(1)
            break
    first = os.getpid() == 1  # of a process namespace: all others in it are the program's
    if first:
        quietly(os.kill, -1, signal.SIGKILL)
    else:
        quietly(os.killpg, pid, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):
        while first:
            os.waitpid(-1, 0)
    return status


def wipe(folder: str) -> bool:
    """Empties a folder; whether that went well."""
    try:
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    except (OSError, RecursionError):
        return False
    return True


def read_exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, size - len(data))
        if not part:
            os._exit(1)  # the other side has given up
        data += part
    return bytes(data)


def names(code: CodeType) -> set[str]:
    """What code refers to by name, its functions included, and the first parts of dotted names."""
    found = {name.partition(".")[0] for name in code.co_names} | set(code.co_names)
    return found.union(
        *(names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    )


def run_child(output: int, channel: int, scratch: str, others: int) -> None:
    """The forked child: takes its limits, runs program and checks, writes the verdict to the channel and exits."""
    quietly(os.setpgid, 0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if channel != 3:
        os.dup2(channel, 3)
    channel = 3
    os.closerange(4, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16))
    sys.argv = [""]
    size = int.from_bytes(read_exactly(channel, 8), "little")
    program, checks, limits, writable = marshal.loads(read_exactly(channel, size))
    signal.alarm(limits[resource.RLIMIT_CPU] + 1)  # ends a sleeping child that nobody waits for
    for number, most in limits.items():
        hard = resource.getrlimit(number)[1]
        most += others if number == resource.RLIMIT_NPROC else 0
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        grace = (
            1 if number == resource.RLIMIT_CPU else 0
        )  # it is told by a signal of its own, and killed after it
        resource.setrlimit(
            number,
            (most, most + grace if hard == resource.RLIM_INFINITY else min(most + grace, hard)),
        )

    # The functions below keep the builtins they are made with: a program that replaces some must not reach the guard.
    pristine = globals()["__builtins__"] = dict(vars(builtins))
    frames, forbidden, unimportable = FRAMES, FORBIDDEN, UNIMPORTABLE
    readable = (
        os.path.dirname(os.__file__) + "/",
        scratch,
        "/usr/share/zoneinfo/",
        os.devnull,
        "/dev/urandom",
    )
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    fspath, stdout, leave, null, modules = os.fspath, sys.stdout, os._exit, os.devnull, sys.modules
    stage, guarded = "compile", True

    def within(path: object, folders: tuple[str, ...]) -> bool:
        path = fspath(
            path
        )  # nothing here may ask a function or a method that a program can replace or override
        if isinstance(path, bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        return ".." not in str.split(path, "/") and (
            str.startswith(path, folders) or not str.startswith(path, "/")
        )

    def guard(event: str, args: tuple) -> None:
        nonlocal writable
        if event == "open":
            path, _, flags = args
            if flags & writing and not isinstance(path, int):
                writable -= 1
                allowed = writable >= 0 and within(path, (scratch, null))
            else:
                allowed = isinstance(path, int) or within(path, readable)
        elif event in ("os.remove", "os.rename"):
            allowed = all(
                arg == -1 if isinstance(arg, int) else within(arg, (scratch,)) for arg in args
            )
        elif event == "import" and args[0].startswith(unimportable):
            raise ImportError(f"{args[0]} is not available here")
        elif event == "sys._getframe":
            raise ValueError(
                "call stack is not deep enough"
            )  # what namedtuple, enum and typing are prepared for
        else:
            allowed = not event.startswith(forbidden)
            if event == "object.__getattr__" and guarded:
                allowed = args[1] not in frames
        if not allowed:
            raise PermissionError(f"{event} is not allowed here")

    def run() -> bytes:
        nonlocal stage
        judge = compile(checks, "<checks>", "exec", dont_inherit=True)
        used = names(judge)
        module = ModuleType("program")
        modules["program"] = modules["__main__"] = module
        finders = [
            (lasting, list(lasting)) for lasting in (sys.meta_path, sys.path_hooks, sys.path)
        ]
        before = set(modules)
        named = {name: modules[name] for name in used & before}  # all would take long
        known = [
            (it, vars(it), dict(vars(it))) for it in named.values() if isinstance(it, ModuleType)
        ]
        sys.addaudithook(guard)
        code = compile(program, "<program>", "exec", dont_inherit=True)
        stage = "program"
        exec(code, vars(module))
        # What the checks use is put back: builtins, the modules that they name, and how modules are found.
        vars(builtins).update(pristine)
        modules.update(named)
        for it, now, then in known:
            if it is not module:
                now.update(then)
        for lasting, then in finders:
            lasting[:] = then
        for name in used - before:
            modules.pop(name, None)
        # A program's name hides a builtin one from the checks only where it must be the answer: they use no other.
        scope = dict(vars(module))
        if used & scope.keys() - pristine.keys():
            scope = {name: value for name, value in scope.items() if name not in pristine}
        stage = "checks"
        exec(judge, scope | {"__builtins__": builtins, "__name__": "program"})
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


if __name__ == "__main__":
    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
        socket.socket(fileno=int(sys.argv[1])) as control,
    ):
        serve(control, sys.argv[2], sys.argv[3], int(sys.argv[4]))
