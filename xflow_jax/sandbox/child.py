"""Zygote, a warm interpreter, and the limited children that it forks.

This is a script, child.py CONTROL SCRATCH ISOLATION OTHER_PROCESSES. Its process has no other code
of this package. No program enters the zygote: it receives two descriptors, of the output and of the
channel, and the child reads its job from the channel. The zygote runs one program at a time, and
removes all processes and files of a program before the next.
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

# Modules that programs and checks import most. Those that the checks name are also restored before
# the checks run.
WARM_MODULES = (
    "abc array bisect cmath collections contextlib copy datetime decimal enum fractions functools "
    "heapq io itertools json math numbers operator random re statistics string struct textwrap "
    "time typing"
)

# Prefixes of audit events. Audit hooks cannot be removed, and they need no support of the kernel.
FORBIDDEN_EVENTS = (
    "ctypes.", "fcntl.", "gc.", "socket.", "sqlite3.", "subprocess.", "shutil.chown",
    "signal.pthread_kill", "os.chdir", "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fchdir",
    "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.removexattr", "os.rmdir",
    "os.setxattr", "os.spawn", "os.symlink", "os.system", "os.truncate", "os.utime",
    "resource.prlimit", "resource.setrlimit", "sys._current", "sys.addaudithook", "sys.monitoring",
    "sys.setprofile", "sys.settrace",
)  # fmt: skip
FORBIDDEN_IMPORTS = (
    "_ctypes",
    "_dbm",
    "_gdbm",
    "_interp",
    "_posixsubprocess",
    "_test",
    "_xx",
    "readline",
)
FRAME_ATTRIBUTES = ("ag_frame", "cr_frame", "gi_frame", "tb_frame")


def serve(control: socket.socket, scratch: str, isolation: str, other_processes: int) -> None:
    """Runs programs until the other end of `control` closes.

    The message "r" with two descriptors runs a program, and "k" ends it. The answer to "r" is
    (wait status, clean). If the clean-up failed, the zygote ends after the answer, and the parent
    replaces it.
    """
    for name in WARM_MODULES.split():
        __import__(name)
    compile("", "", "exec")  # creates the compiler's types, once
    gc.collect()
    gc.freeze()  # otherwise the collections of each child would copy these pages
    wake, signalled = os.pipe()
    os.set_blocking(signalled, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    control.sendall(isolation.encode())
    clean = True
    while clean:
        message, descriptors, *_ = socket.recv_fds(control, 1, 2)
        if message == b"k":  # too late, the program has ended
            continue
        if len(descriptors) != 2:
            return
        pid = os.fork()
        if pid == 0:
            try:
                run_child(*descriptors, scratch, other_processes)
            finally:
                os._exit(1)
        ignore_gone(os.setpgid, pid, pid)  # in the child too, since either may be first
        for descriptor in descriptors:
            os.close(descriptor)
        status = wait(pid, control, wake)
        clean = wipe(scratch)
        control.sendall(struct.pack("=i?", status, clean))


def ignore_gone(call: Callable[..., None], *args: int) -> None:
    """Calls a function for processes that may have ended.

    macOS raises PermissionError for a group whose processes have ended.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        call(*args)


def wait(pid: int, control: socket.socket, wake: int) -> int:
    """Waits for the child, or for a message to end it.

    Returns the child's wait status, once all of its processes have ended.
    """
    ended, status = 0, 0
    while True:
        # WNOWAIT does not reap the child: the number of its group must not pass to another one
        # before the group is killed.
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
    # The first process of a process namespace: all others in it are the program's.
    is_first = os.getpid() == 1
    if is_first:
        ignore_gone(os.kill, -1, signal.SIGKILL)
    else:
        ignore_gone(os.killpg, pid, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):
        while is_first:
            os.waitpid(-1, 0)
    return status


def wipe(folder: str) -> bool:
    """Empties a folder. Returns True on success."""
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
            os._exit(1)  # the other side has closed the channel
        data += part
    return bytes(data)


def names_in(code: CodeType) -> set[str]:
    """Returns the names in code and its functions.

    Of a dotted name, the first part is one too.
    """
    found = {name.partition(".")[0] for name in code.co_names} | set(code.co_names)
    return found.union(
        *(names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    )


def take_limits(limits: dict[int, int], other_processes: int) -> None:
    """Limits this process, never above its hard limits."""
    signal.alarm(limits[resource.RLIMIT_CPU] + 1)  # ends a sleeping child without a parent
    for number, limit in limits.items():
        hard = resource.getrlimit(number)[1]
        limit += other_processes if number == resource.RLIMIT_NPROC else 0
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        # Of CPU time, the soft limit sends SIGXCPU, and the hard one kills a second later.
        grace = 1 if number == resource.RLIMIT_CPU else 0
        resource.setrlimit(
            number,
            (limit, limit + grace if hard == resource.RLIM_INFINITY else min(limit + grace, hard)),
        )


def run_child(output: int, channel: int, scratch: str, other_processes: int) -> None:
    """Runs a program and its checks in the forked child, and exits.

    It takes its limits first, and writes the verdict to the channel at the end. The functions
    inside share state and must be created after the builtins are copied, so they stay here.
    """
    ignore_gone(os.setpgid, 0, 0)
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
    take_limits(limits, other_processes)

    # A function keeps the builtins of its creation. The functions below have a copy, so a program
    # that replaces builtins does not affect the guard.
    pristine = globals()["__builtins__"] = dict(vars(builtins))
    frames, forbidden, unimportable = FRAME_ATTRIBUTES, FORBIDDEN_EVENTS, FORBIDDEN_IMPORTS
    readable = (
        os.path.dirname(os.__file__) + "/",
        scratch,
        "/usr/share/zoneinfo/",
        os.devnull,
        "/dev/urandom",
    )
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # A program may replace these attributes of the modules.
    fspath, stdout, leave, null, modules = os.fspath, sys.stdout, os._exit, os.devnull, sys.modules
    stage, guarded = "compile", True

    def within(path: object, folders: tuple[str, ...]) -> bool:
        # No function or method is called here that a program can replace or override.
        path = fspath(path)
        if isinstance(path, bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        return ".." not in str.split(path, "/") and (
            str.startswith(path, folders) or not str.startswith(path, "/")
        )

    def guard(event: str, args: tuple[object, ...]) -> None:
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
            # namedtuple, enum and typing handle this error.
            raise ValueError("call stack is not deep enough")
        else:
            allowed = not event.startswith(forbidden)
            if event == "object.__getattr__" and guarded:
                allowed = args[1] not in frames
        if not allowed:
            raise PermissionError(f"{event} is not allowed here")

    def run() -> bytes:
        nonlocal stage
        checks_code = compile(checks, "<checks>", "exec", dont_inherit=True)
        used = names_in(checks_code)
        module = ModuleType("program")
        modules["program"] = modules["__main__"] = module
        import_paths = [(paths, list(paths)) for paths in (sys.meta_path, sys.path_hooks, sys.path)]
        before = set(modules)
        named = {name: modules[name] for name in used & before}  # all modules would take long
        attributes = [
            (each, vars(each), dict(vars(each)))
            for each in named.values()
            if isinstance(each, ModuleType)
        ]
        sys.addaudithook(guard)
        code = compile(program, "<program>", "exec", dont_inherit=True)
        stage = "program"
        exec(code, vars(module))
        # Restores what the checks use: builtins, the modules that they name, and the import paths.
        vars(builtins).update(pristine)
        modules.update(named)
        for each, current, original in attributes:
            if each is not module:
                current.update(original)
        for paths, original in import_paths:
            paths[:] = original
        for name in used - before:
            modules.pop(name, None)
        # A name of the program hides a builtin from the checks only if they use no other name of
        # the program, since then it must be the answer.
        scope = dict(vars(module))
        if used & scope.keys() - pristine.keys():
            scope = {name: value for name, value in scope.items() if name not in pristine}
        stage = "checks"
        exec(checks_code, scope | {"__builtins__": builtins, "__name__": "program"})
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
        # The token waits on the evaluation stack, in no variable. Both functions are looked up
        # before the program runs.
        os.write(channel, os.read(channel, 32) + run())
    except MemoryError:
        os.write(channel, b"memory limit")
    except BaseException as error:
        try:
            reason = describe(error)
        except BaseException:
            reason = "error: an exception without a readable text"
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
