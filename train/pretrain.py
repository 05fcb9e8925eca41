"""Pretraining of the bundled model: `python -m train.pretrain configs/pretrain_tiny.toml`.

Masked diffusion (Eq. 1) on microcode or a mixture of tasks, first with low masking ratios as a
curriculum. It may begin with blocks behind clean copies, down to next-token prediction. Every batch
is of one task and has its lengths. Muon trains the matrices of the layers, Adam the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from train.mixture import Component, make_pairs
from train.pretrain_config import PretrainConfig
from train.run import Run
from train.setup import export, run_program
from train.upcycle import query_norms
from xflow_jax.decoding import MaskPrediction, generate
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM, load
from xflow_jax.models import LLaDAConfig, SDARConfig, build, init_params, update_flops
from xflow_jax.sandbox import run_many
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    BatchIterator,
    LengthGroups,
    MixedPairs,
    TrainState,
    batch_iterator,
    make_pretrain_step,
)
from xflow_jax.types import Backbone, ModelConfig, Params, PyTree, Tokenizer

# What the model that a run begins with may have otherwise.
_FREE = {
    "hf",
    "max_sequence_length",
    "max_position_embeddings",
    "embedding_size",
    "pad_token_id",
    "block_size",
}


def make_model_config(config: PretrainConfig, tokenizer: Tokenizer) -> LLaDAConfig | SDARConfig:
    """Builds the configuration of the model.

    Args:
        config: the configuration of the run.
        tokenizer: the tokenizer.

    Returns:
        The configuration. The rows of the embedding table are rounded up to a multiple of 64, so
        that meshes divide them.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise UserError(f"{config.tokenizer}: the tokenizer has no EOS token")
    # The conversion of an unknown token would give that of unknown words.
    mask_id = tokenizer.get_vocab().get("<|mdm_mask|>")
    if mask_id is None:
        raise UserError(f"{config.tokenizer}: the tokenizer has no token <|mdm_mask|>")
    shape, rows = config.model, -(-len(tokenizer) // 64) * 64
    length = max(256, *(how.prompt_length + how.gen_length for how in config.components))
    if shape.block_size:
        return SDARConfig(
            hidden_size=shape.d_model,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            intermediate_size=shape.mlp_hidden_size,
            rope_theta=shape.rope_theta,
            block_size=shape.block_size,
            vocab_size=rows,
            mask_token_id=mask_id,
            eos_token_id=eos_id,
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=length + shape.block_size,
        )
    return LLaDAConfig(
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        mlp_hidden_size=shape.mlp_hidden_size,
        rope_theta=shape.rope_theta,
        vocab_size=len(tokenizer),
        embedding_size=rows,
        mask_token_id=mask_id,
        eos_token_id=eos_id,
        pad_token_id=tokenizer.pad_token_id,
        max_sequence_length=length,
    )


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Builds the optimiser: Muon for stacked matrices, Adam for the rest.

    Args:
        config: the configuration of the run.

    Returns:
        The optax transformation, with clipped gradients and one schedule.
    """
    steps, shares = (jnp.asarray(column) for column in zip(*config.rate_points, strict=True))

    def rate(peak: float) -> optax.Schedule:
        return lambda count: peak * jnp.interp(count, steps, shares)

    def matrices(params: PyTree) -> PyTree:
        # Matrices of the layers are stacked to [layers, in, out].
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params
        )

    muon = optax.contrib.muon(
        rate(config.muon_rate),
        adam_learning_rate=rate(config.adam_rate),
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), muon)


def curriculum(config: PretrainConfig) -> optax.Schedule:
    """Builds the schedule of the largest masking ratio, which ends at 1."""
    if config.curriculum_steps == 0:  # optax would stay at the first value
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(config.first_sigma, 1.0, config.curriculum_steps)


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step, from the last checkpoint if any.

    Args:
        path: TOML file of a PretrainConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input.
    """
    train(load_toml(path, PretrainConfig, overrides))


def train(config: PretrainConfig) -> None:
    """Runs a pretraining.

    The model ends in `out`/hf in the Hugging Face format.

    Args:
        config: the configuration.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None:
        raise UserError(f"{config.tokenizer}: there is no tokenizer.json")
    model = make_model(config, tokenizer)
    optimizer = make_optimizer(config)
    key = jax.random.key(config.seed)
    whole, copies = (
        jax.jit(make_pretrain_step(model, optimizer, curriculum(config), blocks), donate_argnums=0)
        for blocks in ((), config.clean_blocks)
    )
    source, data = make_data(config, tokenizer)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(init_params(model, key), optimizer)

    with Run(config.out, config.seed) as run:
        if run.latest is None:
            state = jax.jit(create)(key)
            if config.start is not None:
                state = state.replace(params=read_start(config.start, state.params, model.config))
        else:
            state, _ = run.restore(jax.eval_shape(create, key), data)
        size = sum(x.size for x in jax.tree.leaves(state.params))
        print(f"{size / 1e6:.2f} M parameters, from step {int(state.step)} to {config.steps}")
        for step in run.steps(int(state.step), config.steps, "pretrain"):
            batch = jax.tree.map(jnp.asarray, next(data))
            task = config.tasks[source.choose(step)]
            is_clean = config.has_clean_copy(step, task)
            state, metrics = (copies if is_clean else whole)(state, batch, key)
            has_copy = is_clean or model.config.is_block_causal
            run.clock.count(metrics, *count_work(model.config, batch, has_copy))
            done, is_last = step + 1, step + 1 == config.steps
            if done % config.log_every == 0:
                if len(config.tasks) > 1:  # the losses of tasks differ
                    metrics |= {f"loss_{task}": metrics["loss"]}
                run.log_step(done, metrics, "loss")
            # The evaluation comes before the checkpoint: a resumed run does not repeat it.
            if done % config.evaluate_every == 0 or is_last:
                lm = LM(build(model.config), model.config, state.params, tokenizer)
                with run.clock.paused(metrics):
                    _evaluate(run, config, lm, done)
            if done % config.save_every == 0 or is_last or run.stopped:
                run.save(done, state, data)
        run.wait()
        if int(state.step) == config.steps:
            made_by = {
                "command": "python -m train.pretrain",
                **({"tasks": config.tasks} if config.tasks[1:] else {"task": config.tasks[0]}),
                "config": dataclasses.asdict(config),
            }
            folder = to_path(config.out) / "hf"
            export(
                folder, state.params, model.config, config.tokenizer, made_by, config.export_dtype
            )


def make_model(config: PretrainConfig, tokenizer: Tokenizer) -> Backbone:
    """Builds the module that is trained.

    Args:
        config: the configuration of the run.
        tokenizer: the tokenizer.
    """
    remat = config.remat
    if remat == "auto":
        remat = "full" if jax.default_backend() == "cpu" else "none"
    return build(make_model_config(config, tokenizer), remat=None if remat == "none" else remat)


def make_data(config: PretrainConfig, tokenizer: Tokenizer) -> tuple[MixedPairs, BatchIterator]:
    """Builds the training set of a run, and its batches.

    Args:
        config: the configuration of the run.
        tokenizer: the tokenizer.

    Raises:
        UserError: if pairs of a task do not fit its lengths.
    """
    early = [config.early_pairs(task) for task in config.tasks]
    source = make_pairs(config.components, tokenizer, config.seed, config.batch_size, early)
    data = batch_iterator(source, config.batch_size, config.workers)
    assert tokenizer.eos_token_id is not None

    def kind(step: int) -> int | None:
        which = source.choose(step)
        return which if config.has_clean_copy(step, config.tasks[which]) else None

    return source, LengthGroups(
        data, kind, config.clean_window, config.clean_steps, tokenizer.eos_token_id
    )


def read_start(path: str, params: Params, model_config: ModelConfig) -> Params:
    """Reads the parameters that a run begins with.

    An SDAR model may begin with a LLaDA model of its sizes. The norms of its queries and keys are
    new then.

    Args:
        path: the model, as in `xflow_jax.load`.
        params: parameters of the run's shapes.
        model_config: configuration of the run's model.

    Raises:
        UserError: as `xflow_jax.load`, for another shape, or for a model that computes otherwise.
    """
    assert isinstance(model_config, LLaDAConfig | SDARConfig)
    start = load(path)
    read: Params = start.params
    names = [field.name for field in dataclasses.fields(model_config)]
    if isinstance(start.config, LLaDAConfig) and isinstance(model_config, SDARConfig):
        blocks = read["blocks"]
        read = {**read, "blocks": blocks | query_norms(blocks, model_config.head_dim)}
        names = ["num_heads", "num_kv_heads", "mask_id", "eos_id", "rope_theta"]
    require(
        jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, params),
        f"start: {path} has another shape than [model]. Give its sizes there.",
    )
    for name in [name for name in names if name not in _FREE]:
        there, here = (getattr(config, name, None) for config in (start.config, model_config))
        require(
            there == here,
            f"start: {path} has {name} {there}, and the run {here}. Give the run the same [model] "
            "and tokenizer.",
        )
    return read


def count_work(
    model_config: ModelConfig, batch: Mapping[str, jax.Array], clean_copy: bool = False
) -> tuple[int, float]:
    """Counts tokens and model FLOPs of an update.

    Args:
        model_config: configuration of the model.
        batch: the batch.
        clean_copy: True if a row holds a clean copy of the response.
    """
    rows, predicted = batch["response"].shape
    length = batch["prompt"].shape[1] + predicted * (2 if clean_copy else 1)
    return rows * length, update_flops(model_config, rows, length, predicted, 3, False)


def _evaluate(run: Run, config: PretrainConfig, lm: LM, done: int) -> None:
    """Logs and prints the share of held-out problems that the model solves."""
    shares = {how.task.name: solve_rate(lm, config, how) for how in config.components}
    values = {"solved": sum(shares.values()) / len(shares)}
    if len(shares) > 1:
        values |= {f"solved_{name}": share for name, share in shares.items()}
    run.log(done, values)
    problems = f"{config.evaluate_problems} held-out problems"
    for name, share in shares.items():
        of_task = f" of {name}" if len(shares) > 1 else ""
        run.bar.write(f"step {done}: {100 * share:.1f} % of {problems}{of_task} solved")


def solve_rate(lm: LM, config: PretrainConfig, how: Component) -> float:
    """Measures full-budget mask prediction on held-out problems of a task.

    Args:
        lm: the model.
        config: the configuration of the run.
        how: the task with its lengths.

    Returns:
        The share of problems whose answers pass in the sandbox.
    """
    assert lm.tokenizer is not None
    task = how.task
    problems = task.problems(None, config.evaluate_problems)
    passed = 0
    for first in range(0, len(problems), config.batch_size):
        batch = problems[first : first + config.batch_size]
        out = generate(
            lm,
            [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in batch],
            MaskPrediction(),
            how.gen_length,
            how.gen_length,
            block_length=how.block_length,
        )
        jobs = [task.job(*pair) for pair in zip(batch, out.texts or [], strict=True)]
        passed += sum(result.passed for result in run_many(jobs, task.config.limits))
    return passed / len(problems)


if __name__ == "__main__":
    run_program(main, "python -m train.pretrain CONFIG [key=value ...]")
