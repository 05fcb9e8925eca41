"""Atomic writes: results are built beside their destination and renamed when complete.

Errors of the disk become UserErrors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from xflow_jax.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LARGE_ARRAY = 2**24  # bytes


def refuse_existing(path: Path) -> None:
    """Raises UserError if the destination exists."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: the destination exists. Choose another one, or delete it.")


def partial_path(path: Path) -> Path:
    """Returns the place where a destination is built before it is renamed."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def disk_errors(path: Path, note: str = "") -> Iterator[None]:
    """Converts errors of the disk into a UserError.

    Args:
        path: the destination, for the message.
        note: a text to add to the message, about the state of the work.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tensorstore raises ValueErrors that carry the system's error in their text.
        match = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(match[1]) if match else getattr(error, "errno", None)
        if number is None:
            raise
        if number in _DISK_FULL:
            reason = "the disk is full"
        else:
            reason = f"cannot be written: {os.strerror(number)}"
        raise UserError(f"{path}: {reason}{note}") from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Builds a directory that gets its name when it is complete.

    It is deleted if an error occurs.

    Args:
        path: the destination.

    Yields:
        The directory to fill.

    Raises:
        UserError: if the destination exists, or for errors of the disk.
    """
    refuse_existing(path)
    partial = partial_path(path)
    with disk_errors(path):
        if partial.exists():
            raise UserError(
                f"{partial}: it was left by a program that stopped, or it is in use. "
                "Delete it first."
            )
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files that match one of the patterns."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
