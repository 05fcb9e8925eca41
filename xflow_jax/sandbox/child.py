"""Forked child of a zygote: its descriptors, its limits and its messages.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence

_SIZE = struct.Struct("<I")


class ChannelClosed(Exception):
    """The other side has ended, or its message is above the limit."""


class Channel:
    """Messages with their size in front, over a connected socket.

    Args:
        descriptor: the socket.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read, self._write = os.read, os.write  # a program may replace these attributes

    def receive(self, limit: int) -> bytes:
        """Reads a message.

        Args:
            limit: its largest size in bytes.

        Raises:
            ChannelClosed: there is none, or it is larger.
        """
        size = _SIZE.unpack(self._read_exactly(_SIZE.size))[0]
        if size > limit:
            raise ChannelClosed(f"a message of {size} bytes is too large")
        return self._read_exactly(size)

    def _read_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._read(self._descriptor, min(size - len(data), 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise ChannelClosed("it ends early" if data else "")
            data += part
        return bytes(data)

    def send(self, data: bytes) -> None:
        """Writes a message.

        Raises:
            ChannelClosed: the other side has ended.
        """
        view = memoryview(_SIZE.pack(len(data)) + data)
        while view:
            try:
                view = view[self._write(self._descriptor, view) :]
            except OSError:
                raise ChannelClosed("") from None


def ignore_gone(call: Callable[..., None], *args: int) -> None:
    """Calls a function for processes that may have ended.

    macOS raises PermissionError for a group whose processes have ended.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        call(*args)


def enter_child(targets: Sequence[tuple[int, int]]) -> None:
    """Gives a forked child its own group and only its own descriptors.

    Args:
        targets: (descriptor, its number in the child), of which the highest is the last open one.
    """
    ignore_gone(os.setpgid, 0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Copies above all targets first, since one's number may be another's target.
    copies = [(fcntl.fcntl(each, fcntl.F_DUPFD, 16), number) for each, number in targets]
    for copy, number in copies:
        os.dup2(copy, number)
    highest = max(number for _, number in targets)
    os.closerange(highest + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16))
    sys.argv = [""]


def take_limits(limits: dict[int, int], other_processes: int) -> None:
    """Limits this process, never above its hard limits.

    Args:
        limits: resource number -> limit.
        other_processes: processes of this user that count as well.
    """
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
