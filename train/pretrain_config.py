"""Configuration of pretraining."""

from __future__ import annotations

import dataclasses
from typing import Literal

from train.mixture import Component, make_components
from xflow_jax.errors import require

MOST_WORKERS = 512


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The shape of a LLaDA or SDAR model.

    The vocabulary comes from the tokenizer.

    Attributes:
        d_model: E.
        n_layers: number of layers.
        n_heads: H.
        mlp_hidden_size: F.
        rope_theta: base of the rotary embedding.
        block_size: positions of a block of an SDAR model, whose attention is block-causal. 0 makes
            a LLaDA model, with full attention.
    """

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    mlp_hidden_size: int = 384
    rope_theta: float = 10000.0
    block_size: int = 0

    def __post_init__(self) -> None:
        require(
            self.block_size >= 0,
            f"model.block_size is {self.block_size}, but it must not be negative",
        )


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
        wide_tasks: tasks with these steps, or empty for all.
        clean_steps: steps at the beginning that predict every block from a clean copy of what is
            before it. A row then gives as many losses as it has masks in all of its blocks.
        clean_blocks: positions of a block in these steps, for one row of a batch after another. 1
            is next-token prediction.
        clean_every: one of so many of these steps has clean copies. The others have masks anywhere.
        clean_tasks: tasks with clean copies, or empty for all. The others have masks anywhere.
        clean_window: batches in these steps that exchange pairs, so that each has similar lengths
            and less padding. 1 leaves them as they are.
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
    wide_tasks: tuple[str, ...] = ()
    clean_steps: int = 0
    clean_blocks: tuple[int, ...] = (1,)
    clean_every: int = 1
    clean_tasks: tuple[str, ...] = ()
    clean_window: int = 1
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
        counts = ("batch_size", "steps", "clean_every", "clean_window", "log_every")
        for name in (*counts, "save_every", "evaluate_every", "evaluate_problems"):
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
        for name in ("wide_tasks", "clean_tasks"):
            unknown = sorted(set(getattr(self, name)) - set(self.tasks))
            require(
                not unknown,
                f"{name} has {', '.join(unknown)}, but tasks has only {', '.join(self.tasks)}",
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

    def early_pairs(self, task: str) -> int:
        """Returns the pairs at the beginning with a task's early distribution."""
        is_wide = not self.wide_tasks or task in self.wide_tasks
        return self.wide_steps * self.batch_size if is_wide else 0

    def has_clean_copy(self, step: int, task: str) -> bool:
        """Returns True if a step on a task has clean copies."""
        in_turn = step < self.clean_steps and step % self.clean_every == 0
        return in_turn and (not self.clean_tasks or task in self.clean_tasks)
