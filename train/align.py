"""x-prediction alignment (Eqs. 11, 12): `python -m train.align configs/align_tiny.toml`.

Teaches a masked diffusion model that softmax(Z) W_in is the clean state, at masked and at clean positions, on responses
of its own (train.self_generate). Everything is resumed from the run's folder, on whatever devices there are then.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax

from train.setup import Run, export, run_program
from xflow_jax.errors import UserError
from xflow_jax.evaluation import plot_alignment
from xflow_jax.lm import load, read_model_config
from xflow_jax.models import merge
from xflow_jax.parallel import batch_sharding, make_mesh
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    AlignmentConfig,
    AlignProgram,
    Responses,
    align_program,
    check_batch,
    check_lengths,
    local_rows,
    place_batch,
    shuffled_batches,
    stack_examples,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignConfig(AlignmentConfig):
    """A run of alignment: `AlignSettings`, and where things are.

    data: jsonl of train.self_generate, whose lines are sorted by the prompts' lengths; `limit` lines of each file are
    read, 0 = all, and `held_out` of them are only measured. only_passed: leave out answers that were judged and are
    wrong. mesh: "data,fsdp,tensor". keep: how many checkpoints stay.
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
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.limit < 0:
            raise UserError(f"limit is {self.limit}, but it must not be negative")


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step, then writes `out`/hf in the Hugging Face format and a picture of the losses."""
    config = load_toml(path, AlignConfig, overrides)
    # What can be told from files is told before any device is asked for anything.
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
    config: AlignConfig,
    program: AlignProgram,
    source: Responses,
    held_out: list[list[dict[str, Any]]],
    directory: Path,
    model_config: Any,
) -> None:
    """The run itself, inside the program's scope."""
    sharding = batch_sharding(program.mesh)
    rows = local_rows(sharding, config.batch_size)
    data = shuffled_batches(source, config.batch_size, config.seed, rows)
    key, eval_key = jax.random.split(jax.random.key(config.seed))
    fixed = [
        place_batch(stack_examples([part[i] for i in rows]), sharding, config.batch_size)
        for part in held_out
    ]

    def measure(state: Any, base: Any) -> dict[str, float]:
        """The metrics on the held-out responses, always under the same masks."""
        kept = [
            program.measure(state.params, batch, jax.random.fold_in(eval_key, i), base)
            for i, batch in enumerate(fixed)
        ]
        return {
            f"held_out_{name}": float(sum(m[name] for m in kept) / len(kept)) for name in kept[0]
        }

    run = Run(config.out, config.keep)
    needs_base = config.tune == "lora"
    if run.latest is None or needs_base:
        state, base = program.begin(load(directory, dtype=config.param_dtype, mesh=program.mesh).params)
    else:
        state, base = program.arguments[0], None
    if run.latest is None:
        # Before its first step the model is the frozen one: adapters add nothing yet.
        before = measure(state, base)
        notes = {"frozen_masked_nll": before["held_out_masked_nll"]}
        run.log(0, before | notes)
    else:
        state, notes = run.restore(state, data)
    first, began = int(state.step), time.perf_counter()
    for step in run.steps(first, config.steps, "align"):
        state, metrics = program.step(
            state, place_batch(next(data), sharding, config.batch_size), key, base
        )
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds = (time.perf_counter() - began) / (done - first)
            run.log(done, metrics | measure(state, base) | notes | {"seconds_per_step": seconds})
            run.bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
        if done % config.save_every == 0 or done == config.steps or run.stopped:
            run.save(done, state, data, notes)
    run.close()
    if run.stopped and int(state.step) < config.steps:
        run.say(
            f"stopped at step {int(state.step)} of {config.steps}; the same command goes on from there"
        )
        return
    params = jax.jit(merge)(base, state.params) if config.tune == "lora" else state.params
    folder = "hf" if jax.process_count() == 1 else "model"
    made_by = {"command": "python -m train.align", "config": dataclasses.asdict(config)}
    export(Path(config.out) / folder, params, model_config, directory, made_by, config.export_dtype)
    if run.first_process:
        plot_alignment(run.metrics(), Path(config.out) / "alignment.png")


if __name__ == "__main__":
    run_program(main, "python -m train.align CONFIG [key=value ...]")
