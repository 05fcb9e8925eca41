"""Text to ids and back: a transformers tokenizer, the chat template, left padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xflow_jax.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load_tokenizer(directory: str | Path) -> Any | None:
    """The transformers tokenizer in `directory`, or None where it holds no tokenizer.json; no code of its is run."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        return None
    # transformers would otherwise tell every user that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # heavy, and not every caller has texts

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as error:  # the library raises bare exceptions, as it finds them
        raise UserError(
            f"{directory}/tokenizer.json cannot be read as a tokenizer: {error}"
        ) from error


def chat_ids(tokenizer: Any, messages: str | Sequence[dict[str, str]]) -> list[int]:
    """Ids of a chat up to where the assistant speaks; a plain string is one user's message.

    UserError where the tokenizer has no chat template, as base models' have none.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, so prompts must be lists of token ids"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (ids int32 [B, P], mask bool [B, P]), P = `length` or the longest row; padding is False."""
    length = length or max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return ids, mask


def decode_answers(tokenizer: Any, tokens: np.ndarray, eos_id: int) -> list[str]:
    """Responses int [B, N] -> texts, each up to its first EOS, special tokens left out."""
    rows = [
        row[: row.index(eos_id)] if eos_id in row else row for row in np.asarray(tokens).tolist()
    ]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
