"""Evaluation of rules and budgets on one task.

Every answer is decoded, run and stored.

Several processes decode together on one mesh. Each runs its own share of the programs, and the
first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from xflow_jax.checkpoints import folder_lock, locked_by_first_process
from xflow_jax.decoding import CacheOptions, Rule, generate, make_decode_config, resolve_steps
from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Answer, Answers, Row, summarize_answers
from xflow_jax.input_files import to_path
from xflow_jax.parallel import WHOLE, Shard, multihost
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import Task
from xflow_jax.tokenizer import chat_ids, decode_responses
from xflow_jax.types import LanguageModel

ProblemT = TypeVar("ProblemT")

NO_CACHE = CacheOptions()  # the exact one, if the model has it
MOST_SAMPLES = 100_000  # of a problem


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rule at one budget.

    Attributes:
        label: the rule as the user wrote it.
        rule: the rule.
        budget: share of the full number of steps.
        steps: steps for the whole response.
    """

    label: str
    rule: Rule
    budget: Fraction
    steps: int


@dataclasses.dataclass(frozen=True)
class _Item(Generic[ProblemT]):
    """A problem with its name and the token ids of its prompt."""

    task_id: str
    problem: ProblemT
    prompt: list[int]


def make_cells(
    lm: LanguageModel,
    task: Task,
    rules: Mapping[str, Rule],
    budgets: Sequence[Fraction],
    cache: CacheOptions = NO_CACHE,
) -> list[Cell]:
    """Combines every rule with every budget.

    Args:
        lm: the model, for its default block length.
        task: the task, for its response and block length.
        rules: label -> rule.
        budgets: shares of the full number of steps.
        cache: the cache of `evaluate`, which is checked.

    Raises:
        UserError: if a budget makes no whole number of steps for each block, or if the model and
            the steps do not go with the cache.
    """
    length = task.config.gen_length
    block_length = task.config.block_length
    steps = {b: resolve_steps(lm.config, b, length, block_length) for b in budgets}
    for count in steps.values():
        cache.apply(lm.config, make_decode_config(lm, 1, length, count, None, block_length))
    return [
        Cell(label, rule, budget, steps[budget])
        for label, rule in rules.items()
        for budget in budgets
    ]


def evaluate(
    lm: LanguageModel,
    task: Task[ProblemT],
    problems: Sequence[ProblemT],
    cells: Sequence[Cell],
    answers: Answers,
    batch_size: int = 64,
    seed: int = 0,
    samples: int = 1,
    k: int = 1,
    cache: CacheOptions = NO_CACHE,
    shard: Shard = WHOLE,
) -> list[Row]:
    """Makes the missing answers and computes a row for each cell.

    In float32 an answer depends on the problem, the cell and the seed alone, and not on the batch.
    In bfloat16 the shape of the batch decides how sums are rounded. So batches are made of all
    problems, and a continued run decodes those with a missing answer as a straight one does.

    Args:
        lm: a model with a tokenizer.
        task: the task.
        problems: problems of the task.
        cells: rules and budgets.
        answers: the store of answers, which is read and extended.
        batch_size: problems of a batch.
        seed: seed of the first sample.
        samples: answers to each problem, with seeds from `seed` on. A rule that draws nothing
            makes one.
        k: k of pass@k.
        cache: keys and values that a decode keeps.
        shard: the batches to answer, every n-th. Workers with the other shares make the rest. The
            batches are those of the whole, so the answers are too.

    Raises:
        UserError: for bad input.
    """
    _check_counts(batch_size, samples, k)
    ids = unique_ids(task, problems)
    items = _make_items(lm, task, problems)
    size = min(batch_size, len(items))
    turns = [
        (cell, seed + i) for cell in cells for i in range(samples if cell.rule.needs_keys else 1)
    ]
    mine = [item for number, item in enumerate(items) if shard.takes(number // size)]
    missing = [
        {item.task_id for item in mine if not answers.has(c.label, str(c.budget), item.task_id, at)}
        for c, at in turns
    ]
    total = len(turns) * len(mine)
    with progress_bar(total, total - sum(map(len, missing))) as bar:
        for (cell, at), todo in zip(turns, missing, strict=True):
            bar.set_description(f"{cell.label} at {cell.budget}")
            for first in range(0, len(items), size):
                batch = items[first : first + size]
                if not any(item.task_id in todo for item in batch):
                    continue
                made = _answer_batch(lm, task, batch, size, cell, at, cache, answers)
                new = [answer for answer in made if answer.task_id in todo]
                answers.add(new)
                bar.update(len(new))
    length = task.config.gen_length
    kept = [answers.select(c.label, str(c.budget), ids) for c in cells]
    return [
        summarize_answers(c.label, str(c.budget), c.steps, length, a, k)
        for c, a in zip(cells, kept, strict=True)
    ]


def unique_ids(task: Task[ProblemT], problems: Sequence[ProblemT]) -> list[str]:
    """Returns the names of problems. Raises UserError if two are equal."""
    ids = [task.task_id(problem) for problem in problems]
    for name, count in Counter(ids).items():
        if count > 1:
            raise UserError(f"{count} problems of the task have the name {name}")
    return ids


def _check_counts(batch_size: int, samples: int, k: int) -> None:
    for name, value in (("batch_size", batch_size), ("samples", samples), ("k", k)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if samples > MOST_SAMPLES:
        raise UserError(f"samples must be at most {MOST_SAMPLES}, not {samples}")
    if k > samples:
        raise UserError(
            f"pass@{k} needs at least {k} answers to each problem, but samples is {samples}"
        )


def _make_items(
    lm: LanguageModel, task: Task[ProblemT], problems: Sequence[ProblemT]
) -> list[_Item[ProblemT]]:
    """Tokenizes the prompts and sorts them by length to save padding."""
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UserError(
            "the model's directory has no tokenizer.json, which a task needs for its prompts"
        )
    items = [_Item(task.task_id(p), p, chat_ids(tokenizer, task.prompt(p))) for p in problems]
    return sorted(items, key=lambda item: (len(item.prompt), item.task_id))


def progress_bar(total: int, done: int, label: str | None = None) -> tqdm:
    """Creates a progress bar of answers, on the first process only."""
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="answer",
        dynamic_ncols=True,
        disable=not multihost.is_first_process(),
    )


def _answer_batch(
    lm: LanguageModel,
    task: Task[ProblemT],
    batch: list[_Item[ProblemT]],
    size: int,
    cell: Cell,
    seed: int,
    cache: CacheOptions,
    answers: Answers,
) -> list[Answer]:
    """Decodes and judges one batch.

    It is filled up to `size`, since each size of batch needs a compilation.
    """
    prompts = [item.prompt for item in batch + batch[-1:] * (size - len(batch))]
    texts, passes, seconds = _decode(lm, task, prompts, cell, seed, cache)
    texts = texts[: len(batch)]
    verdicts = judge_answers(
        task, [(item.problem, text) for item, text in zip(batch, texts, strict=True)], answers
    )
    return [
        Answer(
            task_id=item.task_id,
            rule=cell.label,
            budget=str(cell.budget),
            seed=seed,
            text=text,
            passed=passed,
            reason=reason,
            forward_passes=int(count),
            seconds=round(seconds / size, 6),
        )
        for item, text, count, (passed, reason) in zip(
            batch, texts, passes[: len(batch)], verdicts, strict=True
        )
    ]


def judge_answers(
    task: Task[ProblemT], given: Sequence[tuple[ProblemT, str]], answers: Answers
) -> list[tuple[bool, str]]:
    """Runs answers in the sandbox, each process its own share.

    Args:
        task: the task.
        given: (problem, text) of each answer.
        answers: the store of answers. Texts that it has a verdict for are not run again.

    Returns:
        (passed, reason) of each answer.
    """
    known = [answers.verdict(task.task_id(problem), text) for problem, text in given]
    new = [task.job(*pair) for pair, verdict in zip(given, known, strict=True) if verdict is None]
    mine = range(jax.process_index(), len(new), jax.process_count())
    shares = multihost.gather_objects(
        [[r.passed, r.reason] for r in run_many([new[i] for i in mine], task.config.limits)]
    )
    judged = [shares[i % len(shares)][i // len(shares)] for i in range(len(new))]
    results = iter([(bool(passed), str(reason)) for passed, reason in judged])
    return [verdict or next(results) for verdict in known]


def _decode(
    lm: LanguageModel,
    task: Task,
    prompts: list[list[int]],
    cell: Cell,
    seed: int,
    cache: CacheOptions,
) -> tuple[list[str], np.ndarray, float]:
    """Decodes one batch. Returns texts, forward passes [B] and seconds without compilation."""
    settings = task.config
    with compile_spans() as spans:
        began = time.perf_counter()
        out = generate(
            lm,
            prompts,
            cell.rule,
            gen_length=settings.gen_length,
            steps=cell.steps,
            block_length=settings.block_length,
            seed=seed,
            **dataclasses.asdict(cache),
        )
        seconds = time.perf_counter() - began
    assert lm.tokenizer is not None
    texts = decode_responses(lm.tokenizer, out.tokens, settings.end_ids(lm.config.stop_ids))
    return texts, out.forward_passes, max(seconds - covered_seconds(spans), 0.0)


@contextlib.contextmanager
def compile_spans() -> Iterator[list[tuple[float, float]]]:
    """Collects the times in which JAX traces and compiles.

    Yields a list that gets (start, end) of each trace and compilation inside the block. The spans
    of nested programs overlap.
    """
    spans: list[tuple[float, float]] = []

    def listen(event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


def covered_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Computes the length of the union of spans."""
    covered, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


@contextlib.contextmanager
def open_answers(
    folder: str | Path | None, run: Mapping[str, object], merge: bool = False
) -> Iterator[Answers]:
    """Opens the store of answers of a run, and locks its folder.

    With several processes, only the first one uses the folder. All get the answers in it.

    Args:
        folder: the output folder, or None to keep answers in memory only.
        run: description of the run in JSON's types.
        merge: add the answers of the shares in the folder (`shard_folder`).

    Yields:
        The store. The folder is locked until the block ends.

    Raises:
        UserError: on all processes, if the folder holds another run, is in use or cannot be used.
    """
    opened: list[Answers] = []

    def read() -> list[dict[str, Any]]:
        opened.append(Answers(folder, run))
        if merge:
            opened[0].take_shards(run)
        if jax.process_count() == 1:
            return []
        return [dataclasses.asdict(answer) for answer in opened[0].all()]

    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(locked_by_first_process(folder_lock(to_path(folder))))
        kept = multihost.broadcast_from_first(read)
        if opened:
            yield opened[0]
            opened[0].close()
        else:
            answers = Answers(None, run)
            answers.add([Answer(**fields) for fields in kept])
            yield answers
