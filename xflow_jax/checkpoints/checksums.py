"""Checksums of a directory's files, by which damage is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from xflow_jax.checkpoints.atomic_write import write_atomic

BLOCK = 2**24  # bytes read at a time


def file_checksum(path: Path) -> str:
    """Computes the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def list_files(directory: Path) -> Iterator[Path]:
    """Yields all files below a directory."""
    for folder, _, names in sorted(os.walk(directory)):
        yield from (Path(folder) / name for name in sorted(names))


def write_checksums(directory: Path, name: str, without: Collection[str] = ()) -> None:
    """Writes the size and the sha256 of all files below a directory.

    Args:
        directory: the directory.
        name: the file to write in it, which does not list itself.
        without: files that are left out, because they still change.

    Raises:
        UserError: if it cannot be written.
    """
    listed = {
        str(file.relative_to(directory)): [file.stat().st_size, file_checksum(file)]
        for file in list_files(directory)
        if str(file.relative_to(directory)) not in (name, *without)
    }
    write_atomic(directory / name, json.dumps(listed, indent=1) + "\n")


def find_damage(directory: Path, name: str) -> str | None:
    """Compares the files below a directory with their checksums.

    Args:
        directory: the directory.
        name: the file of `write_checksums`.

    Returns:
        The first damage, as the end of a sentence, or None. A directory without checksums counts
        as whole.
    """
    if not (directory / name).exists():
        return None
    try:
        listed = json.loads((directory / name).read_text())
        for other, (size, checksum) in listed.items():
            file = directory / other
            if not file.exists():
                return f"{other} is missing"
            if file.stat().st_size != size:
                return f"{other} has {file.stat().st_size} bytes, not {size}"
            if file_checksum(file) != checksum:
                return f"{other} has another checksum than when it was written"
    except (ValueError, TypeError, AttributeError):
        return f"{name} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None
