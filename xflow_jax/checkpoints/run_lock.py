"""Locks on the places that programs write.

The lock is a file that the kernel locks (flock) for the process that holds it. A process that is
killed loses its lock at once, and its file stays until the next program takes it over. The file is
deleted when its lock is released. This is the one module that knows how places are locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from xflow_jax.checkpoints.lock_holder import Holder, PlaceLock, not_a_lock, refusal, this_process
from xflow_jax.checkpoints.object_lock import ObjectLock
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import is_cloud, to_path
from xflow_jax.parallel import multihost

try:
    import fcntl
except ImportError:  # Windows, where the record of the holder has to do
    fcntl = None  # type: ignore[assignment]

FOLDER_LOCK = "run.lock"
# Taking a lock over rewrites the record in place. Its fixed size needs no more room on a full disk.
_RECORD_BYTES = 512
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_ATTEMPTS = 100  # lock files that vanish or are still empty, while their holders come and go


class RunLock(PlaceLock):
    """The lock of a place on a disk."""

    def __init__(self, place: Path, file: Path) -> None:
        super().__init__(place, file)
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock. Missing parent directories are made.

        Raises:
            UserError: if another process holds it, or if its file cannot be written.
        """
        with disk_errors(self.place):
            _make_directory(self.file.parent)
            for _ in range(_ATTEMPTS):
                if self._try():
                    return
                time.sleep(0.01)
        raise UserError(refusal(self.place, None))

    def release(self) -> None:
        """Unlocks the file and deletes it, if the lock is held."""
        if self._descriptor is None:
            return
        # Deleted before it is unlocked, so that nobody can lock the file in between.
        if not self.keeps_file:
            with contextlib.suppress(OSError):
                self.file.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        """Returns True with the lock, False if its file just changed hands."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = self._try_descriptor(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if held:
            self._descriptor = descriptor
        else:
            os.close(descriptor)
        return held

    def _try_descriptor(self, descriptor: int) -> bool:
        before = self._read_holder(descriptor)
        if not _flock(descriptor, before):
            if before is None:  # its holder is about to write the record
                return False
            raise UserError(refusal(self.place, before))
        if not self._is_named(descriptor):  # deleted before it was locked
            return False
        before = self._read_holder(descriptor)
        _write_holder(descriptor, before is None, self.file)
        self.inherited = before is not None
        return True

    def _read_holder(self, descriptor: int) -> Holder | None:
        """Returns the record in the file, or None if it is empty."""
        data = os.pread(descriptor, _RECORD_BYTES + 1, 0)
        if not data.strip(b"\0"):  # after a loss of power, a file may have zeros alone
            return None
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError):
            raise UserError(not_a_lock(self.file)) from None

    def _is_named(self, descriptor: int) -> bool:
        """Returns True if the open file still has the lock's name."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False


def folder_lock(folder: Path) -> PlaceLock:
    """Makes the lock of a folder that several calls fill.

    Its file is inside, so that it is the same under every name of the folder.
    """
    return _make_lock(folder, to_path(folder) / FOLDER_LOCK)


def destination_lock(path: Path) -> PlaceLock:
    """Makes the lock of a file or directory that a program makes.

    Its file is beside the destination, which does not exist at first.
    """
    path = to_path(path)
    resolved = path if is_cloud(path) else path.absolute().parent.resolve() / path.name
    return _make_lock(path, resolved.with_name(resolved.name + ".lock"))


def _make_lock(place: Path, file: Path) -> PlaceLock:
    if is_cloud(file):
        return ObjectLock(place, file)
    return RunLock(place, file)


@contextlib.contextmanager
def locked_by_first_process(lock: PlaceLock) -> Iterator[None]:
    """Holds a lock in the first of the processes of one run.

    All processes must call this.

    Args:
        lock: the lock.

    Raises:
        UserError: in all processes, if another run holds the lock.
    """
    multihost.broadcast_from_first(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _make_directory(directory: Path) -> None:
    """Makes a directory and its parents."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{directory}: a file has the place of a directory. Choose another place."
        ) from None


def _flock(descriptor: int, before: Holder | None) -> bool:
    """Locks an open file, or returns False.

    Without flock on a file system, the record of the holder decides.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _NO_FLOCK:
            raise
        return before is None or before.is_gone()


def _write_holder(descriptor: int, is_new: bool, file: Path) -> None:
    """Writes this process's record, or deletes a new file without it."""
    record = json.dumps(asdict(this_process()))
    try:
        os.pwrite(descriptor, record.encode().ljust(_RECORD_BYTES), 0)
        os.fsync(descriptor)
    except OSError:
        if is_new:
            file.unlink()
        raise
