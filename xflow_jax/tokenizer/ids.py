"""Token ids of chats, left padding, and texts of responses."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np

from xflow_jax.errors import UserError, require
from xflow_jax.types import Tokenizer


def chat_ids(tokenizer: Tokenizer, messages: str | Sequence[dict[str, str]]) -> list[int]:
    """Applies the chat template, up to the assistant's response.

    Args:
        tokenizer: the tokenizer.
        messages: chat messages {"role": ..., "content": ...}, or a string, which is one message of
            the user.

    Returns:
        Token ids.

    Raises:
        UserError: if the tokenizer has no chat template, as those of base models, or if the
            template fails, or makes no token.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, so prompts must be lists of token ids"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    require(bool(ids), "the chat template of the model's tokenizer makes no token of a prompt")
    return ids


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids on the left.

    Args:
        rows: B rows of token ids.
        pad_id: id of the padding.
        length: P, or None for the longest row.

    Returns:
        (token ids int32 [B, P], mask bool [B, P]). The mask is False at padding.
    """
    length = length or max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return ids, mask


def decode_responses(
    tokenizer: Tokenizer, tokens: np.ndarray, stop_ids: Collection[int]
) -> list[str]:
    """Converts responses to texts, without special tokens.

    Args:
        tokenizer: the tokenizer.
        tokens: responses, int [B, N].
        stop_ids: a text ends before the first of these. Without any, all of it stays.

    Returns:
        B texts.
    """
    rows = (
        itertools.takewhile(lambda token: token not in stop_ids, row)
        for row in np.asarray(tokens).tolist()
    )
    return [tokenizer.decode(list(row), skip_special_tokens=True) for row in rows]
