"""Zygote, a warm interpreter that forks a limited child for each program.

This is a script of the sandbox: it imports the standard library only. Its process has no other
code of this package. There are two zygotes in a worker. The children of one run programs
(program.py), and those of the other evaluate checks (judge.py). No program enters a zygote: it
receives two descriptors, and the child reads its job from one of them. A zygote runs one child at a
time, and removes all its processes and files before the next.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

from xflow_jax.sandbox.child import ignore_gone
from xflow_jax.sandbox.judge import run_judge, warm_up
from xflow_jax.sandbox.program import run_program
from xflow_jax.sandbox.seccomp import Kernel

# Modules that programs and checks import most.
WARM_MODULES = (
    "abc array bisect cmath collections contextlib copy datetime decimal enum fractions functools "
    "heapq io itertools json math numbers operator random re statistics string struct textwrap "
    "time typing"
)


class LibraryFinder:
    """Finds the libraries of `Limits.libraries`, and nothing beside them.

    Args:
        folders: folder of each package.
    """

    def __init__(self, folders: list[str]) -> None:
        self._folders = {os.path.basename(folder): folder for folder in folders}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Returns the spec of a library, or None."""
        folder = self._folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def serve(
    control: socket.socket, scratch: str, hello: str, run_child: Callable[[list[int]], None]
) -> None:
    """Runs children until the other end of `control` closes.

    The message "r" with two descriptors runs a child, and "k" ends it. The answer to "r" is
    (wait status, clean). If the clean-up failed, the zygote ends after the answer, and the parent
    replaces it.

    Args:
        control: connection with the parent.
        scratch: folder that children may write.
        hello: the isolation in force, the first message to the parent.
        run_child: runs in the forked child with its descriptors.
    """
    gc.collect()
    gc.freeze()  # otherwise the collections of each child would copy these pages
    wake, signalled = os.pipe()
    os.set_blocking(signalled, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    control.sendall(hello.encode())
    clean = True
    while clean:
        message, descriptors, *_ = socket.recv_fds(control, 1, 2)
        if message == b"k":  # too late, the child has ended
            continue
        if len(descriptors) != 2:
            return
        pid = os.fork()
        if pid == 0:
            try:
                run_child(descriptors)
            finally:
                os._exit(1)
        ignore_gone(os.setpgid, pid, pid)  # in the child too, since either may be first
        for descriptor in descriptors:
            os.close(descriptor)
        status = wait(pid, control, wake)
        clean = wipe(scratch)
        control.sendall(struct.pack("=i?", status, clean))


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
        ready, _, _ = select.select([control.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if control.fileno() in ready:
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


def main(
    role: str, control: str, scratch: str, libraries: str, isolation: str, other_processes: str
) -> None:
    """Serves programs or checks.

    Args:
        role: "program" or "judge".
        control: descriptor of the connection with the parent.
        scratch: folder that children may write.
        libraries: folders of packages that may be imported, joined by os.pathsep.
        isolation: the isolation of this process, as in `Result.isolation`.
        other_processes: processes of this user that count against its limit.
    """
    folders = libraries.split(os.pathsep) if libraries else []
    sys.meta_path.append(LibraryFinder(folders))
    for name in WARM_MODULES.split():
        __import__(name)
    compile("", "", "exec")  # creates the compiler's types, once
    if role == "judge":
        warm_up()
    kernel, others = Kernel(), int(other_processes)
    if kernel.has_seccomp:
        parts = isolation.split("+")
        parts.insert(sum(part in ("namespaces", "landlock") for part in parts), "seccomp")
        isolation = "+".join(parts)
    # A program must not find native code, or the code of this package, by an import.
    for name in [n for n in sys.modules if n.split(".")[0] in ("ctypes", "_ctypes", "xflow_jax")]:
        del sys.modules[name]

    def run_child(descriptors: list[int]) -> None:
        if role == "judge":
            run_judge(descriptors, kernel, others)
        else:
            run_program(descriptors, kernel, others, scratch, folders)

    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
        socket.socket(fileno=int(control)) as connection,
    ):
        serve(connection, scratch, isolation, run_child)
