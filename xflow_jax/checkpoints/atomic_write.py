"""Atomic writes: results are built beside their destination and renamed when complete.

Object storage renames nothing in one step. There, files are uploaded when they are complete, and
the file that makes a directory a model comes last. Errors of the disk become UserErrors.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from xflow_jax.checkpoints.lock_holder import PlaceLock
from xflow_jax.checkpoints.run_lock import destination_lock
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import (
    append_object,
    delete_folder,
    delete_object,
    download,
    file_inside,
    is_cloud,
    merge_pieces,
    move_folder,
    object_exists,
    object_sizes,
    to_path,
    upload,
    write_object,
)

_LARGE_ARRAY = 2**24  # bytes


# Files that come last in a directory in object storage. The first completes a Hugging Face model.
# The second completes a converted checkpoint.
MARKERS = ("config.json", "files.json")
CONVERTED = "_CHECKPOINT_METADATA"


def refuse_existing(path: Path) -> None:
    """Raises UserError if the destination exists.

    In object storage, a directory that a killed program left incomplete does not count.
    """
    if is_cloud(path):
        with disk_errors(path):
            exists = object_exists(path) and (not _is_left_over(path) or _is_complete(path))
    else:
        exists = os.path.lexists(path)
    if exists:
        lock = destination_lock(path)
        if lock.file.exists():  # perhaps of a program that was killed after its last rename
            with contextlib.suppress(UserError), lock:
                pass
        raise UserError(f"{path}: the destination exists. Choose another one, or delete it.")


def _is_complete(path: Path) -> bool:
    """Returns True if a directory in object storage has its last file."""
    model, checkpoint = MARKERS
    return object_exists(path / model) or (
        object_exists(path / checkpoint) and object_exists(path / CONVERTED)
    )


def _is_left_over(path: Path) -> bool:
    """Returns True if a place in object storage has a lock."""
    return destination_lock(path).file.exists()


def exists(path: Path) -> bool:
    """Returns True if there is anything at a place."""
    return object_exists(path) if is_cloud(path) else os.path.lexists(path)


def delete_directory(path: Path) -> None:
    """Deletes a directory with its content, on a disk without errors."""
    if is_cloud(path):
        delete_folder(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_directory(source: Path, target: Path) -> None:
    """Moves a directory to a place that is free."""
    if is_cloud(source):
        move_folder(source, target)
    else:
        source.rename(target)


def make_directory(path: Path) -> None:
    """Makes a directory and its parents. Object storage needs none."""
    if not is_cloud(path):
        path.mkdir(parents=True, exist_ok=True)


def partial_path(path: Path) -> Path:
    """Returns the place where a destination is built before it is renamed.

    In object storage this is the destination itself, which is complete with one of MARKERS.
    """
    if is_cloud(path):
        return path
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
        if is_cloud(path):
            with _uploaded_directory(path, replace, lock) as partial:
                yield partial
            return
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


@contextlib.contextmanager
def _uploaded_directory(path: Path, replace: bool, lock: PlaceLock) -> Iterator[Path]:
    """Builds a directory on the disk, and uploads its marker last.

    An earlier directory loses its marker first, so that a mixture never counts as complete.
    """
    with tempfile.TemporaryDirectory(prefix="xflow-upload-") as folder:
        partial = Path(folder) / path.name
        partial.mkdir()
        yield partial
        lock.keeps_file = True
        before = object_sizes(path)
        if before and not replace and not lock.inherited:
            raise UserError(f"{path}: the destination exists. Choose another one, or delete it.")
        for name in sorted(before, key=_after_markers):
            delete_object(path / name)
        names = [str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()]
        for name in sorted(names, key=_after_markers, reverse=True):
            upload(partial / name, path / name)
        lock.keeps_file = False


def _after_markers(name: str) -> tuple[bool, str]:
    """Sorts the markers before all other files."""
    return name not in MARKERS, name


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
        copy_file(file, target / file.name)


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file, on disks or in object storage."""
    if is_cloud(target):
        write_object(target, source.read_bytes())
    elif is_cloud(source):
        download(source, target)
    else:
        shutil.copyfile(source, target)


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
    with disk_errors(path):
        if is_cloud(path):
            write_object(to_path(path), text.encode())
            return
        with atomic_file(path) as temporary:
            temporary.write_bytes(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Writes a file that gets its name when it is complete.

    Args:
        path: the file.

    Yields:
        The temporary file to write, on a disk.
    """
    if is_cloud(path):
        with tempfile.TemporaryDirectory(prefix="xflow-upload-") as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, to_path(path))
        return
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


def close_text(path: Path) -> None:
    """Makes one object of the pieces of a text file."""
    if is_cloud(path):
        with disk_errors(path):
            merge_pieces(path)


def append_text(path: Path, text: str) -> None:
    """Appends to a text file.

    The text is on the disk when this returns. If this fails, the file is as before. A killed
    program can leave an incomplete last line. In object storage the text is a new piece of the
    file (`xflow_jax.input_files.object_storage`).

    Args:
        path: the file.
        text: complete lines.

    Raises:
        UserError: if it cannot be written.
    """
    if is_cloud(path):
        with disk_errors(path):
            append_object(path, text.encode())
        return
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
