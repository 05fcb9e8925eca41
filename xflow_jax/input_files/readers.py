"""Limited readers of text, JSON, jsonl and TOML files.

A bad file raises UserError. Every reader opens regular files only, so it never waits for a pipe or
a device. Sizes and depths are limited, so a small file cannot fill the memory.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import stat
import tempfile
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files.object_storage import download, open_object
from xflow_jax.input_files.paths import is_cloud, to_path

MOST_BYTES = 2**26  # of a JSON or TOML file, and of a line of jsonl
MOST_DEPTH = 100  # lists and objects inside each other
# A compressed file may grow this many times, and by MOST_BYTES beyond that. Texts compress 3 to 20
# times, and a file of one repeated byte 1,000 times.
MOST_GROWTH = 100

_CHUNK = 2**22
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Dots that join parts of a TOML key. The time of tomllib grows with the square of their number.
_LONG_KEY = re.compile(r"(?:\.[ \t]*(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*){64}")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file, or an object, for reading.

    Raises:
        UserError: if there is no such file, or if it is a folder, a pipe or a device.
    """
    if is_cloud(path):
        with disk_errors(path, reading=True):
            return open_object(to_path(path))
    try:
        # Without O_NONBLOCK this would wait for a writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or half of a surrogate pair in the name
        raise UserError(f"{path}: cannot be read: no file can have this name") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{path}: cannot be read: it is {kind}, not a file")
    return os.fdopen(descriptor, "rb")


def file_size(path: str | os.PathLike[str]) -> int:
    """Returns the bytes of a regular file or of an object.

    Raises:
        UserError: as `open_regular`.
    """
    with open_regular(path) as file:
        return file.seek(0, os.SEEK_END)


def read_bytes(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Reads a file of limited size.

    Raises:
        UserError: if it cannot be read, or if it has more than `most` bytes.
    """
    try:
        with disk_errors(path, reading=True), open_regular(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    require(len(data) <= most, f"{path}: cannot be read: it has more than {most} bytes")
    return data


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Reads a text file in UTF-8.

    A byte order mark at its beginning is left out.

    Raises:
        UserError: as `read_bytes`, or if it is not UTF-8.
    """
    return _decode(read_bytes(path, most), str(path))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error}") from None


def read_json(path: str | os.PathLike[str]) -> object:
    """Reads a JSON file.

    Raises:
        UserError: if the file cannot be read, or as `parse_json`.
    """
    return parse_json(read_text(path), f"{path}: not valid JSON")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, object]:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: as `read_json`, or if the file holds another value.
    """
    value = read_json(path)
    require(isinstance(value, dict), f"{path}: it must hold a JSON object")
    return cast("dict[str, object]", value)


def parse_json(text: str, where: str) -> object:
    """Parses JSON.

    Args:
        text: the text.
        where: the place of the text, the beginning of a message.

    Returns:
        The value.

    Raises:
        UserError: if the text is not JSON, has a key twice in an object, is nested deeper than
            MOST_DEPTH, or holds half of a surrogate pair, which is no text.
    """
    require(bool(text.strip()), f"{where}: it is empty")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise UserError(f"{where}: {error.msg} at {line}column {error.colno}") from None
    except ValueError as error:  # an integer of too many digits, or a repeated key
        reason = str(error) if "key" in str(error) else "it holds a number of too many digits"
        raise UserError(f"{where}: {reason}") from None
    # Without so many brackets it cannot be so deep.
    if text.count("[") + text.count("{") > MOST_DEPTH:
        require(not _deeper_than(value, MOST_DEPTH), f"{where}: {_TOO_DEEP}")
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: it holds half of a surrogate pair") from None
    return value


_TOO_DEEP = f"it is nested deeper than {MOST_DEPTH} levels"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(repeated)[:60]} is there twice")
    return found


def _deeper_than(value: object, levels: int) -> bool:
    """Returns True if containers are nested deeper than `levels`."""
    layer = [value]
    for _ in range(levels + 1):
        containers = [x for x in layer if isinstance(x, dict | list) and x]
        layer = [y for x in containers for y in (x.values() if isinstance(x, dict) else x)]
        if not layer:
            return False
    return True


def read_toml(path: str | os.PathLike[str]) -> dict[str, object]:
    """Reads a TOML file.

    Raises:
        UserError: if the file cannot be read, or as `parse_toml`.
    """
    return parse_toml(read_text(path), f"{path}: not valid TOML")


def parse_toml(text: str, where: str) -> dict[str, object]:
    """Parses TOML.

    Args:
        text: the text.
        where: the place of the text, the beginning of a message.

    Returns:
        The table.

    Raises:
        UserError: if the text is not TOML, or is nested too deeply.
    """
    require(_LONG_KEY.search(text) is None, f"{where}: a key has more than 64 dots")
    try:
        # A carriage return alone is no line break of TOML.
        table = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:
        raise UserError(f"{where}: it holds a number of too many digits") from None
    require(not _deeper_than(table, MOST_DEPTH), f"{where}: {_TOO_DEEP}")
    return table


def read_jsonl(path: str | os.PathLike[str], cut_end: bool = False) -> Iterator[tuple[int, object]]:
    """Yields (line number, value) for the lines of a jsonl file.

    Arguments and errors are those of `read_json_lines`.
    """
    return ((number, value) for number, _, value in read_json_lines(path, cut_end))


def read_json_lines(
    path: str | os.PathLike[str], cut_end: bool = False
) -> Iterator[tuple[int, str, object]]:
    """Yields (line number, text, value) for the lines of a jsonl file.

    The file may be compressed by gzip. Empty lines are left out.

    Args:
        path: the file.
        cut_end: leave out a last line that has no line break and is not JSON, because a crash cut
            it off.

    Raises:
        UserError: if the file cannot be read, or if a line is not JSON. The message has its number.
    """
    for number, data, complete in _lines(path):
        where = f"{path}, line {number} is no JSON"
        try:
            text = _decode(data, f"{path}, line {number}")
            value = parse_json(text, where)
        except UserError:
            if cut_end and not complete:
                return
            raise
        yield number, text, value


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (line number, line, ends with a line break), without empty lines."""
    number, start = 1, b""
    for chunk in _chunks(path):
        data = start + chunk
        end = data.rfind(b"\n") + 1
        first, start = 0, data[end:]
        # The search skips empty lines faster than a loop.
        for match in re.finditer(rb"\S[^\n]*", data[:end]):
            number += data.count(b"\n", first, match.start())
            first = match.start()
            yield number, match[0], True
        number += data.count(b"\n", first, end)
        require(
            len(start) <= MOST_BYTES,
            f"{path}: cannot be read: line {number} has more than {MOST_BYTES} bytes",
        )
    if start.strip():
        yield number, start, False


def _chunks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the bytes of a file, decompressed, without a byte order mark."""
    with open_regular(path) as raw:
        compressed = raw.read(2) == _GZIP
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        most, total, first = MOST_BYTES + MOST_GROWTH * size, 0, True
        file: io.BufferedIOBase | BinaryIO = gzip.GzipFile(fileobj=raw) if compressed else raw
        while True:
            try:
                chunk = file.read(_CHUNK)
            except (OSError, EOFError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or "it is neither jsonl nor jsonl.gz"
                raise UserError(f"{path}: cannot be read: {reason}") from None
            total += len(chunk)
            if compressed and total > most:
                raise UserError(
                    f"{path}: cannot be read: it grows more than {MOST_GROWTH} times when it is "
                    "decompressed"
                )
            if not chunk:
                return
            yield chunk.removeprefix(_BOM) if first else chunk
            first = False


def file_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder.

    A link out of the folder is not followed. Links of the hub's cache are: there, a snapshot of a
    model links to files in the folder `blobs` of the same model.

    Args:
        folder: the folder.
        name: name of the file, which may be missing.

    Returns:
        The path.

    Raises:
        UserError: if the file is a link that leaves the folder.
    """
    path = folder / name
    if is_cloud(path):
        return path
    if not os.path.islink(path):  # Path.is_symlink fails for long names
        return path
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if any(real.is_relative_to(place) for place in homes):
        return path
    raise UserError(
        f"{path}: it is a link that leaves the folder of the model. Put the file itself there."
    )


@contextlib.contextmanager
def local_file(name: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a file of the disk with the content of a place.

    It serves libraries that know disks only. An object is copied for the time of the block.

    Raises:
        UserError: if an object cannot be read.
    """
    path = to_path(name)
    if not is_cloud(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="xflow-download-") as folder:
        copy = Path(folder) / path.name
        with disk_errors(path, reading=True):
            download(path, copy)
        yield copy
