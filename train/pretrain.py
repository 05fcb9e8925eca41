"""Masked diffusion pretraining of the bundled model: `python -m train.pretrain configs/pretrain_tiny.toml`.

Eq. 1 on microcode, with a curriculum of low masking ratios first; Muon for the layers' matrices, Adam for the rest.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from train.setup import Run, export, run_program
from xflow_jax.decoding import MaskPrediction, generate
from xflow_jax.lm import LM
from xflow_jax.models import LLaDAConfig, build, init_params
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import MicrocodePairs, TrainState, batch_iterator, make_pretrain_step


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; its vocabulary comes from the tokenizer."""

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    mlp_hidden_size: int = 384
    rope_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; lengths are in tokens, block_length is of the evaluations.

    In the first `wide_steps` answers are more varied than later. The rates are Muon's (matrices) and Adam's (everything
    else) at their highest; rate_points are (step, share of the highest rate), with straight lines between them.
    """

    out: str
    tokenizer: str
    model: ModelConfig = ModelConfig()
    prompt_length: int = 40
    gen_length: int = 48
    block_length: int | None = None
    batch_size: int = 64
    steps: int = 9000
    curriculum_steps: int = 600
    first_sigma: float = 0.3
    wide_steps: int = 0
    muon_rate: float = 0.018
    adam_rate: float = 0.003
    rate_points: tuple[tuple[float, float], ...] = ((0, 0.0), (50, 1.0), (3600, 1.0), (9000, 0.0))
    clip: float = 1.0
    seed: int = 0
    log_every: int = 20
    save_every: int = 250
    evaluate_every: int = 1000
    evaluate_problems: int = 128
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"


def model_config(config: PretrainConfig, tokenizer: Any) -> LLaDAConfig:
    """The LLaDA configuration of the run; rows of the table are rounded up so that a mesh divides them."""
    shape = dataclasses.asdict(config.model)
    rows = -(-len(tokenizer) // 64) * 64
    return LLaDAConfig(
        **shape,
        vocab_size=len(tokenizer),
        embedding_size=rows,
        mask_token_id=tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_sequence_length=256,
    )


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Muon on the stacked matrices of the layers [Ly, in, out], Adam on the rest, both clipped and on one schedule."""
    steps, shares = (jnp.asarray(column) for column in zip(*config.rate_points, strict=True))

    def rate(peak: float) -> optax.Schedule:
        return lambda count: peak * jnp.interp(count, steps, shares)

    def matrices(params: Any) -> Any:
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params
        )

    muon = optax.contrib.muon(
        rate(config.muon_rate),
        adam_learning_rate=rate(config.adam_rate),
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), muon)


def main(path: str, overrides: list[str]) -> None:
    """Trains until the configured step, resuming from the run's folder where it has a checkpoint."""
    train(load_toml(path, PretrainConfig, overrides))


def train(config: PretrainConfig) -> None:
    """The run itself; parameters end in `out`/checkpoints and, in the Hugging Face format, in `out`/hf."""
    tokenizer = load_tokenizer(config.tokenizer)
    # Recomputing activations is faster than keeping them even where memory abounds: on CPUs the page faults cost more.
    model = build(model_config(config, tokenizer), remat="full")
    optimizer = make_optimizer(config)
    key = jax.random.key(config.seed)
    largest = optax.linear_schedule(config.first_sigma, 1.0, config.curriculum_steps)
    step_fn = jax.jit(make_pretrain_step(model, optimizer, largest), donate_argnums=0)

    run = Run(config.out)
    wide = config.wide_steps * config.batch_size
    source = MicrocodePairs(config.seed, tokenizer, config.prompt_length, config.gen_length, wide)
    data = batch_iterator(source, config.batch_size)
    create = jax.jit(lambda k: TrainState.create(init_params(model, k), optimizer))
    if run.latest is None:
        state = create(key)
    else:
        state, _ = run.restore(jax.eval_shape(create, key), data)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"{size / 1e6:.2f} M parameters, from step {int(state.step)} to {config.steps}")

    began, first = time.perf_counter(), int(state.step)
    for step in run.steps(first, config.steps, "pretrain"):
        state, metrics = step_fn(state, jax.tree.map(jnp.asarray, next(data)), key)
        done = step + 1
        if done % config.log_every == 0:
            seconds = (time.perf_counter() - began) / (done - first)
            run.log(done, metrics | {"seconds_per_step": seconds})
            run.bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
        if done % config.save_every == 0 or done == config.steps or run.stopped:
            run.save(done, state, data)
        if done % config.evaluate_every == 0 or done == config.steps:
            solved = solve_rate(
                LM(build(model.config), model.config, state.params, tokenizer), config
            )
            run.log(done, {"solved": solved})
            run.bar.write(
                f"step {done}: {100 * solved:.1f} % of {config.evaluate_problems} held-out problems solved"
            )
    run.close()
    if int(state.step) == config.steps:
        made_by = {"command": "python -m train.pretrain", "config": dataclasses.asdict(config)}
        export(
            Path(config.out) / "hf",
            state.params,
            model.config,
            config.tokenizer,
            made_by,
            config.export_dtype,
        )


def solve_rate(lm: LM, config: PretrainConfig) -> float:
    """The share of held-out problems that full-budget mask prediction solves, judged by running the answers."""
    problems = microcode.problems("test", config.evaluate_problems)
    passed = 0
    for first in range(0, len(problems), config.batch_size):
        part = problems[first : first + config.batch_size]
        prompts = [problem.prompt for problem in part]
        made = generate(
            lm,
            prompts,
            MaskPrediction(),
            config.gen_length,
            config.gen_length,
            block_length=config.block_length,
        )
        codes = [microcode.extract(text) for text in made.texts]
        jobs = [
            (code, microcode.checks(problem, code))
            for problem, code in zip(part, codes, strict=True)
        ]
        passed += sum(result.passed for result in run_many(jobs))
    return passed / len(problems)


if __name__ == "__main__":
    run_program(main, "python -m train.pretrain CONFIG [key=value ...]")
