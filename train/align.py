"""x-prediction alignment (Eqs. 11, 12): `python -m train.align configs/align_tiny.toml`.

It trains a masked diffusion model on its own responses (train.self_generate), until softmax(Z) W_in
is the clean state at masked and at clean positions. A run is resumed from its folder, on any
devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from train.run import Run
from train.setup import export, run_program
from xflow_jax.errors import require
from xflow_jax.evaluation import fingerprint, plot_alignment
from xflow_jax.input_files import to_path
from xflow_jax.lm import load, read_model_config, read_tasks
from xflow_jax.models import merge
from xflow_jax.parallel import batch_sharding, make_mesh
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    AlignmentConfig,
    AlignProgram,
    BatchIterator,
    Example,
    Responses,
    TrainState,
    align_program,
    check_batch,
    check_lengths,
    local_rows,
    place_batch,
    shuffled_batches,
    stack_examples,
)
from xflow_jax.types import ModelConfig, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignRunConfig(AlignmentConfig):
    """A run of alignment: the computation (`AlignmentConfig`), and its files.

    Attributes:
        model: directory or name of the model.
        data: jsonl files of train.self_generate, sorted by the length of the prompts.
        out: folder of the run.
        mesh: sizes of data, fsdp and tensor.
        limit: lines to read of each file, 0 for all.
        only_passed: leave out answers that were judged to be wrong.
        held_out: number of responses that are only measured.
        log_every: steps between lines of metrics.
        save_every: steps between checkpoints.
        keep: number of checkpoints that stay.
        export_dtype: dtype of the exported parameters.

    Raises:
        UserError: if a value is out of range.
    """

    model: str
    data: tuple[str, ...]
    out: str
    mesh: str = "1,1,1"
    limit: int = 0
    only_passed: bool = False
    held_out: int = 256
    log_every: int = 10
    save_every: int = 50
    keep: int = 2
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("log_every", "save_every", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but it must be at least 1")
        require(self.limit >= 0, f"limit is {self.limit}, but it must not be negative")


class HeldOut:
    """Batches that are measured and never trained on.

    Args:
        program: the alignment.
        batches: batches of examples.
        sharding: sharding of a batch.
        key: a random key. Every measurement uses the same masks.
    """

    def __init__(
        self,
        program: AlignProgram,
        batches: Sequence[Sequence[Example]],
        sharding: NamedSharding,
        key: jax.Array,
    ):
        size = len(batches[0])
        rows = local_rows(sharding, size)
        self.program, self.key = program, key
        self.batches = [
            place_batch(stack_examples([batch[i] for i in rows]), sharding, size)
            for batch in batches
        ]

    def measure(self, params: Params, base: Params | None) -> dict[str, float]:
        """Returns the mean metrics over the batches, with held_out_ before their names."""
        measured = [
            self.program.measure(params, batch, jax.random.fold_in(self.key, i), base)
            for i, batch in enumerate(self.batches)
        ]
        return {
            f"held_out_{name}": float(sum(m[name] for m in measured) / len(measured))
            for name in measured[0]
        }


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
    lengths = (config.prompt_length, config.gen_length)
    source = Responses(config.data, model_config, *lengths, config.only_passed, config.limit)
    held_out = source.hold_out(config.held_out, config.batch_size)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    program = align_program(model_config, config, mesh)
    with program.scope():
        train(config, program, source, held_out, directory, model_config)


def train(
    config: AlignRunConfig,
    program: AlignProgram,
    source: Responses,
    held_out: Sequence[Sequence[Example]],
    directory: Path,
    model_config: ModelConfig,
) -> None:
    """Runs an alignment inside the scope of its program.

    Args:
        config: the configuration.
        program: the compiled functions.
        source: the responses to train on.
        held_out: batches of other responses.
        directory: directory of the model.
        model_config: its configuration.
    """
    sharding = batch_sharding(program.mesh)
    data = shuffled_batches(
        source, config.batch_size, config.seed, local_rows(sharding, config.batch_size)
    )
    key, eval_key = jax.random.split(jax.random.key(config.seed))
    fixed = HeldOut(program, held_out, sharding, eval_key)
    with Run(config.out, config.seed, config.keep) as run:
        state, base, notes = _begin(run, config, program, directory, data, fixed)
        first, start = int(state.step), time.perf_counter()
        for step in run.steps(first, config.steps, "align"):
            batch = place_batch(next(data), sharding, config.batch_size)
            state, metrics = program.step(state, batch, key, base)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                seconds = (time.perf_counter() - start) / (done - first)
                measured = fixed.measure(state.params, base)
                run.log(done, metrics | measured | notes | {"seconds_per_step": seconds})
                run.bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
            if done % config.save_every == 0 or done == config.steps or run.stopped:
                run.save(done, state, data, notes)
        run.wait()
        if run.stopped and int(state.step) < config.steps:
            if run.first_process:
                print(
                    f"stopped at step {int(state.step)} of {config.steps}. The same command "
                    "continues from there."
                )
            return
        _finish(run, config, state.params, base, directory, model_config)


def _begin(
    run: Run,
    config: AlignRunConfig,
    program: AlignProgram,
    directory: Path,
    data: BatchIterator,
    held_out: HeldOut,
) -> tuple[TrainState, Params | None, dict[str, Any]]:
    """Returns (state, base, notes) and moves the data to its position."""
    base: Params | None = None
    if run.latest is None or config.tune == "lora":
        params = load(directory, dtype=config.param_dtype, mesh=program.mesh).params
        if config.tune == "lora":
            run.frozen = fingerprint(params)
        state, base = program.begin(params)
    else:
        state = program.arguments[0]
    if run.latest is not None:
        state, notes = run.restore(state, data)
        return state, base, notes
    # Before its first step the model is the frozen one, since new adapters add nothing.
    before = held_out.measure(state.params, base)
    notes = {"frozen_masked_nll": before["held_out_masked_nll"]}
    run.log(0, before | notes)
    return state, base, notes


def _finish(
    run: Run,
    config: AlignRunConfig,
    trained: Params,
    base: Params | None,
    directory: Path,
    model_config: ModelConfig,
) -> None:
    """Exports the model, with its adapters merged, and plots the losses."""
    params = trained if base is None else jax.jit(merge)(base, trained)
    folder = "hf" if jax.process_count() == 1 else "model"
    made_by: dict[str, object] = {"command": "python -m train.align"}
    if tasks := read_tasks(directory):  # the model still answers those of its source
        made_by["tasks"] = list(tasks)
    made_by["config"] = dataclasses.asdict(config)
    export(
        to_path(config.out) / folder, params, model_config, directory, made_by, config.export_dtype
    )
    if run.first_process:
        plot_alignment(run.metrics(), to_path(config.out) / "alignment.png")


if __name__ == "__main__":
    run_program(main, "python -m train.align CONFIG [key=value ...]")
