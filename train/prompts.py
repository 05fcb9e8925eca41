"""Prompts for self-generation: from local files, from a data set of the hub, or microcode's training set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xflow_jax.checkpoints import download_from_hub
from xflow_jax.errors import UserError
from xflow_jax.training import read_lines

FORMATS = (".jsonl", ".parquet")


def read_conversations(name: str) -> Iterator[list[dict[str, str]]]:
    """The conversations of a data set, each up to where the assistant is to speak.

    name: a .jsonl or .parquet file whose records have `messages` or `prompt`, a folder of such files, or a data set of
    the hub, of which these files are fetched. Answers in the data are left out: ours take their place. UserError names
    the file and line of a bad record.
    """
    empty = True
    for file in _files(name):
        for where, record in _records(file):
            empty = False
            yield _conversation(record, where)
    if empty:
        raise UserError(f"{name}: no prompts in it")


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    files = _found(path) if path.is_dir() else _from_hub(name)
    if not files:
        raise UserError(f"{name}: there is no {' or '.join(FORMATS)} file in it")
    return files


def _found(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in FORMATS)


def _from_hub(name: str) -> list[Path]:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).suffix in FORMATS:
        raise UserError(f"{name}: there is no such file")
    return _found(download_from_hub(name, "dataset", "file", [f"*{suffix}" for suffix in FORMATS]))


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of each record of a file."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f'{file}: parquet files need pyarrow; pip install "xflow-jax[data]"'
            ) from None
        for number, record in enumerate(parquet.read_table(file).to_pylist(), start=1):
            yield f"{file}, record {number}", record
        return
    for number, line in enumerate(read_lines(file), start=1):
        where = f"{file}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is no JSON: {error}") from None


def _conversation(record: Any, where: str) -> list[dict[str, str]]:
    asked = None
    if isinstance(record, dict):
        asked = record.get("messages") or record.get("prompt")
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise UserError(f"{where} has neither `messages` nor `prompt`")
    for message in asked:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise UserError(
                f"{where}: each of its messages must have a role and a content, both text"
            )
    asked = [{key: message[key] for key in ("role", "content")} for message in asked]
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise UserError(f"{where}: nobody asks anything in its messages")
    return asked
