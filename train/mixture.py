"""Tasks of a pretraining with their shares and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xflow_jax.errors import require
from xflow_jax.tasks import Task, get_task
from xflow_jax.training import MixedPairs, TaskPairs
from xflow_jax.types import Tokenizer


@dataclass(frozen=True)
class Component:
    """A task of a mixture. Lengths are in tokens.

    Attributes:
        task: the task.
        weight: relative share of the batches.
        prompt_length: P, to which prompts are padded.
        gen_length: N, positions of a response.
        block_length: positions of a block in evaluations, or None for the default of the model.
    """

    task: Task[Any]
    weight: float
    prompt_length: int
    gen_length: int
    block_length: int | None


def make_components(
    tasks: Sequence[str],
    weights: Sequence[float],
    prompt_length: int | Sequence[int],
    gen_length: int | Sequence[int],
    block_length: int | Sequence[int] | None,
) -> list[Component]:
    """Builds the tasks of a mixture.

    Args:
        tasks: their names.
        weights: relative shares of the batches, or nothing for equal ones.
        prompt_length: P of each task, or one number for all.
        gen_length: N of each task, or one number for all.
        block_length: block of each task, or one number for all, or None.

    Raises:
        UserError: for an unknown task or one without training pairs, for lists of another length,
            and for numbers out of range.
    """
    require(bool(tasks), "tasks is empty, but it must name at least one task")
    require(len(set(tasks)) == len(tasks), f"tasks names a task twice: {', '.join(tasks)}")
    columns = {
        "weights": weights or [1.0] * len(tasks),
        "prompt_length": prompt_length,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    full = {name: _repeat(name, value, tasks) for name, value in columns.items()}
    found = [get_task(name) for name in tasks]
    for task in found:
        generates = task.training_pair is not None
        require(generates, f"the task {task.name} has no endless training set to train on")
    return [Component(*row) for row in zip(found, *full.values(), strict=True)]


def _repeat(name: str, value: Any, tasks: Sequence[str]) -> list[Any]:
    """Returns one value for each task, all of them positive."""
    values = list(value) if isinstance(value, Sequence) else [value] * len(tasks)
    require(
        len(values) == len(tasks),
        f"{name} has {len(values)} values for {len(tasks)} tasks",
    )
    for one in values:
        least = 0 if name == "weights" else 1
        require(
            one is None or one >= 1 or (one > 0 and not least),
            f"{name} is {one}, but it must be {'at least 1' if least else 'positive'}",
        )
    return values


def make_pairs(
    components: Sequence[Component],
    tokenizer: Tokenizer,
    seed: int,
    batch_size: int,
    early: Sequence[int],
) -> MixedPairs:
    """Builds the training set of a mixture.

    Args:
        components: its tasks.
        tokenizer: tokenizer with a chat template.
        seed: seed of the pairs and of the order of the tasks.
        batch_size: B, pairs of a batch, which are of one task.
        early: number of pairs at the beginning, those of other tasks counted, that have the early
            distribution of their task, for each task.

    Raises:
        UserError: if pairs of a task do not fit its lengths.
    """
    sources = [
        TaskPairs(how.task, seed, tokenizer, how.prompt_length, how.gen_length, count)
        for how, count in zip(components, early, strict=True)
    ]
    for source in sources:
        source.check_lengths()
    return MixedPairs(sources, [how.weight for how in components], batch_size, seed)
