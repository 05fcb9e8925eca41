"""Checksums of a directory's files, by which damage is noticed.

A checksum is the CRC-32C of the bytes. Google's storage computes that of its objects itself, so
nothing is read to write or to compare it. Older records have the CRC-32, which takes three times
as long. Either finds every flipped bit and every damaged run of up to 32 bits, and misses one of
four billion other damages. It is no protection against a person who changes files.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import jax

from xflow_jax.checkpoints.atomic_write import write_atomic
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import is_cloud, list_objects, open_regular, read_json, to_path

try:
    import google_crc32c
except ImportError:  # a machine with JAX alone, on which a checkout still has to run
    google_crc32c = None

CHECKSUM_FILE = "files.json"  # of a converted checkpoint and of an exported model
BLOCK = 2**20  # bytes read at a time, which stay in the cache of a core
SMALL = 2**20  # bytes of a file that is always compared
MOST_THREADS = 8
# Set to 0, it leaves out the comparison of large files, which reads a model once more.
SWITCH = "XFLOW_VERIFY"
CRC32C = "crc32c:"  # before a CRC-32C, in base64 as in Google's storage. A CRC-32 has no prefix

CHANGED = "has another checksum than when it was written"
Listed = Mapping[str, object]  # file -> [size, checksum], or its size alone in old directories


def file_checksum(path: Path, kind: str | None = None) -> str:
    """Computes the checksum of a file, at about 10 GB a second.

    Args:
        path: the file.
        kind: CRC32C, or "" for the CRC-32 of older records, at about 3 GB a second. None: that of
            new records, which is CRC32C if google-crc32c is installed.
    """
    if kind is None:
        kind = CRC32C if google_crc32c is not None else ""
    checksum = 0
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            checksum = (
                google_crc32c.extend(checksum, block) if kind else zlib.crc32(block, checksum)
            )
    if not kind:
        return f"{checksum:08x}"
    return kind + base64.b64encode(checksum.to_bytes(4, "big")).decode()


def _checksum_like(path: Path, like: str) -> str:
    """Computes the checksum of a file in the kind of another one.

    A CRC-32C counts as equal without the package google-crc32c.
    """
    if not like.startswith(CRC32C):
        return file_checksum(path, "")
    return like if google_crc32c is None else file_checksum(path, CRC32C)


def list_files(directory: Path) -> Iterator[Path]:
    """Yields all files below a directory."""
    if is_cloud(directory):
        yield from (directory / name for name in list_objects(directory))
        return
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
    known = _look_up(directory, files)
    todo = [other for other in files if not known[other][1]]
    with ThreadPoolExecutor(_threads()) as pool:
        computed = dict(zip(todo, pool.map(file_checksum, map(files.get, todo)), strict=True))
    listed = {
        other: [size, checksum or computed[other]] for other, (size, checksum) in known.items()
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
    directory = to_path(directory)
    if not (directory / name).exists():
        return None
    try:
        listed = cast("Listed", read_json(directory / name))
        damage = first_damage(directory, listed, large=not is_cloud(directory))
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
    known = _look_up(directory, listed)
    for number, (name, entry) in enumerate(listed.items()):
        size, checksum = entry if isinstance(entry, list) else (entry, None)
        if not isinstance(size, int):
            raise TypeError(f"{name}: {size!r} is no size")
        if name not in known:
            return name, "is missing"
        if known[name][0] != size:
            return name, f"has {known[name][0]} bytes, not {size}"
        if checksum is not None and checksum.startswith(CRC32C) and known[name][1]:
            if checksum != known[name][1]:
                return name, CHANGED
            continue
        mine = not shared or number % jax.process_count() == jax.process_index()
        if checksum is not None and (size < SMALL or (large and mine)):
            todo[name] = checksum
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(lambda name: _checksum_like(directory / name, todo[name]), todo)
        for (name, checksum), actual in zip(todo.items(), found, strict=True):
            if actual != checksum:
                pool.shutdown(wait=False, cancel_futures=True)
                return name, CHANGED
    return None


def _look_up(directory: Path, names: Collection[str]) -> dict[str, tuple[int, str]]:
    """Returns (size, the storage's checksum or "") of existing files."""
    if is_cloud(directory):
        with disk_errors(directory, reading=True):
            found = list_objects(directory)
        return {
            name: (size, CRC32C + checksum if checksum else "")
            for name, (size, checksum) in found.items()
            if name in names
        }
    files = {name: directory / name for name in names}
    return {name: (file.stat().st_size, "") for name, file in files.items() if file.exists()}


def compares_large_files(directory: Path) -> bool:
    """Returns True if a load compares the checksums of large files.

    XFLOW_VERIFY is 1 or 0 for yes or no. Without it, files on a disk are compared. Objects are not,
    because their storage has checksums of its own and they would be transferred twice.
    """
    return os.environ.get(SWITCH, "0" if is_cloud(directory) else "1") != "0"


def _threads() -> int:
    return min(MOST_THREADS, os.cpu_count() or 1)
