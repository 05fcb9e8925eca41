"""x-prediction alignment (Eqs. 11, 12): `python -m train.align configs/align_tiny.toml`.

It trains a masked diffusion model on its own responses (train.self_generate), until softmax(Z) W_in
is the clean state at masked and at clean positions. A run is resumed from its folder, on any
devices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train import loop
from train.run import Run
from train.setup import run_program
from xflow_jax.errors import UserError, require
from xflow_jax.evaluation import plot_alignment
from xflow_jax.input_files import to_path
from xflow_jax.lm import read_model_config
from xflow_jax.parallel import batch_sharding, make_mesh
from xflow_jax.tasks import NAMES, get_task
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    AlignmentConfig,
    Responses,
    TaskPairs,
    align_program,
    check_batch,
    check_lengths,
    local_rows,
    shuffled_batches,
    stack_examples,
)
from xflow_jax.types import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignRunConfig(AlignmentConfig, loop.RunConfig):
    """A run of alignment: the computation (`AlignmentConfig`), and its files (`RunConfig`).

    Attributes:
        data: jsonl files of train.self_generate, sorted by the length of the prompts, and at most
            one task with an endless training set, of which `limit` right answers are taken.
        only_passed: leave out answers that were judged to be wrong.
        task_seed: number of a task's training set. Pretraining uses its own seed.

    Raises:
        UserError: if a value is out of range.
    """

    only_passed: bool = False
    task_seed: int = 1


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step, exports the model and plots the losses.

    Args:
        path: TOML file of an AlignRunConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input. That of files is found before any device is used.
    """
    config = load_toml(path, AlignRunConfig, overrides)
    directory, model_config = read_model_config(config.model)
    check_lengths(model_config, config)
    source = read_responses(config, directory, model_config)
    held_out = source.hold_out(config.held_out, config.batch_size)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    program = align_program(model_config, config, mesh)

    def plot(run: Run) -> None:
        plot_alignment(run.metrics(), to_path(config.out) / "alignment.png")

    training = loop.Training(
        "align",
        config,
        program,
        directory,
        model_config,
        note=lambda before: {"frozen_masked_nll": before["held_out_masked_nll"]},
        finish=plot,
    )
    with program.scope():
        rows = local_rows(batch_sharding(mesh), config.batch_size)
        training.train(
            shuffled_batches(source, config.batch_size, config.seed, rows),
            [stack_examples([batch[i] for i in rows]) for batch in held_out],
        )


def read_responses(config: AlignRunConfig, directory: Path, model: ModelConfig) -> Responses:
    """Reads the answers to train on.

    Args:
        config: the configuration.
        directory: directory of the model.
        model: configuration of the model.

    Raises:
        UserError: for bad data, or for a task without limit or training set.
    """
    lengths = (config.prompt_length, config.gen_length)
    tasks = [name for name in config.data if name in NAMES]
    files = [name for name in config.data if name not in NAMES]
    require(len(tasks) <= 1, f"data names the tasks {', '.join(tasks)}, but it may name one")
    pairs = None
    for name in tasks:
        require(config.limit > 0, f"limit is 0, but {name}'s training set has no end. Set a limit.")
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise UserError(f"{config.model} has no tokenizer.json, which {name} needs")
        pairs = TaskPairs(get_task(name), config.task_seed, tokenizer, *lengths)
        pairs.check_lengths()
    return Responses(files, model, *lengths, config.only_passed, config.limit, pairs)


if __name__ == "__main__":
    run_program(main, "python -m train.align CONFIG [key=value ...]")
