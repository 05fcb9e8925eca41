"""Supervised fine-tuning (Eq. 1): `python -m train.sft configs/sft_tiny.toml`.

It trains a model of any family on conversations. Only responses are masked and count. A run is
resumed from its folder, on any devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice

from train import loop
from train.prompts import read_dialogues
from train.setup import run_program
from xflow_jax.errors import UserError, require
from xflow_jax.lm import read_model_config
from xflow_jax.parallel import batch_sharding, make_mesh, multihost
from xflow_jax.tasks import NAMES, get_task
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    BucketedPairs,
    Canvas,
    Dialogue,
    SFTConfig,
    TokenizedPair,
    Turns,
    check_batch,
    check_canvas,
    find_block_length,
    iterate_batches,
    local_rows,
    sft_program,
    split_pairs,
    tokenize_dialogues,
)
from xflow_jax.types import ModelConfig, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRunConfig(SFTConfig, loop.RunConfig):
    """A run of fine-tuning: the computation (`SFTConfig`), and its files (`RunConfig`).

    Attributes:
        data: jsonl or parquet files, folders of them, data sets of the hub, or tasks with an
            endless training set, of which `limit` pairs are taken. Records have `messages`, or
            `prompt` and `response`.
        task_seed: number of a task's training set. Pretraining uses its own seed.
        turns: "last" trains on the last response of a conversation, with all earlier turns as its
            prompt. "each" does so for every response, as a row of its own.
        end_of_turn: end responses by the token of the chat template, before EOS.
        group_by_length: make batches of pairs of similar length, which need less padding, not of
            random pairs. None does so for block-causal models only. Under full attention the length
            of a row then tells how long its response may be, which it does not in a decode.

    Raises:
        UserError: if a value is out of range.
    """

    task_seed: int = 1
    turns: Turns = "last"
    end_of_turn: bool = True
    group_by_length: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data), "data is empty. Name files, data sets or tasks.")


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step, and exports the model.

    Args:
        path: TOML file of an SFTRunConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input. That of files is found before any device is used.
    """
    config = load_toml(path, SFTRunConfig, overrides)
    directory, model_config = read_model_config(config.model)
    check_canvas(model_config, config)
    tokenizer = load_tokenizer(directory, model_config.chat_template)
    if tokenizer is None:
        raise UserError(
            f"{config.model} has no tokenizer.json, which fine-tuning needs for its conversations"
        )
    pairs, measured = split_pairs(
        read_pairs(config, tokenizer, model_config), config.held_out, config.batch_size
    )
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    canvas = make_canvas(config, model_config)
    rows = local_rows(batch_sharding(mesh), config.batch_size)
    source = BucketedPairs(pairs, canvas, config.seed, rows)
    held_out = BucketedPairs(measured, canvas, rows=rows)
    program = sft_program(model_config, config, mesh)
    training = loop.Training("sft", config, program, directory, model_config)
    with program.scope():
        training.train(
            iterate_batches(source), [held_out[number] for number in range(held_out.batches)]
        )


def make_canvas(config: SFTRunConfig, model_config: ModelConfig) -> Canvas:
    """Builds the rows of a run.

    Args:
        config: the configuration.
        model_config: configuration of the model.
    """
    block_length, grouped = find_block_length(model_config, config), config.group_by_length
    return Canvas(
        config.lengths,
        config.batch_size,
        model_config.eos_id,
        block_length,
        bool(block_length) if grouped is None else grouped,
    )


def read_pairs(
    config: SFTRunConfig, tokenizer: Tokenizer, model_config: ModelConfig
) -> list[TokenizedPair]:
    """Reads the pairs of token ids that are not too long.

    Args:
        config: the configuration.
        tokenizer: tokenizer with a chat template.
        model_config: configuration of the model.

    Raises:
        UserError: if the data are bad, or if all of them are too long.
    """
    pairs = tokenize_dialogues(
        read_all(config), tokenizer, model_config, config.turns, config.end_of_turn
    )
    longest = config.lengths[-1]
    kept = [pair for pair in pairs if pair.length <= longest]
    needed = max((pair.length for pair in pairs), default=0)
    names = ", ".join(config.data)
    require(
        bool(kept),
        f"{names}: none of its {len(pairs)} responses fits lengths, of which the longest is "
        f"{longest}. With prompt and EOS they need up to {needed}.",
    )
    if len(kept) < len(pairs) and multihost.is_first_process():
        print(
            f"{len(pairs) - len(kept)} of {len(pairs)} responses need more than {longest} tokens "
            "with their prompts and are left out"
        )
    return kept


def read_all(config: SFTRunConfig) -> Iterator[Dialogue]:
    """Reads the conversations of all data.

    Args:
        config: the configuration.

    Yields:
        Conversations, as `read_dialogues`.

    Raises:
        UserError: for bad data, or for a task without limit or training set.
    """
    for name in config.data:
        dialogues = task_dialogues(config, name) if name in NAMES else read_dialogues(name)
        yield from islice(dialogues, config.limit or None)


def task_dialogues(config: SFTRunConfig, name: str) -> Iterator[Dialogue]:
    """Makes the training pairs of a task.

    Args:
        config: the configuration.
        name: name of the task.

    Yields:
        Conversations of one request and a right answer.

    Raises:
        UserError: for a task without limit or training set.
    """
    task = get_task(name)
    if task.training_pair is None:
        raise UserError(f"the task {name} has no endless training set")
    require(config.limit > 0, f"limit is 0, but {name}'s training set has no end. Set a limit.")
    for index in range(config.limit):
        request, response = task.training_pair(config.task_seed, index, False)
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
        yield f"{name}, pair {index}", turns


if __name__ == "__main__":
    run_program(main, "python -m train.sft CONFIG [key=value ...]")
