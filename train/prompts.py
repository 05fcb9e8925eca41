"""Prompts for self-generation and conversations for fine-tuning, from files or the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from xflow_jax.checkpoints import download_from_hub
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files import is_cloud, object_sizes, open_regular, to_path
from xflow_jax.training import Dialogue, read_records

FORMATS = (".jsonl", ".parquet")


def read_conversations(name: str) -> Iterator[list[dict[str, str]]]:
    """Reads conversations, each up to the assistant's next turn.

    Records have `messages` or `prompt`. A last answer in the data is left out, because the model
    generates its own.

    Args:
        name: a .jsonl or .parquet file, a folder of such files, or a data set of the hub, of which
            such files are downloaded.

    Yields:
        Chat messages {"role": ..., "content": ...}.

    Raises:
        UserError: if there are no files or no prompts, or for a bad record.
    """
    empty = True
    for file in _find_files(name):
        for where, record in _read_file(file):
            empty = False
            yield _conversation(record, where)
    require(not empty, f"{name}: no prompts in it")


def read_dialogues(name: str) -> Iterator[Dialogue]:
    """Reads conversations that end with a response of the assistant.

    Records have `messages`, or `prompt` (a text, or messages) and `response`.

    Args:
        name: as in `read_conversations`.

    Yields:
        (place for error messages, chat messages {"role": ..., "content": ...}).

    Raises:
        UserError: if there are no files or no conversations, or for a bad record.
    """
    empty = True
    for file in _find_files(name):
        for where, record in _read_file(file):
            empty = False
            yield where, _dialogue(record, where)
    require(not empty, f"{name}: no conversations in it")


def _dialogue(record: object, where: str) -> list[dict[str, str]]:
    """Returns the checked messages of a record that end with a response."""
    messages = _messages(record, where)
    if isinstance(record, dict) and not record.get("messages"):
        response = record.get("response")
        if not isinstance(response, str):
            raise UserError(f"{where} has a `prompt`, but no text under `response`")
        return [*messages, {"role": "assistant", "content": response}]
    require(
        messages[-1]["role"] == "assistant",
        f"{where}: its last message is not the assistant's, so it has no response to train on",
    )
    require(len(messages) > 1, f"{where}: its messages hold no request")
    return messages


def _find_files(name: str) -> list[Path]:
    """Returns the files of a data set."""
    try:
        path = to_path(name).expanduser()
        if is_cloud(path):
            return _find_objects(path)
        if path.is_file():
            return [path]
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        raise UserError(f"{name}: there is no such file") from None
    require(is_folder or not path.exists(), f"{name}: it is a pipe or a device, not a file")
    files = _list_folder(path) if is_folder else _download(name)
    require(bool(files), f"{name}: there is no {' or '.join(FORMATS)} file in it")
    return files


def _find_objects(path: Path) -> list[Path]:
    """Returns an object, or the files in a folder of object storage."""
    if path.suffix in FORMATS:
        return [path]
    with disk_errors(path, reading=True):
        names = [name for name in object_sizes(path) if name.endswith(FORMATS)]
    require(bool(names), f"{path}: there is no {' or '.join(FORMATS)} file in it")
    return [path / name for name in names]


def _list_folder(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in FORMATS and file.is_file())


def _download(name: str) -> list[Path]:
    """Downloads a data set OWNER/NAME of the hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.endswith(FORMATS):
        raise UserError(f"{name}: there is no such file")
    patterns = [f"*{suffix}" for suffix in FORMATS]
    return _list_folder(download_from_hub(name, "dataset", "file", patterns))


def _read_file(file: Path) -> Iterator[tuple[str, object]]:
    """Yields (place for error messages, record)."""
    if file.suffix != ".parquet":
        yield from read_records(file)
        return
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f'{file}: parquet files need pyarrow. Install it with pip install "xflow-jax[data]".'
        ) from None
    number = 0
    try:
        with open_regular(file) as opened:
            for batch in parquet.ParquetFile(opened).iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, record {number}", record
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file}: cannot be read after {number} records: {reason}") from None


def _conversation(record: object, where: str) -> list[dict[str, str]]:
    """Returns the checked messages of a record, without answers at the end."""
    messages = _messages(record, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    require(bool(messages), f"{where}: its messages hold no request")
    return messages


def _messages(record: object, where: str) -> list[dict[str, str]]:
    """Returns the checked messages of a record. A prompt is one."""
    messages = None
    if isinstance(record, dict):
        messages = record.get("messages") or record.get("prompt")
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has neither `messages` nor `prompt`")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UserError(
                f"{where}: each of its messages must have a role and a content, both text"
            )
    return [{key: message[key] for key in ("role", "content")} for message in messages]
