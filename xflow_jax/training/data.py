"""Training data: random-access sources of pairs and responses."""

from __future__ import annotations

import glob
import os
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from xflow_jax.errors import UserError, require
from xflow_jax.input_files import is_cloud, read_json_lines, read_jsonl, to_path
from xflow_jax.tasks import Task
from xflow_jax.tokenizer import chat_ids, pad_left
from xflow_jax.training.batches import Example, Source
from xflow_jax.types import ModelConfig, Tokenizer

ENDLESS = 2**40  # length of a source without an end
CHECKED_PAIRS = 200  # at the start of a run
MOST_REPLACED = 0.05  # largest share of pairs that are too long
SHARE = re.compile(r"\.\d{5}-of-\d{5}(?=\.\w+$)")  # in the name of a worker's file
SEED_STRIDE = 1_000_003  # distance between the training sets that replace pairs that are too long


class TaskPairs:
    """The endless training set of a task.

    Args:
        task: a task with training pairs.
        seed: number of the training set.
        tokenizer: tokenizer with a chat template.
        prompt_length: P, largest number of prompt tokens.
        gen_length: N, positions of a response. At least the last one is EOS.
        early: number of pairs at the beginning, which have the task's early distribution.

    Raises:
        UserError: if the task has no training pairs or the tokenizer no EOS token.
    """

    def __init__(
        self,
        task: Task[Any],
        seed: int,
        tokenizer: Tokenizer,
        prompt_length: int,
        gen_length: int,
        early: int = 0,
    ):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, which ends a response")
        if task.training_pair is None:
            raise UserError(f"the task {task.name} has no endless training set")
        self.name, self.pair = task.name, task.training_pair
        self.seed, self.tokenizer, self.eos_id = seed, tokenizer, tokenizer.eos_token_id
        self.prompt_length, self.gen_length, self.early = prompt_length, gen_length, early

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        """Returns a pair. Another training set replaces pairs that are too long."""
        seed = self.seed
        while True:
            prompt, response = self._token_ids(seed, index)
            if self._fits(prompt, response):
                break
            seed += SEED_STRIDE  # the index stays, so pairs stay distinct
        lengths = (self.prompt_length, self.gen_length)
        return _make_example(prompt, response, *lengths, self.eos_id, self.eos_id)

    def check_lengths(self, count: int = CHECKED_PAIRS) -> None:
        """Raises UserError unless almost all of the first pairs fit.

        Args:
            count: number of pairs.
        """
        pairs = [self._token_ids(self.seed, index) for index in range(count)]
        long = sum(not self._fits(*pair) for pair in pairs)
        prompt, response = (max(map(len, column)) for column in zip(*pairs, strict=True))
        require(
            long <= MOST_REPLACED * count,
            f"{self.name}: {long} of {count} pairs do not fit prompt_length {self.prompt_length} "
            f"and gen_length {self.gen_length}. They need {prompt} and {response + 1}.",
        )

    def _token_ids(self, seed: int, index: int) -> tuple[list[int], list[int]]:
        request, answer = self.pair(seed, index, index < self.early)
        return chat_ids(self.tokenizer, request), self.tokenizer(answer)["input_ids"]

    def _fits(self, prompt: list[int], response: list[int]) -> bool:
        return len(prompt) <= self.prompt_length and len(response) < self.gen_length


class MixedPairs:
    """Endless pairs of several training sets, of which every batch has one.

    Their lengths may differ, so short answers are not padded to the longest ones.

    Args:
        sources: the training sets.
        weights: relative shares of the batches.
        batch_size: B, pairs of a batch.
        seed: seed of the order.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], batch_size: int, seed: int
    ):
        self.sources, self.weights = list(sources), list(weights)
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return ENDLESS

    def choose(self, batch: int) -> int:
        """Returns the number of the training set of a batch."""
        rng = random.Random(f"batch {self.seed} {batch}")
        return rng.choices(range(len(self.sources)), self.weights)[0]

    def __getitem__(self, index: int) -> Example:
        """Returns a pair. Its index counts over all training sets."""
        return self.sources[self.choose(index // self.batch_size)][index]


def split_evenly(total: int, held_out: int, batch_size: int) -> tuple[list[int], list[int]]:
    """Separates indices that are only measured, spread evenly over all.

    Args:
        total: number of responses.
        held_out: number of responses to separate, rounded down to complete batches.
        batch_size: B, rows of a batch.

    Returns:
        (indices to train on, indices to measure), ascending.

    Raises:
        UserError: if the number is less than a batch, or leaves less than one to train on.
    """
    size = held_out // batch_size * batch_size
    require(
        bool(size) and total - size >= batch_size,
        f"held_out {held_out} must be at least one batch of {batch_size} and leave one of the "
        f"{total} responses to train on",
    )
    taken = {i * total // size for i in range(size)}
    return [i for i in range(total) if i not in taken], sorted(taken)


class Responses:
    """Self-generated responses from jsonl files.

    A line looks like {"prompt_ids": [...], "response_ids": [...]}. All lines are read and checked
    at once.

    Args:
        paths: files, or patterns like "responses.*.jsonl".
        config: configuration of the model.
        prompt_length: P, largest number of prompt tokens.
        gen_length: N, largest number of response tokens.
        only_passed: leave out responses whose "passed" is false.
        limit: lines to read of each file, 0 for all.
        pairs: the endless training set of a task, of which `limit` answers are taken as well.

    Raises:
        UserError: if there are no responses, or if a line is not JSON, has no list of integers
            under a key, holds an id outside the vocabulary, or is too long.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        config: ModelConfig,
        prompt_length: int,
        gen_length: int,
        only_passed: bool = False,
        limit: int = 0,
        pairs: TaskPairs | None = None,
    ):
        self.config, self.prompt_length, self.gen_length = config, prompt_length, gen_length
        self.rows: list[tuple[list[int], list[int]]] = []
        self.pairs = pairs
        for path in _expand_patterns(paths):
            for where, record in islice(read_records(path), limit or None):
                prompt = self._token_ids(record, "prompt_ids", prompt_length, where)
                response = self._token_ids(record, "response_ids", gen_length, where)
                passed = isinstance(record, dict) and record.get("passed", True)
                if passed or not only_passed:
                    self.rows.append((prompt, response))
        # Pairs of a task are made when they are read, since a run may have a million.
        self.indices = list(range(len(self.rows) + (limit if pairs is not None else 0)))
        require(
            bool(self.indices),
            f"{', '.join(map(str, paths))}: no responses in it. Run train.self_generate first.",
        )

    def _token_ids(self, record: object, key: str, longest: int, where: str) -> list[int]:
        """Returns the checked token ids under a key of a record."""
        ids = record.get(key) if isinstance(record, dict) else None
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise UserError(f"{where} has no list of integers under {key!r}")
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_rows]:
            raise UserError(
                f"{where}: {key} holds {bad[0]}, but the vocabulary has ids 0 to "
                f"{self.config.vocab_rows - 1}"
            )
        if len(ids) > longest:
            raise UserError(f"{where}: {len(ids)} {key}, but the run allows {longest}")
        return ids

    def hold_out(self, count: int, batch_size: int) -> list[list[Example]]:
        """Removes responses from the source, spread evenly over the files.

        Args:
            count: number of responses, rounded down to complete batches.
            batch_size: examples of a batch.

        Returns:
            Batches of the removed examples.

        Raises:
            UserError: if the count is less than a batch, or leaves less than one to train on.
        """
        # The files are sorted by the length of the prompts, so their ends are no fair sample.
        rest, taken = split_evenly(len(self), count, batch_size)
        examples = [self[i] for i in taken]
        self.indices = [self.indices[i] for i in rest]
        return [examples[i : i + batch_size] for i in range(0, len(taken), batch_size)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        """Returns an example."""
        place = self.indices[index]
        if place >= len(self.rows) and self.pairs is not None:
            return self.pairs[place - len(self.rows)]
        lengths = (self.prompt_length, self.gen_length)
        return _make_example(*self.rows[place], *lengths, self.config.pad_id, self.config.eos_id)


def _make_example(
    prompt: list[int],
    response: list[int],
    prompt_length: int,
    gen_length: int,
    pad_id: int,
    eos_id: int,
) -> Example:
    """Pads a prompt on the left, and a response with EOS.

    The EOS tokens are trained on, as in LLaDA's own fine-tuning, so the model learns where to end.
    """
    ids, mask = pad_left([prompt], pad_id, prompt_length)
    response = response + [eos_id] * (gen_length - len(response))
    return {"prompt": ids[0], "prompt_mask": mask[0], "response": np.asarray(response, np.int32)}


def _expand_patterns(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Replaces each pattern by its files. Without a match it stays.

    Raises UserError for workers' files beside the merged one, which would count twice.
    """
    files: list[str] = []
    for path in map(str, paths):
        found: list[str] = []
        if "*" in path and is_cloud(path):
            found = sorted(map(str, to_path(path).parent.glob(to_path(path).name)))
        elif "*" in path:
            found = sorted(glob.glob(path))
        files += found or [path]
    for file in files:
        merged = SHARE.sub("", file)
        require(
            merged == file or merged not in files,
            f"{merged} is made of {file}, so their responses would count twice. Name one of them "
            "in data.",
        )
    return files


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Reads the lines of a jsonl file, without an incomplete last line.

    Args:
        path: the file.

    Returns:
        The lines that are not empty. The last one is left out if it has no line break and is not
        JSON, because a crash cut it off.

    Raises:
        UserError: if the file cannot be read, or a line is not JSON.
    """
    return [line for _, line, _ in read_json_lines(path, cut_end=True)]


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, object]]:
    """Parses the lines of `read_lines`.

    Args:
        path: the file.

    Yields:
        ("FILE, line N", value), the former for error messages.

    Raises:
        UserError: as `read_lines`.
    """
    for number, value in read_jsonl(path, cut_end=True):
        yield f"{path}, line {number}", value
