"""Training data: random-access sources, tokenised and batched by grain, whose position can be saved and restored."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from xflow_jax.errors import UserError
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids, pad_left

ENDLESS = 2**40


class MicrocodePairs:
    """The endless microcode training set number `seed` as a random-access source; each pair fits the given lengths.

    The first `wide` pairs are written in more varied ways than the rest.
    """

    def __init__(
        self, seed: int, tokenizer: Any, prompt_length: int, gen_length: int, wide: int = 0
    ):
        self.wide = wide
        self.seed, self.tokenizer, self.prompt_length, self.gen_length = (
            seed,
            tokenizer,
            prompt_length,
            gen_length,
        )

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        # Pair `index` of the set unless it is too long: then the next of a set of its own, so that pairs stay distinct.
        seed, number = self.seed, index
        style = microcode.WIDE_STYLE if index < self.wide else microcode.USUAL_STYLE
        while True:
            request, answer = microcode.training_pair(seed, number, style)
            prompt = chat_ids(self.tokenizer, request)
            response = self.tokenizer(answer)["input_ids"]
            if len(prompt) <= self.prompt_length and len(response) < self.gen_length:
                break
            seed += 1_000_003
        eos = self.tokenizer.eos_token_id
        ids, mask = pad_left([prompt], eos, self.prompt_length)
        # The rest of the response is EOS, as in LLaDA's own fine-tuning: the model learns where to end.
        response = response + [eos] * (self.gen_length - len(response))
        return {
            "prompt": ids[0],
            "prompt_mask": mask[0],
            "response": np.asarray(response, np.int32),
        }


def batch_iterator(source: Any, batch_size: int) -> grain.DatasetIterator:
    """An iterator over batches of `source`, read ahead by one thread; `get_state` and `set_state` move it exactly."""
    dataset = grain.MapDataset.source(source).batch(batch_size, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


class Responses:
    """Self-generated responses from jsonl files, one {"prompt_ids": [...], "response_ids": [...]} a line.

    paths may be patterns ("responses.*.jsonl"). only_passed leaves out those whose "passed" is false. limit: of lines
    in each file, 0 = all. All lines are read and checked at once: UserError names the file and line of one that is no
    JSON, lacks a key, holds an id outside the vocabulary or is longer than allowed.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        config: Any,
        prompt_length: int,
        gen_length: int,
        only_passed: bool = False,
        limit: int = 0,
    ):
        self.config, self.prompt_length, self.gen_length = config, prompt_length, gen_length
        if prompt_length + gen_length > config.max_length:
            raise UserError(
                f"prompt_length {prompt_length} and gen_length {gen_length} exceed the model's "
                f"{config.max_length} positions"
            )
        self.rows: list[tuple[list[int], list[int]]] = []
        for path in _files(paths):
            for number, line in enumerate(read_lines(path)[: limit or None], start=1):
                record, row = self._check(line, f"{path}, line {number}")
                if record.get("passed", True) or not only_passed:
                    self.rows.append(row)
        if not self.rows:
            raise UserError(
                f"{', '.join(map(str, paths))}: no responses in it; train.self_generate makes them"
            )

    def _check(self, line: str, where: str) -> tuple[dict[str, Any], tuple[list[int], list[int]]]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        rows = []
        for key, longest in (("prompt_ids", self.prompt_length), ("response_ids", self.gen_length)):
            ids = record.get(key) if isinstance(record, dict) else None
            if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
                raise UserError(f"{where} has no list of integers under {key!r}")
            if bad := [i for i in ids if not 0 <= i < self.config.vocab_rows]:
                last = self.config.vocab_rows - 1
                raise UserError(
                    f"{where}: {key} holds {bad[0]}; the vocabulary has ids 0 to {last}"
                )
            if len(ids) > longest:
                raise UserError(f"{where}: {len(ids)} {key}, but the run allows {longest}")
            rows.append(ids)
        return record, (rows[0], rows[1])

    def hold_out(self, count: int, batch_size: int) -> list[list[dict[str, np.ndarray]]]:
        """Takes `count` responses, spread evenly over the files, out, as whole batches of examples; UserError where the
        count is less than a batch or nothing would be left to train on."""
        size = count // batch_size * batch_size
        if not size or len(self) - size < batch_size:
            raise UserError(
                f"held_out {count} must be at least one batch of {batch_size} and leave one of the {len(self)} "
                "responses to train on"
            )
        taken = {
            i * len(self) // size for i in range(size)
        }  # files go by prompt length: their ends are no fair sample
        examples = [self[i] for i in sorted(taken)]
        self.rows = [row for i, row in enumerate(self.rows) if i not in taken]
        return [examples[i : i + batch_size] for i in range(0, size, batch_size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        prompt, response = self.rows[index]
        ids, mask = pad_left([prompt], self.config.pad_id, self.prompt_length)
        response = response + [self.config.eos_id] * (self.gen_length - len(response))
        return {
            "prompt": ids[0],
            "prompt_mask": mask[0],
            "response": np.asarray(response, np.int32),
        }


def _files(paths: Sequence[str | Path]) -> list[str]:
    """The files that paths and patterns name, each pattern's in order; a pattern that meets none stays as it is."""
    return [
        file
        for path in map(str, paths)
        for file in (sorted(glob.glob(path)) if "*" in path else [path]) or [path]
    ]


def read_lines(path: str | Path) -> list[str]:
    """The lines of a jsonl file; a last one that has no line break and is no JSON, cut off by a crash, is left out."""
    try:
        *lines, last = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from None
    with contextlib.suppress(json.JSONDecodeError):
        json.loads(last)
        lines.append(last)
    return lines


def shuffled_batches(
    source: Any, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Endless shuffled epochs over `source` in batches; the iterator's position can be saved and restored.

    rows: which rows of each batch to read (`local_rows`), None = all. Every process walks through the same batches, so
    that the position is the same everywhere, and means the same to another number of processes.
    """
    if len(source) < batch_size:
        raise UserError(
            f"{len(source)} examples do not fill a batch of {batch_size}; use more or a smaller batch_size"
        )
    wanted = np.arange(batch_size) if rows is None else rows

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return stack_examples([source[int(i)] for i in indices[wanted]])

    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    dataset = order.batch(batch_size, drop_remainder=True).map(read)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def stack_examples(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples of like shapes as one batch."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def local_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """The rows of a batch of this sharding that devices of this process hold, in ascending order."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def place_batch(
    batch: dict[str, np.ndarray], sharding: Sharding, batch_size: int
) -> dict[str, jax.Array]:
    """This process's rows (`local_rows`) of a batch -> global arrays [batch_size, ...] of the sharding."""
    rows = local_rows(sharding, batch_size)

    def one(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return x[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return {name: one(x) for name, x in batch.items()}
