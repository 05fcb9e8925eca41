"""Gaussian diffusion in embedding space: `python -m train.gaussian configs/gaussian_tiny.toml`.

A continuous relative of the bundled base model, with its size, data, optimiser and updates. At the
end it answers held-out problems in several numbers of forward passes, as files for
`xflow evaluate --answers`. A finished run answers anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from train import pretrain, pretrain_config
from train.mixture import Component
from train.run import Run
from train.setup import run_program
from xflow_jax.checkpoints import make_directory, write_atomic
from xflow_jax.decoding import NOISE_SCHEDULES, GaussianModel, sample_gaussian
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import to_path
from xflow_jax.sandbox import run_many
from xflow_jax.tokenizer import chat_ids, decode_responses, load_tokenizer, pad_left
from xflow_jax.toml_config import load_toml
from xflow_jax.training import TrainState, gaussian_optimizer, make_gaussian_step
from xflow_jax.types import Array, Bool, Int, Key, Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class GaussianConfig(pretrain_config.PretrainConfig):
    """A run of Gaussian diffusion.

    The fields of a pretraining have their sense there. `first_sigma` is the largest share of the
    noise schedule at first, and `start` a masked model whose transformer begins the run.
    `block_length` and `export_dtype` have no use.

    Attributes:
        schedule: noise schedule: "gumbel" of LangFlow, "plaid" for a fitted curve, or "sqrt" of
            Diffusion-LM and DiffuSeq.
        schedule_rate: learning rate of the numbers of the schedule.
        self_conditioning: condition on an earlier prediction.
        passes: numbers of forward passes of the answers.
        answers: held-out problems that are answered at the end.

    Raises:
        UserError: if a value is out of range.
    """

    schedule: Literal["gumbel", "plaid", "sqrt"] = "gumbel"
    schedule_rate: float = 0.01
    self_conditioning: bool = True
    passes: tuple[int, ...] = (48, 24, 12, 6, 3)
    answers: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.block_length is None,
            "block_length has no use here, because all positions are decoded together",
        )
        require(
            not self.clean_steps,
            f"clean_steps is {self.clean_steps}, but there are no clean copies here. Leave it out.",
        )
        require(
            not self.model.block_size,
            f"model.block_size is {self.model.block_size}, but all positions are decoded together. "
            "Leave it out.",
        )
        rate, answers = self.schedule_rate, self.answers
        require(rate > 0, f"schedule_rate is {rate}, but it must be positive")
        require(answers >= 1, f"answers is {answers}, but it must be at least 1")
        require(
            bool(self.passes) and min(self.passes) >= 1,
            f"passes is {list(self.passes)}, but it must be one or more numbers from 1 on",
        )


def main(path: str, overrides: list[str]) -> None:
    """Trains to the last step, from a checkpoint if any, and answers.

    Args:
        path: TOML file of a GaussianConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input.
    """
    train(load_toml(path, GaussianConfig, overrides))


def train(config: GaussianConfig) -> None:
    """Runs a training. The answers end in `out`/answers.

    Args:
        config: the configuration.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None:
        raise UserError(f"{config.tokenizer}: there is no tokenizer.json")
    backbone = pretrain.make_model(config, tokenizer)
    model = GaussianModel(backbone, NOISE_SCHEDULES[config.schedule])
    optimizer = gaussian_optimizer(pretrain.make_optimizer(config), config.schedule_rate)
    key = jax.random.key(config.seed)
    largest = pretrain.curriculum(config)
    step_fn = jax.jit(
        make_gaussian_step(model, optimizer, largest, config.self_conditioning), donate_argnums=0
    )
    _, data = pretrain.make_data(config, tokenizer)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(model.init(key), optimizer)

    answerer = Answerer(config, model, tokenizer)
    with Run(config.out, config.seed) as run:
        if run.latest is None:
            state = jax.jit(create)(key)
            if config.start is not None:
                start = pretrain.read_start(config.start, state.params["backbone"], backbone.config)
                state = state.replace(params={**state.params, "backbone": start})
        else:
            state, _ = run.restore(jax.eval_shape(create, key), data)
        size = sum(x.size for x in jax.tree.leaves(state.params))
        print(f"{size / 1e6:.2f} M parameters, from step {int(state.step)} to {config.steps}")
        for step in run.steps(int(state.step), config.steps, "gaussian"):
            batch = jax.tree.map(jnp.asarray, next(data))
            state, metrics = step_fn(state, batch, key)
            run.clock.count(metrics, *pretrain.count_work(backbone.config, batch))
            done, is_last = step + 1, step + 1 == config.steps
            if done % config.log_every == 0:
                run.log_step(done, metrics, "loss")
            if done % config.evaluate_every == 0 and not is_last:
                with run.clock.paused(metrics):
                    solved = answerer.solve_rate(state.params, max(config.passes))
                run.log(done, {"solved": solved})
                run.bar.write(f"step {done}: {100 * solved:.1f} % solved")
            if done % config.save_every == 0 or is_last or run.stopped:
                run.save(done, state, data)
        run.wait()
        if int(state.step) == config.steps:
            answerer.write(state.params)


class Answerer:
    """Answers held-out problems of the tasks of a run.

    Args:
        config: the configuration of the run.
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, config: GaussianConfig, model: GaussianModel, tokenizer: Tokenizer):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self._sample = jax.jit(self._sample_rows, static_argnums=(0, 1))

    def solve_rate(self, params: Params, passes: int) -> float:
        """Measures the share of solved problems, averaged over tasks.

        Args:
            params: parameters of the model.
            passes: forward passes of an answer.
        """
        rates = []
        for how in self.config.components:
            problems = how.task.problems(None, self.config.evaluate_problems)
            texts = self._answer(params, how, problems, passes)
            rates.append(_judge(how, problems, texts))
        return sum(rates) / len(rates)

    def write(self, params: Params) -> None:
        """Writes a file of answers for each task and number of passes.

        Args:
            params: parameters of the model.
        """
        folder = to_path(self.config.out) / "answers"
        make_directory(folder)
        for how in self.config.components:
            problems = how.task.problems(None, self.config.answers)
            for passes in self.config.passes:
                texts = self._answer(params, how, problems, passes)
                lines = [
                    json.dumps({"task_id": how.task.task_id(problem), "completion": text}) + "\n"
                    for problem, text in zip(problems, texts, strict=True)
                ]
                file = folder / f"{how.task.name}_{passes}.jsonl"
                write_atomic(file, "".join(lines))
                solved = 100 * _judge(how, problems, texts)
                print(f"{file}: {solved:.1f} % of {len(problems)} problems in {passes} passes")

    def _answer(
        self, params: Params, how: Component, problems: Sequence[object], passes: int
    ) -> list[str]:
        """Decodes answers. Their noise depends on seed and problem alone."""
        rows = [chat_ids(self.tokenizer, how.task.prompt(problem)) for problem in problems]
        longest = max(how.prompt_length, *map(len, rows))
        size, texts = self.config.batch_size, []
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            prompt, mask = pad_left(
                batch + batch[-1:] * (size - len(batch)), self.model.backbone.config.pad_id, longest
            )
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(self.config.seed)))(
                first + jnp.arange(size)
            )
            tokens = self._sample(passes, how.gen_length, params, prompt, mask, keys)
            stop_ids = how.task.config.end_ids(self.model.backbone.config.stop_ids)
            texts += decode_responses(self.tokenizer, np.asarray(tokens[: len(batch)]), stop_ids)
        return texts

    def _sample_rows(
        self,
        passes: int,
        gen_length: int,
        params: Params,
        prompt: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
        keys: Key[Array, " B"],
    ) -> Int[Array, "B N"]:
        shape = (gen_length, self.model.backbone.config.hidden_size)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return sample_gaussian(self.model, params, prompt, mask, noise, passes)


def _judge(how: Component, problems: Sequence[object], texts: list[str]) -> float:
    """Runs answers, and returns the share of right ones."""
    jobs = [how.task.job(*pair) for pair in zip(problems, texts, strict=True)]
    return sum(result.passed for result in run_many(jobs, how.task.config.limits)) / len(jobs)


if __name__ == "__main__":
    run_program(main, "python -m train.gaussian CONFIG [key=value ...]")
