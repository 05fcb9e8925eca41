"""Checksums of a directory's files, by which damage is noticed.

CRC-32 finds every flipped bit and every damaged run of up to 32 bits, and misses one of four
billion other damages. It is no protection against a person who changes files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import jax

from xflow_jax.checkpoints.atomic_write import write_atomic
from xflow_jax.errors import UserError
from xflow_jax.input_files import open_regular, read_json

CHECKSUM_FILE = "files.json"  # of a converted checkpoint and of an exported model
BLOCK = 2**22  # bytes read at a time
SMALL = 2**20  # bytes of a file that is always compared
MOST_THREADS = 8
# Set to 0, it leaves out the comparison of large files, which reads a model once more.
SWITCH = "XFLOW_VERIFY"

Listed = Mapping[str, object]  # file -> [size, checksum], or its size alone in old directories


def file_checksum(path: Path) -> str:
    """Computes the CRC-32 of a file, at about 3 GB a second."""
    checksum = 0
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def list_files(directory: Path) -> Iterator[Path]:
    """Yields all files below a directory."""
    for folder, _, names in sorted(os.walk(directory)):
        yield from (Path(folder) / name for name in sorted(names))


def write_checksums(
    directory: Path,
    name: str,
    without: Collection[str] = (),
    only: Collection[str] | None = None,
) -> None:
    """Writes the size and the checksum of files below a directory.

    Args:
        directory: the directory.
        name: the file to write in it, which does not list itself.
        without: files that are left out, because they still change.
        only: the files to list, or None for all.

    Raises:
        UserError: if it cannot be written.
    """
    found = {str(file.relative_to(directory)): file for file in list_files(directory)}
    files = {
        other: file
        for other, file in found.items()
        if other not in (name, *without) and (only is None or other in only)
    }
    with ThreadPoolExecutor(_threads()) as pool:
        checksums = dict(zip(files, pool.map(file_checksum, files.values()), strict=True))
    listed = {other: [file.stat().st_size, checksums[other]] for other, file in files.items()}
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
        listed = cast("Listed", read_json(directory / name))
        damage = first_damage(directory, listed, large=True)
    except (UserError, ValueError, TypeError, AttributeError):
        return f"{name} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None if damage is None else " ".join(damage)


def first_damage(
    directory: Path, listed: Listed, large: bool, shared: bool = False
) -> tuple[str, str] | None:
    """Searches for a file that has changed since it was listed.

    Args:
        directory: the directory.
        listed: the object of `write_checksums`.
        large: compare large files as well.
        shared: each of several processes compares its share of the large files. All of them call
            this.

    Returns:
        (file, what happened to it), or None.

    Raises:
        OSError: if a file cannot be read.
        TypeError: if `listed` has another form.
        ValueError: as TypeError.
    """
    todo: dict[str, str] = {}
    for number, (name, entry) in enumerate(listed.items()):
        size, checksum = entry if isinstance(entry, list) else (entry, None)
        if not isinstance(size, int):
            raise TypeError(f"{name}: {size!r} is no size")
        file = directory / name
        if not file.exists():
            return name, "is missing"
        if file.stat().st_size != size:
            return name, f"has {file.stat().st_size} bytes, not {size}"
        mine = not shared or number % jax.process_count() == jax.process_index()
        if checksum is not None and (size < SMALL or (large and mine)):
            todo[name] = checksum
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(lambda name: file_checksum(directory / name), todo)
        for (name, checksum), actual in zip(todo.items(), found, strict=True):
            if actual != checksum:
                pool.shutdown(wait=False, cancel_futures=True)
                return name, "has another checksum than when it was written"
    return None


def compares_large_files() -> bool:
    """Returns False if the environment variable XFLOW_VERIFY is 0."""
    return os.environ.get(SWITCH, "1") != "0"


def _threads() -> int:
    return min(MOST_THREADS, os.cpu_count() or 1)
