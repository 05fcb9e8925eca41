"""Pretraining of the bundled model: `python -m train.pretrain configs/pretrain_tiny.toml`.

Masked diffusion (Eq. 1) on microcode or a mixture of tasks, first with low masking ratios as a
curriculum. It may begin with blocks behind clean copies, down to next-token prediction. Every batch
is of one task and has its lengths. Muon trains the matrices of the layers, Adam the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from train.mixture import Component, make_components, make_pairs
from train.run import Run
from train.setup import export, run_program
from xflow_jax.decoding import MaskPrediction, generate
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM, load
from xflow_jax.models import LLaDAConfig, build, init_params, update_flops
from xflow_jax.sandbox import run_many
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    BatchIterator,
    MixedPairs,
    TrainState,
    batch_iterator,
    make_pretrain_step,
)
from xflow_jax.types import Backbone, ModelConfig, Params, PyTree, Tokenizer

MOST_WORKERS = 512


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The shape of a LLaDA model. Its vocabulary comes from the tokenizer.

    Attributes:
        d_model: E.
        n_layers: number of layers.
        n_heads: H.
        mlp_hidden_size: F.
        rope_theta: base of the rotary embedding.
    """

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    mlp_hidden_size: int = 384
    rope_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A run of pretraining. Lengths are in tokens.

    Attributes:
        out: folder of the run.
        tokenizer: directory of the tokenizer.
        model: shape of the model.
        start: model whose parameters the run begins with, of the same shape. None: random ones.
        tasks: names of the tasks.
        weights: relative shares of the tasks in the batches, or empty for equal ones.
        prompt_length: P, to which prompts are padded, for all tasks or for each.
        gen_length: N, positions of a response, for all tasks or for each.
        block_length: positions of a block in evaluations, for all tasks or for each, or None for
            the default of the model.
        batch_size: B, pairs of a batch.
        workers: processes that make the pairs, or 0 for a thread of this one. With a GPU, use about
            one for each CPU core.
        remat: activations that the backward pass recomputes. "auto" is "full" on CPUs, where page
            faults cost more than a second forward pass, and "none" elsewhere.
        steps: updates of the run.
        curriculum_steps: steps until the largest masking ratio is 1.
        first_sigma: largest masking ratio at the beginning.
        wide_steps: steps at the beginning with the early distribution of each task: answers of a
            more varied style for microcode and microcode-long, few blanks for latin-square.
        clean_steps: steps at the beginning that predict every block from a clean copy of what is
            before it. A row then gives as many losses as it has masks in all of its blocks.
        clean_blocks: positions of a block in these steps, for one row of a batch after another. 1
            is next-token prediction.
        muon_rate: largest learning rate of the matrices.
        adam_rate: largest learning rate of everything else.
        rate_points: (step, share of the largest rate), with straight lines between them.
        clip: largest global norm of the gradients.
        seed: seed of parameters, masks and data.
        log_every: steps between lines of metrics.
        save_every: steps between checkpoints.
        evaluate_every: steps between evaluations.
        evaluate_problems: held-out problems of an evaluation.
        export_dtype: dtype of the exported parameters.

    Raises:
        UserError: if a value is out of range.
    """

    out: str
    tokenizer: str
    model: ModelShape = ModelShape()
    start: str | None = None
    tasks: tuple[str, ...] = ("microcode",)
    weights: tuple[float, ...] = ()
    prompt_length: int | tuple[int, ...] = 40
    gen_length: int | tuple[int, ...] = 48
    block_length: int | tuple[int, ...] | None = None
    batch_size: int = 64
    workers: int = 0
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    steps: int = 9000
    curriculum_steps: int = 600
    first_sigma: float = 0.3
    wide_steps: int = 0
    clean_steps: int = 0
    clean_blocks: tuple[int, ...] = (1,)
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

    def __post_init__(self) -> None:
        _ = self.components
        counts = ("batch_size", "steps", "log_every", "save_every")
        for name in (*counts, "evaluate_every", "evaluate_problems"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but it must be at least 1")
        for name in ("curriculum_steps", "wide_steps", "clean_steps", "workers"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}, but it must not be negative")
        require(
            self.workers <= MOST_WORKERS,
            f"workers is {self.workers}, but it must be at most {MOST_WORKERS}",
        )
        for name in ("muon_rate", "adam_rate", "clip", "first_sigma"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}, but it must be positive")
        require(self.first_sigma <= 1, f"first_sigma is {self.first_sigma}, but it must be up to 1")
        require(
            bool(self.clean_blocks) and min(self.clean_blocks) >= 1,
            f"clean_blocks is {list(self.clean_blocks)}, but it must hold lengths of at least 1",
        )
        times = [time for time, _ in self.rate_points]
        require(
            len(times) >= 2 and times == sorted(set(times)),
            "rate_points must be two or more pairs with ascending steps",
        )

    @property
    def components(self) -> list[Component]:
        """The tasks with their shares and lengths."""
        lengths = (self.prompt_length, self.gen_length, self.block_length)
        return make_components(self.tasks, self.weights, *lengths)


def make_model_config(config: PretrainConfig, tokenizer: Tokenizer) -> LLaDAConfig:
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
    return LLaDAConfig(
        **dataclasses.asdict(config.model),
        vocab_size=len(tokenizer),
        embedding_size=-(-len(tokenizer) // 64) * 64,
        mask_token_id=mask_id,
        eos_token_id=eos_id,
        pad_token_id=tokenizer.pad_token_id,
        max_sequence_length=max(
            256, *(how.prompt_length + how.gen_length for how in config.components)
        ),
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
                state = state.replace(params=read_start(config.start, state.params))
        else:
            state, _ = run.restore(jax.eval_shape(create, key), data)
        size = sum(x.size for x in jax.tree.leaves(state.params))
        print(f"{size / 1e6:.2f} M parameters, from step {int(state.step)} to {config.steps}")
        for step in run.steps(int(state.step), config.steps, "pretrain"):
            batch = jax.tree.map(jnp.asarray, next(data))
            is_clean = step < config.clean_steps
            state, metrics = (copies if is_clean else whole)(state, batch, key)
            run.clock.count(metrics, *count_work(model.config, batch, is_clean))
            done, is_last = step + 1, step + 1 == config.steps
            if done % config.log_every == 0:
                if len(config.tasks) > 1:  # the losses of tasks differ
                    metrics |= {f"loss_{config.tasks[source.choose(step)]}": metrics["loss"]}
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
    early = config.wide_steps * config.batch_size
    source = make_pairs(config.components, tokenizer, config.seed, config.batch_size, early)
    return source, batch_iterator(source, config.batch_size, config.workers)


def read_start(path: str, params: Params) -> Params:
    """Reads the parameters that a run begins with.

    Args:
        path: the model, as in `xflow_jax.load`.
        params: parameters of the run's shapes.

    Raises:
        UserError: as `xflow_jax.load`, or for another shape.
    """
    start = load(path).params
    require(
        jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, params),
        f"start: {path} has another shape than [model]. Give its sizes there.",
    )
    return start


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
