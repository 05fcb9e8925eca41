"""Atomic writes: results are built beside their destination and renamed when complete.

Errors of the disk become UserErrors.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from xflow_jax.checkpoints.run_lock import destination_lock
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import file_inside

_LARGE_ARRAY = 2**24  # bytes


def refuse_existing(path: Path) -> None:
    """Raises UserError if the destination exists."""
    if os.path.lexists(path):
        lock = destination_lock(path)
        if lock.file.exists():  # perhaps of a program that was killed after its last rename
            with contextlib.suppress(UserError), lock:
                pass
        raise UserError(f"{path}: the destination exists. Choose another one, or delete it.")


def partial_path(path: Path) -> Path:
    """Returns the place where a destination is built before it is renamed."""
    return path.with_name(path.name + ".partial")


def replaced_path(path: Path) -> Path:
    """Returns the place of an earlier result until it is deleted."""
    return path.with_name(path.name + ".replaced")


@contextlib.contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Builds a directory that gets its name when it is complete.

    It is deleted if an error occurs. One that a killed program left behind is deleted first.

    Args:
        path: the destination.
        replace: replace an earlier directory of this name instead of refusing it.

    Yields:
        The directory to fill.

    Raises:
        UserError: if the destination exists or another process writes it, or for errors of the
            disk.
    """
    partial = partial_path(path)
    if not replace:
        refuse_existing(path)
    with disk_errors(path), destination_lock(path) as lock:
        if not replace:
            refuse_existing(path)
        for left in (partial, replaced_path(path)):
            if os.path.lexists(left) and not lock.inherited:
                raise UserError(
                    f"{left}: its name is needed, but no killed program left it. Delete or rename "
                    "it."
                )
        try:
            for left in (partial, replaced_path(path)):
                _delete(left)
            partial.mkdir(parents=True)
            yield partial
            _move(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.keeps_file = any(map(os.path.lexists, (partial, replaced_path(path))))


def _delete(directory: Path) -> None:
    """Deletes a directory or a link to one, if there is one."""
    if not os.path.lexists(directory):
        return
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def _move(partial: Path, path: Path) -> None:
    """Renames a complete directory, in place of an earlier one."""
    earlier = replaced_path(path)
    if os.path.lexists(path):
        # An earlier directory that is half deleted must not have its name any more.
        path.rename(earlier)
    partial.rename(path)
    _delete(earlier)


def matching_files(source: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the files of a folder that match one of the patterns.

    Raises:
        UserError: if one is a link that leaves the folder.
    """
    return [
        file_inside(source, file.name)
        for pattern in patterns
        for file in sorted(source.glob(pattern))
        if file.is_file()
    ]


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files that match one of the patterns.

    Raises:
        UserError: if one is a link that leaves the source.
    """
    for file in matching_files(source, patterns):
        shutil.copyfile(file, target / file.name)


def release_memory(size: int) -> None:
    """Returns memory that Orbax and tensorstore no longer need to the system.

    Their objects stay in reference cycles, and glibc keeps memory that was freed.

    Args:
        size: bytes of the array that was processed. Nothing happens for small ones.
    """
    if size < _LARGE_ARRAY:
        return
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file in one step.

    No incomplete file is ever visible under its name.

    Args:
        path: the file.
        text: its content.

    Raises:
        UserError: if it cannot be written.
    """
    with disk_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Writes a file that gets its name when it is complete.

    Args:
        path: the file.

    Yields:
        The temporary file to write.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_text(path: Path, text: str) -> None:
    """Appends to a text file.

    The text is on the disk when this returns. If this fails, the file is as before. A killed
    program can leave an incomplete last line.

    Args:
        path: the file.
        text: complete lines.

    Raises:
        UserError: if it cannot be written.
    """
    with disk_errors(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise
