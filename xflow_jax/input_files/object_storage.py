"""Objects in a bucket: reading, writing, listing, and files that grow.

An object is written as a whole and cannot grow. So a file that grows is an object and numbered
pieces beside it, named NAME.SIZE-CHECKSUM. Size and CRC-32 are those of all text before the piece.
So a piece that is not the next one of its file is never read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import posixpath
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 2**25  # bytes of one request
THREADS = 8
# Status of gcsfs, and codes of s3fs.
BEHIND_THE_END = (416, "416", "InvalidRange")
EXISTS = ("412", "PreconditionFailed")
MOST_PIECES = 32  # of a file that grows, before they become one object
_PIECE = re.compile(r".*\.\d{12}-[0-9a-f]{8}")

Name = str | os.PathLike[str]


def storage(name: Name) -> AbstractFileSystem:
    """Returns the file system of a URL."""
    import fsspec  # slow, and not always needed

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also raises what it logs

    scheme = os.fspath(name).partition("://")[0]
    for alias in (scheme, "gcs") if scheme == "gs" else (scheme,):
        # Another process may write the same folder.
        fsspec.config.conf.setdefault(alias, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def object_sizes(folder: Name) -> dict[str, int]:
    """Returns name -> size of the objects below a folder."""
    return {name: int(size) for name, (size, _) in list_objects(folder).items()}


def list_objects(folder: Name) -> dict[str, tuple[int, str]]:
    """Returns name -> (size, CRC-32C or "") of objects below a folder.

    The names are those in the folder. Google's storage computes the checksum, in base64, when it
    stores an object.
    """
    files, url = storage(folder), os.fspath(folder)
    root = files._strip_protocol(url).rstrip("/") + "/"
    with contextlib.suppress(FileNotFoundError):
        found = files.find(url, detail=True)
        return {
            name.removeprefix(root): (int(info["size"]), str(info.get("crc32c", "")))
            for name, info in sorted(found.items())
            if name.startswith(root) and not name.endswith("/")
        }
    return {}


def object_exists(name: Name) -> bool:
    """Returns True for an object or a folder of objects."""
    return bool(storage(name).exists(os.fspath(name)))


def open_object(name: Name) -> BinaryIO:
    """Opens an object for reading, with its pieces if it grows.

    Raises:
        FileNotFoundError: if there is no object.
    """
    url = os.fspath(name)
    names = _listing(url)
    if any(map(_PIECE.fullmatch, names)):
        return io.BytesIO(b"".join(_chain(url, names)))
    return cast(BinaryIO, storage(url).open(url, "rb"))


def read_range(name: Name, start: int, target: memoryview) -> int:
    """Reads bytes of an object into memory, in parallel requests.

    Args:
        name: the object.
        start: position of the first byte.
        target: the memory to fill.

    Returns:
        The number of bytes that were there.
    """
    files, url, size = storage(name), os.fspath(name), len(target)

    def read(offset: int) -> int:
        stop = min(offset + PART, size)
        try:
            data = files.cat_file(url, start=start + offset, end=start + stop)
        except Exception as error:  # of the driver
            if _code(error) not in BEHIND_THE_END:
                raise
            return 0
        target[offset : offset + len(data)] = data
        return len(data)

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(read, range(0, size, PART)))


def _code(error: Exception) -> int | str | None:
    """Returns the code of a driver's error, or None."""
    response = getattr(error.__cause__, "response", {})  # of s3fs
    return getattr(error, "code", None) or response.get("Error", {}).get("Code")


def write_object(name: Name, data: bytes) -> None:
    """Writes an object, in place of an earlier one and its pieces."""
    files, url = storage(name), os.fspath(name)
    files.pipe_file(url, data)
    for piece in filter(_PIECE.fullmatch, _listing(url)):
        files.rm_file(posixpath.join(posixpath.dirname(url), piece))


def create_object(name: Name, data: bytes) -> bool:
    """Writes an object, or returns False if there is one already."""
    try:
        storage(name).pipe_file(os.fspath(name), data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:  # some storage does not name the condition that failed
        if _code(error) not in EXISTS:
            raise
        return False
    return True


def upload(file: Name, name: Name) -> None:
    """Copies a file of the disk to an object."""
    storage(name).put_file(os.fspath(file), os.fspath(name))


def download(name: Name, file: Name) -> None:
    """Copies an object to a file of the disk."""
    storage(name).get_file(os.fspath(name), os.fspath(file))


def delete_object(name: Name) -> None:
    """Deletes an object, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        storage(name).rm_file(os.fspath(name))


def delete_folder(name: Name) -> None:
    """Deletes all objects below a folder."""
    files, url = storage(name), os.fspath(name)
    for below in object_sizes(name):
        files.rm_file(posixpath.join(url, below))


def move_folder(source: Name, target: Name) -> None:
    """Moves all objects below a folder, inside the storage."""
    files = storage(source)
    for below in object_sizes(source):
        files.mv(*(posixpath.join(os.fspath(folder), below) for folder in (source, target)))


def append_object(name: Name, data: bytes) -> None:
    """Appends to a file that grows.

    Only one process may do so at a time. The text is stored when this returns. If this fails, the
    file is as before.
    """
    url = os.fspath(name)
    names = _listing(url)
    if posixpath.basename(url) not in names:
        write_object(url, data)
        return
    last, size, checksum = _ends.get(url, ("", 0, 0))
    if posixpath.basename(last) not in names:  # another process wrote it
        size, checksum = _measure(url, names)
    piece = _piece_name(url, size, checksum)
    storage(url).pipe_file(piece, data)
    _ends[url] = piece, size + len(data), zlib.crc32(data, checksum)
    if sum(bool(_PIECE.fullmatch(other)) for other in names) >= MOST_PIECES:
        merge_pieces(url)


def merge_pieces(name: Name) -> None:
    """Makes one object of a file that grows."""
    url = os.fspath(name)
    names = _listing(url)
    if any(map(_PIECE.fullmatch, names)):
        write_object(url, b"".join(_chain(url, names)))


# URL of a file that grows -> its last piece, and size and checksum of the whole text.
_ends: dict[str, tuple[str, int, int]] = {}


def _measure(url: str, names: dict[str, int]) -> tuple[int, int]:
    """Returns size and checksum of the whole text."""
    size = checksum = 0
    for data in _chain(url, names):
        size, checksum = size + len(data), zlib.crc32(data, checksum)
    return size, checksum


def _listing(url: str) -> dict[str, int]:
    """Returns name -> size of an object and its pieces."""
    folder, name = posixpath.split(url)
    with contextlib.suppress(FileNotFoundError):
        entries = storage(url).ls(folder, detail=True)
        sizes = {posixpath.basename(e["name"]): e["size"] for e in entries if e["type"] == "file"}
        return {
            other: size
            for other, size in sizes.items()
            if other == name or (other.startswith(name + ".") and _PIECE.fullmatch(other))
        }
    return {}


def _chain(url: str, names: dict[str, int]) -> Iterator[bytes]:
    """Yields the object and the pieces that follow it."""
    left = set(names)
    size, checksum, name = 0, 0, url
    while posixpath.basename(name) in left:
        left.remove(posixpath.basename(name))
        data = bytes(storage(url).cat_file(name))
        yield data
        size, checksum = size + len(data), zlib.crc32(data, checksum)
        name = _piece_name(url, size, checksum)


def _piece_name(url: str, size: int, checksum: int) -> str:
    return f"{url}.{size:012d}-{checksum:08x}"
