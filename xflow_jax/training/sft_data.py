"""Data of supervised fine-tuning: token ids of conversations, in buckets of lengths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from xflow_jax.errors import UserError, require
from xflow_jax.tokenizer import chat_ids
from xflow_jax.training.batches import BatchIterator, Example, read_options, stack_examples
from xflow_jax.training.data import ENDLESS, split_evenly
from xflow_jax.types import ModelConfig, Tokenizer

Turns: TypeAlias = Literal["last", "each"]
# (place for error messages, chat messages {"role": ..., "content": ...} that end with a response)
Dialogue: TypeAlias = tuple[str, list[dict[str, str]]]


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and its response.

    Attributes:
        prompt: token ids up to the response, of all earlier turns.
        response: token ids of the response, without EOS.
    """

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        """Positions that the pair needs with one EOS."""
        return len(self.prompt) + len(self.response) + 1


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """Finds the token that the chat template writes after a response.

    Args:
        tokenizer: tokenizer with a chat template.

    Returns:
        The first special token after a response, or None if there is none.
    """
    content = "response"
    turns = [{"role": "user", "content": "request"}, {"role": "assistant", "content": content}]
    ids = tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=False, return_dict=False
    )
    tail = tokenizer.decode(ids).rpartition(content)[2]
    after = tokenizer.encode(tail, add_special_tokens=False)
    return next((i for i in after if not tokenizer.decode([i], skip_special_tokens=True)), None)


def tokenize_dialogues(
    dialogues: Iterable[Dialogue],
    tokenizer: Tokenizer,
    config: ModelConfig,
    turns: Turns = "last",
    end_of_turn: bool = True,
) -> list[TokenizedPair]:
    """Converts conversations to pairs of token ids.

    The prompt is what the chat template makes of all turns before a response, as in generation.

    Args:
        dialogues: conversations.
        tokenizer: tokenizer with a chat template.
        config: configuration of the model.
        turns: "last" takes the last response of a conversation. "each" makes a pair of every turn
            of the assistant that has a turn before it.
        end_of_turn: True to end a response by the template's own token (`end_of_turn_id`).

    Returns:
        The pairs, in the order of the data.

    Raises:
        UserError: if the tokenizer has no chat template, if a response is empty, or if a token is
            not of the model.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, which makes prompts of messages. Take an "
            "instruct model, or add chat_template to its tokenizer_config.json."
        )
    end = end_of_turn_id(tokenizer) if end_of_turn else None
    ending = [] if end in (None, config.eos_id) else [end]
    pairs = []
    for where, messages in dialogues:
        spoken = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        for turn in filter(None, spoken[-1:] if turns == "last" else spoken):
            prompt = chat_ids(tokenizer, messages[:turn])
            text = messages[turn]["content"]
            require(bool(text.strip()), f"{where}: a response of the assistant in it is empty")
            response = tokenizer.encode(text, add_special_tokens=False) + ending
            _check_ids(prompt + response, config, where)
            pairs.append(TokenizedPair(prompt, response))
    return pairs


def _check_ids(ids: list[int], config: ModelConfig, where: str) -> None:
    """Raises UserError for an id outside the vocabulary of the model."""
    require(
        max(ids) < config.vocab_rows,
        f"{where}: the tokenizer makes the id {max(ids)} of it, but the model has ids 0 to "
        f"{config.vocab_rows - 1}",
    )


def split_pairs(
    pairs: Sequence[TokenizedPair], held_out: int, batch_size: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Separates pairs that are only measured, spread evenly over the data.

    Args:
        pairs: the pairs.
        held_out: number of pairs to separate, rounded down to complete batches.
        batch_size: B, rows of a batch.

    Returns:
        (pairs to train on, pairs to measure).

    Raises:
        UserError: if the number is less than a batch, or leaves less than one to train on.
    """
    rest, taken = split_evenly(len(pairs), held_out, batch_size)
    return [pairs[i] for i in rest], [pairs[i] for i in taken]


@dataclass(frozen=True)
class Canvas:
    """The rows that pairs fill.

    Attributes:
        lengths: lengths of the rows, ascending. A batch has one of them.
        batch_size: B, rows of a batch.
        eos_id: id of EOS, which fills a row after its response.
        block_length: positions of a block, 0 for full attention.
        group_by_length: batches of pairs with one shortest length, not of random pairs.
    """

    lengths: tuple[int, ...]
    batch_size: int
    eos_id: int
    block_length: int = 0
    group_by_length: bool = False

    def example(self, pair: TokenizedPair, length: int) -> Example:
        """Fills a row with a pair.

        The EOS tokens count in the loss, as in LLaDA's own fine-tuning. A block-causal decoder
        stops after the block with an EOS, so there those of later blocks do not count.

        Args:
            pair: the pair.
            length: one of the lengths, which holds the pair.

        Returns:
            "tokens" int32 [L], and "response" bool [L], True at positions that count.
        """
        tokens = np.full(length, self.eos_id, np.int32)
        tokens[: pair.length - 1] = pair.prompt + pair.response
        place, end = np.arange(length), length
        if self.block_length:
            end = -(-pair.length // self.block_length) * self.block_length
        return {"tokens": tokens, "response": (place >= len(pair.prompt)) & (place < end)}


class BucketedPairs:
    """Endless shuffled epochs of pairs, in batches of one length each.

    A batch of random pairs has the shortest length that holds its longest pair. In batches that are
    grouped by length, the pairs of a length that do not fill a batch join the next longer one.
    Pairs at the end of an epoch that fill no batch wait for the next one. Batch n is the same in
    every process and in a continued run.

    Args:
        pairs: the pairs, none longer than the longest row.
        canvas: the rows.
        seed: seed of the order.
        rows: rows of each batch to make (`local_rows`), or None for all.

    Attributes:
        batches: batches of an epoch.
    """

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        canvas: Canvas,
        seed: int = 0,
        rows: np.ndarray | None = None,
    ):
        self.pairs, self.canvas, self.seed = pairs, canvas, seed
        self.rows = np.arange(canvas.batch_size) if rows is None else rows
        self.batches = len(pairs) // canvas.batch_size
        self._own = np.asarray([bisect_left(canvas.lengths, pair.length) for pair in pairs], int)
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Example:
        """Returns this process's rows of a batch."""
        epoch, index = divmod(number, self.batches)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.epoch(epoch))
        length, members = self._epoch[1][index]
        return stack_examples(
            [self.canvas.example(self.pairs[i], length) for i in members[self.rows]]
        )

    def epoch(self, number: int) -> list[tuple[int, np.ndarray]]:
        """Returns the batches of an epoch, each as (length, indices of pairs)."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.pairs))
        if self.canvas.group_by_length:
            order = order[np.argsort(self._own[order], kind="stable")]
        size = self.canvas.batch_size
        parts = order[: self.batches * size].reshape(self.batches, size)
        batches = [(self.canvas.lengths[self._own[part].max()], part) for part in parts]
        return [batches[i] for i in rng.permutation(len(batches))]


def iterate_batches(source: BucketedPairs) -> BatchIterator:
    """Iterates over the batches of a source.

    The position can be saved. A thread reads ahead.

    Args:
        source: the pairs.
    """
    import grain

    return iter(grain.MapDataset.source(source).to_iter_dataset(read_options()))
