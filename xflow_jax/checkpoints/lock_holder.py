"""A lock as a context manager, and the process that holds it."""

from __future__ import annotations

import os
import socket
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock, as recorded in the lock's file.

    Attributes:
        host: name of its machine.
        pid: its number there.
        started: time at which the system started the process, which tells it from a later process
            of the same number. Empty if the system does not tell.
        since: time at which it took the lock.
    """

    host: str
    pid: int
    started: str
    since: str

    def is_gone(self) -> bool:
        """Returns True if the process ran on this machine and has ended."""
        return self.host == socket.gethostname() and self.started != start_time(self.pid)


class PlaceLock(ABC):
    """The lock of one place. It is a context manager.

    Attributes:
        place: the place, for messages.
        file: the file or object of the lock.
        inherited: True if the lock was taken over from a process that was killed. What it left
            half written at the place is then certainly a program's own, and nobody is writing it.
        keeps_file: True if the file stays when the lock is released, because something half written
            stays too. The next program then takes the lock over.
    """

    def __init__(self, place: Path, file: Path) -> None:
        self.place, self.file = place, file
        self.inherited = self.keeps_file = False

    @abstractmethod
    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UserError: if another process holds it, or if its file cannot be written.
        """

    @abstractmethod
    def release(self) -> None:
        """Gives the lock up, if it is held."""

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def this_process() -> Holder:
    """Describes this process as a holder from now on."""
    pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(socket.gethostname(), pid, start_time(pid), now)


def start_time(pid: int) -> str:
    """Returns the boot and clock tick of a process's start, or ""."""
    try:
        # The name of the program, in brackets, may contain spaces.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    except OSError:
        return ""


def refusal(place: Path, holder: Holder | None) -> str:
    """Returns the message on a lock that another process holds."""
    if holder is None:
        return f"{place}: another process is writing it. Wait until it ends."
    return (
        f"{place}: process {holder.pid} on {holder.host} is writing it since {holder.since}. Wait "
        "until it ends, or choose another place."
    )


def not_a_lock(file: Path) -> str:
    """Returns the message on another file in the place of a lock."""
    return f"{file}: not the lock of a program, whose place it has. Delete or rename it."
