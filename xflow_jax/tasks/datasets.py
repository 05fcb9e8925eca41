"""Problems of public tasks, from a file of theirs or from the hub, each row checked for what its task needs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xflow_jax.errors import UserError
from xflow_jax.toml_config import format_value

_TYPES = {str: "a text", int: "a whole number", list: "a list of texts"}


Hub = tuple[str, str | None, tuple[str, ...]]  # a data set's name, its configuration, its splits


def read_problems(
    data: Path | None, keys: dict[str, type], task: str, hub: Hub
) -> list[dict[str, Any]]:
    """The rows of `task` as dicts, from its jsonl or jsonl.gz, or, without a file, from the hub's data set.

    keys: key -> str, int or list (of texts), what every row must have. UserError for a file of another format, with the
    line, and where the hub cannot be had.
    """
    rows = _of_hub(task, *hub) if data is None else read_jsonl(data)
    where = hub[0] if data is None else data
    found = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{where}, line {number} is no problem of {task}: the file must be jsonl, a problem a line"
            )
        for key, kind in keys.items():
            value = row.get(key)
            right = isinstance(value, kind) and not isinstance(value, bool)
            if not right or (kind is list and not all(isinstance(item, str) for item in value)):
                has = f"is {format_value(value)[:60]}" if key in row else "is missing"
                raise UserError(
                    f"{where}, line {number}: {key} {has}; a problem of {task} has {_TYPES[kind]} there"
                )
        found.append(row)
    if not found:
        raise UserError(f"{where} holds no problem of {task}")
    return found


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a jsonl or jsonl.gz that is not empty; UserError for any other file."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is neither jsonl nor jsonl.gz"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                raise UserError(
                    f"{path}, line {number} is no JSON: the file must be jsonl"
                ) from None


def _of_hub(
    task: str, name: str, config: str | None, splits: tuple[str, ...]
) -> Iterable[tuple[int, Any]]:
    try:
        import datasets  # only who wants the hub's problems needs it
    except ImportError:
        help_ = f"give {task}'s public jsonl as --data FILE, or install datasets to have it from the hub"
        raise UserError(help_) from None
    try:
        rows = [
            dict(row)
            for split in splits
            for row in datasets.load_dataset(name, config, split=split)
        ]
    except Exception as error:  # of many kinds, from several libraries
        why = f"{name} cannot be had from the hub ({type(error).__name__})"
        raise UserError(f"{why}; give {task}'s public jsonl as --data FILE") from error
    return enumerate(rows, start=1)
