"""Evaluation: one task, many rules and budgets; every answer is run, kept and counted.

Several processes decode together on one mesh, each runs its own share of the programs, and the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xflow_jax.decoding import Rule, generate, resolve_steps
from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Answer, Answers, Row, summarize_answers
from xflow_jax.parallel import multihost
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import Task, read_jsonl
from xflow_jax.tokenizer import chat_ids


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rule at one budget; `label` is the rule as the user wrote it, `steps` are for the whole response."""

    label: str
    rule: Rule
    budget: Fraction
    steps: int


def make_cells(
    lm: Any, task: Task, rules: dict[str, Rule], budgets: Sequence[Fraction]
) -> list[Cell]:
    """Every rule at every budget; UserError for a budget that does not come out even."""
    length = task.config.gen_length
    block_length = task.config.block_length
    steps = {b: resolve_steps(lm.config, b, length, block_length) for b in budgets}
    return [
        Cell(label, rule, budget, steps[budget])
        for label, rule in rules.items()
        for budget in budgets
    ]


def evaluate(
    lm: Any,
    task: Task,
    problems: Sequence[Any],
    cells: Sequence[Cell],
    answers: Answers,
    batch_size: int = 64,
    seed: int = 0,
    samples: int = 1,
    k: int = 1,
    refresh: int = 0,
) -> list[Row]:
    """Decodes, runs and keeps in `answers` what is not there yet; a row for each cell.

    An answer depends on the problem, the cell and the seed alone, not on the batch. samples: answers to each problem,
    of the seeds from `seed` on; a rule that draws nothing gives one. k: of pass@k. refresh: as `generate` takes it.
    Raises UserError on bad input.
    """
    if lm.tokenizer is None:
        raise UserError(
            "the model's directory has no tokenizer.json, which a task needs for its prompts"
        )
    for name, value in (("batch_size", batch_size), ("samples", samples), ("k", k)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if k > samples:
        raise UserError(
            f"pass@{k} needs at least {k} answers to each problem, but samples is {samples}"
        )
    ids = [task.task_id(problem) for problem in problems]
    prompts = [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in problems]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(problems)), key=lambda i: (len(prompts[i]), ids[i]))
    size = min(batch_size, len(problems))
    turns = [
        (cell, seed + i) for cell in cells for i in range(samples if cell.rule.needs_keys else 1)
    ]
    todo = [
        [i for i in order if not answers.has(c.label, str(c.budget), ids[i], at)] for c, at in turns
    ]
    total = len(turns) * len(problems)
    shown = {"unit": "answer", "dynamic_ncols": True, "disable": not multihost.is_first_process()}
    with tqdm(total=total, initial=total - sum(map(len, todo)), **shown) as bar:
        for (cell, at), missing in zip(turns, todo, strict=True):
            bar.set_description(f"{cell.label} at {cell.budget}")
            for first in range(0, len(missing), size):
                batch = missing[first : first + size]
                filled = batch + batch[-1:] * (
                    size - len(batch)
                )  # one size of batch, one compilation
                texts, passes, seconds = _decode(
                    lm, task, [prompts[i] for i in filled], cell, at, refresh
                )
                given = [(problems[i], text) for i, text in zip(batch, texts, strict=False)]
                answers.add(
                    [
                        Answer(
                            task_id=ids[i],
                            rule=cell.label,
                            budget=str(cell.budget),
                            seed=at,
                            text=text,
                            passed=passed,
                            reason=reason,
                            forward_passes=int(count),
                            seconds=round(seconds / size, 6),
                        )
                        for i, text, count, (passed, reason) in zip(
                            batch, texts, passes, judge_answers(task, given, answers), strict=False
                        )
                    ]
                )
                bar.update(len(batch))
    length = task.config.gen_length
    kept = [answers.of(c.label, str(c.budget), ids) for c in cells]
    return [
        summarize_answers(c.label, str(c.budget), c.steps, length, a, k)
        for c, a in zip(cells, kept, strict=True)
    ]


def judge_answers(
    task: Task, given: Sequence[tuple[Any, str]], answers: Answers
) -> list[tuple[bool, str]]:
    """(passed, reason) of each (problem, text); what `answers` has judged before is not run again."""
    known = [answers.verdict(task.task_id(problem), text) for problem, text in given]
    new = [task.job(*pair) for pair, verdict in zip(given, known, strict=True) if verdict is None]
    mine = range(jax.process_index(), len(new), jax.process_count())
    shares = multihost.gather_objects(
        [[r.passed, r.reason] for r in run_many([new[i] for i in mine], task.config.limits)]
    )
    results = (tuple(shares[i % len(shares)][i // len(shares)]) for i in range(len(new)))
    return [verdict or next(results) for verdict in known]


def _decode(
    lm: Any, task: Task, prompts: list[list[int]], cell: Cell, seed: int, refresh: int
) -> tuple[list[str], np.ndarray, float]:
    """(texts, forward passes [B], seconds without compilation) of one batch."""
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
            refresh=refresh,
        )
        seconds = time.perf_counter() - began
    return out.texts, out.forward_passes, max(seconds - union(spans), 0.0)


@contextlib.contextmanager
def compile_spans() -> Iterator[list[tuple[float, float]]]:
    """Collects when JAX traces and compiles inside the block, as (start, end); the spans of nested programs overlap."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, start: float, end: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start, end))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


def union(spans: Sequence[tuple[float, float]]) -> float:
    """The seconds that spans cover together."""
    covered, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def score_answers(
    task: Task,
    problems: Sequence[Any],
    texts: Sequence[tuple[str, str]],
    label: str,
    answers: Answers,
) -> tuple[Row, list[Answer]]:
    """Runs answers made elsewhere, (task_id, text) each; the row and the answers that failed."""
    by_id = {task.task_id(problem): problem for problem in problems}
    todo = [(i, text) for i, text in texts if not answers.has(label, "", i)]
    shown = {"unit": "answer", "dynamic_ncols": True, "disable": not multihost.is_first_process()}
    with tqdm(total=len(texts), initial=len(texts) - len(todo), desc=label, **shown) as bar:
        for first in range(0, len(todo), 64):
            batch = todo[first : first + 64]
            verdicts = judge_answers(task, [(by_id[i], text) for i, text in batch], answers)
            judged = [(*pair, *verdict) for pair, verdict in zip(batch, verdicts, strict=True)]
            answers.add(
                [
                    Answer(i, label, "", 0, text, passed, reason, 0, 0.0)
                    for i, text, passed, reason in judged
                ]
            )
            bar.update(len(batch))
    scored = answers.of(label, "", by_id)
    return summarize_answers(label, "", 0, task.config.gen_length, scored), [
        a for a in scored if not a.passed
    ]


def read_answers(path: Path, wanted: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """(task_id, completion) of human-eval's jsonl, those of the problems `wanted`.

    UserError for a line of another form, an unknown problem, and one that has no answer.
    """
    found = []
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(k), str) for k in ("task_id", "completion")
        ):
            raise UserError(
                f'{path}, line {number} must look like {{"task_id": "...", "completion": "..."}}'
            )
        found.append((record["task_id"], record["completion"]))
    if unknown := {i for i, _ in found} - set(known):
        raise UserError(f"{path}: the task has no problem {min(unknown)}")
    if missing := set(wanted) - {i for i, _ in found}:
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(wanted)} problems, {min(missing)} for one"
        )
    keep = set(wanted)
    return [(i, text) for i, text in found if i in keep]


def open_answers(folder: str | Path | None, about: dict[str, Any]) -> Answers:
    """The answers of a run, of which the first process alone has the folder; all know what is there."""
    mine: list[Answers] = []

    def make() -> list[dict[str, Any]]:
        mine.append(Answers(folder, about))
        return (
            [dataclasses.asdict(answer) for answer in mine[0].all()]
            if jax.process_count() > 1
            else []
        )

    kept = multihost.broadcast_from_first(make)
    if mine:
        return mine[0]
    answers = Answers(None, about)
    answers.add([Answer(**fields) for fields in kept])
    return answers
