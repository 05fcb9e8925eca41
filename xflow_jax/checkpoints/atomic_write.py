"""Where results are written: beside their destination first, with the disk's refusals told in one sentence."""

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

_FULL = (errno.ENOSPC, errno.EDQUOT)


_WORTH_IT = 2**24


def refuse_existing(path: Path) -> None:
    """UserError where the destination exists."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: the destination exists; choose another one, or delete it")


def partial_path(path: Path) -> Path:
    """Where a destination is made, to be renamed when it is whole."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def disk_errors(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what the disk refuses while `path` is written into a UserError; `kept` says what is left of the work."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tensorstore raises ValueErrors that carry the system's error in their text
        inside = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(inside[1]) if inside else getattr(error, "errno", None)
        if number is None:
            raise
        what = (
            "the disk is full" if number in _FULL else f"cannot be written: {os.strerror(number)}"
        )
        raise UserError(f"{path}: {what}{kept}") from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `path` at the end, or vanishes if anything goes wrong before.

    Raises UserError where the destination exists, and for what the disk refuses.
    """
    refuse_existing(path)
    partial = partial_path(path)
    with disk_errors(path):
        if partial.exists():
            raise UserError(
                f"{partial}: left behind by a program that was stopped, or in use; delete it first"
            )
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files in `source` that match a pattern."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def release_memory(size: int) -> None:
    """Gives back at once what Orbax and tensorstore are done with, if an array of `size` bytes was worth the trouble.

    What they had hangs in cycles, and glibc keeps what is freed.
    """
    if size < _WORTH_IT:
        return
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc, no need
        ctypes.CDLL(None).malloc_trim(0)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file in one move, so that it is never there by half; UserError where that cannot be done."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
