"""Readers of public problems, from a jsonl file or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from xflow_jax.errors import UserError
from xflow_jax.input_files import read_jsonl
from xflow_jax.toml_config import format_value

_TYPES = {str: "a text", int: "a whole number", list: "a list of texts"}

# Name of a data set on the hub, its configuration, its splits.
HubDataset: TypeAlias = tuple[str, str | None, tuple[str, ...]]


def read_problems(
    data: Path | None, keys: Mapping[str, type], task: str, hub: HubDataset
) -> list[dict[str, Any]]:
    """Reads the problems of a task.

    Args:
        data: a jsonl or jsonl.gz file with one problem per line. None reads the hub's data set.
        keys: key -> str, int or list (of texts). Every row must have these.
        task: name of the task, for error messages.
        hub: the data set on the hub.

    Raises:
        UserError: the file has another format (with the line), or the hub cannot be reached.
    """
    rows = _load_from_hub(task, *hub) if data is None else read_jsonl(data)
    source = hub[0] if data is None else data
    found = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{source}, line {number} is not a problem of {task}: "
                "the file must be jsonl with one problem per line"
            )
        for key, kind in keys.items():
            if not _has_type(row.get(key), kind):
                state = f"is {format_value(row[key])[:60]}" if key in row else "is missing"
                raise UserError(
                    f"{source}, line {number}: {key} must be {_TYPES[kind]} "
                    f"in a problem of {task}, but it {state}"
                )
        found.append(row)
    if not found:
        raise UserError(f"{source} holds no problem of {task}")
    return found


def _has_type(value: object, kind: type) -> bool:
    if isinstance(value, list):
        return kind is list and all(isinstance(item, str) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _load_from_hub(
    task: str, name: str, config: str | None, splits: tuple[str, ...]
) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        import datasets  # optional, needed only to read from the hub
    except ImportError:
        raise UserError(
            f"give {task}'s public jsonl as --data FILE, "
            "or install datasets to load it from the hub"
        ) from None
    try:
        rows = [
            dict(row)
            for split in splits
            for row in datasets.load_dataset(name, config, split=split)
        ]
    except Exception as error:  # of many kinds, from several libraries
        raise UserError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}): "
            f"give {task}'s public jsonl as --data FILE"
        ) from error
    return enumerate(rows, start=1)
