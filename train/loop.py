"""The loop that alignment and supervised fine-tuning share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from train.run import Run
from train.setup import export
from xflow_jax.errors import require
from xflow_jax.evaluation import fingerprint
from xflow_jax.input_files import to_path
from xflow_jax.lm import load, read_tasks
from xflow_jax.models import merge
from xflow_jax.parallel import batch_sharding
from xflow_jax.training import (
    BatchIterator,
    Example,
    TrainingConfig,
    TrainProgram,
    TrainState,
    place_batch,
)
from xflow_jax.types import ModelConfig, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """Files, mesh and intervals of a run.

    Attributes:
        model: directory or name of the model.
        data: names of the data.
        out: folder of the run.
        mesh: sizes of data, fsdp and tensor.
        limit: records to read of each of the data, 0 for all.
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
        program: the program.
        batches: this process's rows of the batches (`local_rows`).
        size: B, rows of a global batch.
        key: a random key. Every measurement uses the same masks.
    """

    def __init__(
        self, program: TrainProgram, batches: Sequence[Example], size: int, key: jax.Array
    ):
        sharding = batch_sharding(program.mesh)
        self.program, self.key = program, key
        self.batches = [place_batch(batch, sharding, size) for batch in batches]

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


@dataclasses.dataclass(frozen=True)
class Training:
    """A training in the scope of its program.

    Attributes:
        name: name of the program in train/.
        config: the configuration.
        program: the compiled functions.
        directory: directory of the model.
        model_config: its configuration.
        note: metrics before the first step -> values that each line of metrics repeats.
        finish: makes further results of a finished run, in the first process.
    """

    name: str
    config: RunConfig
    program: TrainProgram
    directory: Path
    model_config: ModelConfig
    note: Callable[[dict[str, float]], dict[str, float]] = lambda before: {}
    finish: Callable[[Run], None] = lambda run: None

    def train(self, data: BatchIterator, held_out: Sequence[Example]) -> None:
        """Trains to the configured step, and exports the model.

        It continues from the last checkpoint, if there is one.

        Args:
            data: this process's rows of the batches.
            held_out: the same of other batches.
        """
        config = self.config
        key, eval_key = jax.random.split(jax.random.key(config.seed))
        fixed = HeldOut(self.program, held_out, config.batch_size, eval_key)
        devices = self.program.mesh.size
        with Run(config.out, config.seed, config.keep, devices) as run:
            state, base, notes = self._begin(run, data, fixed)
            state = self._steps(run, state, base, notes, data, fixed, key)
            run.wait()
            if int(state.step) == config.steps or not run.stopped:
                self._export(state.params, base)
                if run.first_process:
                    self.finish(run)
            elif run.first_process:
                print(
                    f"stopped at step {int(state.step)} of {config.steps}. The same command "
                    "continues from there."
                )

    def _begin(
        self, run: Run, data: BatchIterator, held_out: HeldOut
    ) -> tuple[TrainState, Params | None, dict[str, Any]]:
        """Returns (state, base, notes) and moves the data to its position."""
        config, program = self.config, self.program
        base: Params | None = None
        if run.latest is None or config.tune == "lora":
            params = load(self.directory, dtype=config.param_dtype, mesh=program.mesh).params
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
        notes = self.note(before)
        run.log(0, before | notes)
        return state, base, notes

    def _steps(
        self,
        run: Run,
        state: TrainState,
        base: Params | None,
        notes: dict[str, Any],
        data: BatchIterator,
        held_out: HeldOut,
        key: jax.Array,
    ) -> TrainState:
        """Runs the steps with metrics and checkpoints, until the end or SIGTERM."""
        config, sharding = self.config, batch_sharding(self.program.mesh)
        for step in run.steps(int(state.step), config.steps, self.name):
            batch = place_batch(next(data), sharding, config.batch_size)
            state, metrics = self.program.step(state, batch, key, base)
            length = row_length(batch)
            run.clock.count(metrics, config.batch_size * length, self.program.flops(length))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                with run.clock.paused(metrics):
                    measured = held_out.measure(state.params, base)
                run.log_step(done, metrics | measured | notes, "loss")
            if done % config.save_every == 0 or done == config.steps or run.stopped:
                run.save(done, state, data, notes)
        return state

    def _export(self, trained: Params, base: Params | None) -> None:
        """Exports the model, with its adapters merged."""
        params = trained if base is None else jax.jit(merge)(base, trained)
        folder = "hf" if jax.process_count() == 1 else "model"
        made_by: dict[str, object] = {"command": f"python -m train.{self.name}"}
        if tasks := read_tasks(self.directory):  # the model still answers those of its source
            made_by["tasks"] = list(tasks)
        made_by["config"] = dataclasses.asdict(self.config)
        export(
            to_path(self.config.out) / folder,
            params,
            self.model_config,
            self.directory,
            made_by,
            self.config.export_dtype,
        )


def row_length(batch: Mapping[str, jax.Array]) -> int:
    """Returns the tokens of a row of a batch, with padding."""
    names = ("tokens",) if "tokens" in batch else ("prompt", "response")
    return sum(batch[name].shape[1] for name in names)
