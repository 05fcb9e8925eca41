"""Mask token of a model whose config.json does not name it.

Some families leave it to the tokenizer, as an added token with a name of the family. A wrong mask
token gives wrong answers without an error, so it is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from xflow_jax.checkpoints.huggingface import GENERATION_FILE
from xflow_jax.errors import UserError, describe, require
from xflow_jax.input_files import file_inside, read_json
from xflow_jax.types import ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def resolve_mask_id(
    config: ModelConfig, directory: Path, mask_id: int | None = None
) -> ModelConfig:
    """Completes a configuration with the id of its mask token.

    Args:
        config: the configuration.
        directory: directory with the files of the tokenizer.
        mask_id: the id as the user gives it, which comes first, or None.

    Returns:
        The configuration. It stays without an id if no file has one.

    Raises:
        UserError: if the given id is no token, or if files of the tokenizer contradict each other.
    """
    if mask_id is not None:
        right = isinstance(mask_id, int) and not isinstance(mask_id, bool)
        require(right, f"mask_id must be a token id, not {describe(mask_id)}")
        return config.with_mask_id(mask_id)
    if config.given_mask_id is not None:
        return config
    found = dict(_find_ids(directory, config.mask_token_names))
    if len({*found.values()}) > 1:
        places = " and ".join(f"{token} in {place}" for place, token in found.items())
        raise UserError(
            f"{directory}: the mask token is {places}. Correct one of the files, or give "
            "--mask-id ID (mask_id=ID to xflow_jax.load)."
        )
    return config.with_mask_id(next(iter(found.values()))) if found else config


def _find_ids(directory: Path, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yields (file, id) of each file that has a mask token."""
    options = read_object(directory, GENERATION_FILE)
    if isinstance(token := options.get("mask_token_id"), int):
        yield GENERATION_FILE, token
    for file in TOKENIZER_FILES:
        for name, token in added_tokens(read_object(directory, file)):
            if name in names and isinstance(token, int):
                yield file, token


def read_object(directory: Path, name: str) -> Mapping[str, object]:
    """Returns a JSON object in a directory, or an empty one."""
    file = file_inside(directory, name)
    value = read_json(file) if file.is_file() else {}
    return value if isinstance(value, dict) else {}


def added_tokens(tokenizer: Mapping[str, object]) -> Iterator[tuple[object, object]]:
    """Yields (text, id) of the added tokens in a file of transformers."""
    tokens = tokenizer.get("added_tokens")
    for entry in tokens if isinstance(tokens, list) else []:  # tokenizer.json
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")
    table = tokenizer.get("added_tokens_decoder")
    for number, entry in table.items() if isinstance(table, dict) else []:  # tokenizer_config.json
        if isinstance(entry, dict) and number.isdecimal() and len(number) < 10:
            yield entry.get("content"), int(number)
    yield from tokenizer.items()  # added_tokens.json
