"""Run of `xflow evaluate`: scores a model or given answers.

Several processes decode together on one mesh. Each runs its own share of the programs, and the
first one writes and prints.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from xflow_jax.cli.arguments import cache_arguments
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import CacheOptions, Flow, Rule, parse_budgets, parse_rules
from xflow_jax.errors import UserError, printable, require
from xflow_jax.evaluation import (
    Answer,
    Answers,
    Row,
    ablation_table,
    ablations,
    aup_table,
    budget_table,
    describe_inputs,
    describe_rule,
    describe_task,
    evaluate,
    fingerprint,
    hash_file,
    make_cells,
    mcnemar_table,
    open_answers,
    read_answers,
    rows_to_text,
    score_answers,
    shard_folder,
    table_legend,
    write_report,
)
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM, load
from xflow_jax.parallel import MERGE, WHOLE, Shard, default_mesh, multihost, parse_shard
from xflow_jax.tasks import Task, get_task

MOST_FAILURES = 10  # failed answers from elsewhere that are printed with their reasons


@dataclass(frozen=True)
class _Protocol:
    """Rules and budgets of a run.

    Attributes:
        rules: label -> rule, as the user listed them.
        variants: label -> rule of --ablate: the flow without each of its parts.
        budgets: shares of the full number of steps.
        flow: (label, rule) of the first flow, or None.
    """

    rules: Mapping[str, Rule]
    variants: Mapping[str, Rule]
    budgets: Sequence[Fraction]
    flow: tuple[str, Flow] | None


def evaluate_task(args: argparse.Namespace) -> None:
    """Scores answers and prints the tables.

    Args:
        args: the arguments of `xflow evaluate`.

    Raises:
        UserError: for bad input.
    """
    task = get_task(args.task, args.set)
    shard = _find_shard(args)
    data = None if args.data is None else to_path(args.data)
    problems = task.problems(data, args.limit)
    about: dict[str, Any] = {"format": 2, **describe_task(task, data), "limit": args.limit}
    tables: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:  # the folder of --out is locked until its report is there
        if args.canonical or args.answers is not None:
            rows = [_score_given(args, task, problems, about, stack)]
        else:
            rows, tables = _score_model(args, task, problems, about, stack, shard)
        if not multihost.is_first_process():
            return
        if shard != WHOLE:
            print(f"{shard_folder(to_path(args.out), shard)}: share {args.shard} of the answers")
            return
        ending = "The answers were not kept. --out DIR keeps them, with the tables and a plot."
        if args.out is not None:
            # Files come before the output, whose reader may close the pipe early.
            files = write_report(to_path(args.out), task, rows, _notes(task, about), tables)
            ending = f"Wrote {', '.join(map(str, files))}."
    parts = [rows_to_text(rows), *(f"{title}\n\n{text}" for title, text in tables if text)]
    parts += [table_legend(task), *_cache_note(about), ending]
    print_text("\n" + "\n\n".join(parts))


def _find_shard(args: argparse.Namespace) -> Shard:
    """Parses --shard, and raises UserError where it has no effect."""
    if args.shard:
        require(
            args.model is not None and args.out is not None,
            "--shard is for independent workers with --model and --out",
        )
    return parse_shard("" if args.shard == MERGE else args.shard)


def _notes(task: Task, about: Mapping[str, Any]) -> list[str]:
    """Lists the lines below the table: legend, source, and options."""
    source = f"source: {about.get('source')}"
    if "model" in about:
        source = f"model {about['model']}, seed {about['seed']}"
    options = {
        label: ", ".join(f"{k} {v}" for k, v in rule.items() if k not in ("kind", "needs_keys"))
        for label, rule in about.get("rules", {}).items()
    }
    rules = [f"{label}: {text}" for label, text in options.items()]
    return [table_legend(task), source, *_cache_note(about), *rules]


def _cache_note(about: Mapping[str, Any]) -> list[str]:
    """Lists the sentence on an approximate decode, if the run had one."""
    if "refresh" not in about:
        return []
    if about["refresh"] > 1 and not {"cache", "prompt_every"} & set(about):
        return [
            f"The prompt's keys and values were read anew every {about['refresh']} steps of a "
            "block only."
        ]
    names = [name for name in ("refresh", "window", "prompt_every") if about.get(name)]
    numbers = "".join(f", {name} {about[name]}" for name in names)
    return [
        f"Keys and values came from a cache, an approximation: {about.get('cache', 'prompt')}"
        f"{numbers}."
    ]


def _score_given(
    args: argparse.Namespace,
    task: Task,
    problems: Sequence[object],
    about: dict[str, Any],
    stack: contextlib.ExitStack,
) -> Row:
    """Scores the reference answers, or answers from elsewhere, and prints failures."""
    wanted = [task.task_id(problem) for problem in problems]
    if args.canonical:
        label = "canonical"
        texts = [(i, task.canonical(problem)) for i, problem in zip(wanted, problems, strict=True)]
    else:
        label = "answers"
        known = wanted
        if args.limit is not None:  # the file may hold answers to problems that it leaves out
            everything = task.problems(args.data and to_path(args.data), None)
            known = [task.task_id(problem) for problem in everything] + wanted
        texts = read_answers(to_path(args.answers), wanted, known)
        about["answers"] = hash_file(to_path(args.answers))
    about["source"] = label
    answers = stack.enter_context(open_answers(args.out, about))
    row, failed = score_answers(task, problems, texts, label, answers)
    if multihost.is_first_process():
        _print_failures(task, dict(zip(wanted, problems, strict=True)), failed)
    return row


def _print_failures(task: Task, by_id: Mapping[str, object], failed: Sequence[Answer]) -> None:
    """Prints the first failures, and the task's hints on all of them."""
    for answer in failed[:MOST_FAILURES]:
        print(printable(f"failed: {answer.task_id}: {answer.reason}"))
    if len(failed) > MOST_FAILURES:
        print(f"failed: {len(failed) - MOST_FAILURES} more")
    hints = Counter(task.hint(by_id[answer.task_id], answer.text) for answer in failed)
    for hint, count in hints.items():
        if hint is not None:
            print(f"{count} of the failed answers: {hint}.")


def _score_model(
    args: argparse.Namespace,
    task: Task,
    problems: Sequence[object],
    about: dict[str, Any],
    stack: contextlib.ExitStack,
    shard: Shard,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Decodes and scores all rules at all budgets.

    Returns:
        The rows, and (title, Markdown) of each table.
    """
    if args.model is None:
        raise UserError(
            "there is nothing to score: give --model DIR, --canonical or --answers FILE"
        )
    protocol = _protocol(args, task)
    mesh = default_mesh(args.mesh)
    lm = load(args.model, dtype=args.dtype, mesh=mesh, mask_id=args.mask_id)
    # Wrong budgets must fail before the base model is loaded.
    rules, cache = {**protocol.rules, **protocol.variants}, CacheOptions(**cache_arguments(args))
    cells = make_cells(lm, task, rules, protocol.budgets, cache)
    base_name = args.base or ("tiny-base" if args.model == "tiny" else None)
    base = load(base_name, dtype=args.dtype, mesh=mesh) if args.ablate and base_name else None
    about |= _describe_run(args, protocol, lm, base) | describe_inputs(lm, task, problems)
    folder = args.out if shard == WHOLE else shard_folder(to_path(args.out), shard)
    answers = stack.enter_context(open_answers(folder, about, args.shard == MERGE))
    options = {name: getattr(args, name) for name in ("batch_size", "seed", "samples", "k")}
    options |= {"cache": cache, "shard": shard}
    rows = evaluate(lm, task, problems, cells, answers, **options)
    if base is not None and protocol.flow is not None:
        label, flow = protocol.flow
        unaligned = {f"{label} without alignment": flow}
        cells = make_cells(base, task, unaligned, protocol.budgets, cache)
        rows += evaluate(base, task, problems, cells, answers, **options)
    if shard != WHOLE:
        return rows, []
    ids = [task.task_id(problem) for problem in problems]
    return rows, _tables(args, protocol, lm.config.family, rows, answers, ids)


def _protocol(args: argparse.Namespace, task: Task) -> _Protocol:
    """Parses --rules, --budgets and --ablate."""
    rules = parse_rules(args.rules, task.config.rule_options)
    budgets = parse_budgets(args.budgets)
    flows = [(label, rule) for label, rule in rules.items() if isinstance(rule, Flow)]
    flow = flows[0] if flows else None
    if args.ablate and flow is None:
        raise UserError("--ablate takes the parts from a flow, so put one among --rules")
    variants = ablations(*flow) if args.ablate and flow is not None else {}
    return _Protocol(rules, variants, budgets, flow)


def _describe_run(
    args: argparse.Namespace, protocol: _Protocol, lm: LM, base: LM | None
) -> dict[str, Any]:
    """Describes a run for run.json. A folder continues only the same run."""
    rules = {**protocol.rules, **protocol.variants}
    about: dict[str, Any] = {
        "model": f"{fingerprint(lm.params)} {args.dtype}",
        "rules": {label: describe_rule(rule) for label, rule in rules.items()},
        "budgets": [str(budget) for budget in protocol.budgets],
        "seed": args.seed,
        "samples": args.samples,
    }
    about |= CacheOptions(**cache_arguments(args)).describe(lm.config)
    if args.dtype != "float32":  # the shape of a batch then decides how sums are rounded
        about["batch_size"] = args.batch_size
    if base is not None:
        about["base"] = f"{fingerprint(base.params)} {args.dtype}"
    return about


def _tables(
    args: argparse.Namespace,
    protocol: _Protocol,
    family: str,
    rows: Sequence[Row],
    answers: Answers,
    task_ids: Sequence[str],
) -> list[tuple[str, str]]:
    """Builds (title, Markdown) of the tables that compare rules. Some are empty."""
    listed = [row for row in rows if row.rule in protocol.rules]
    ablation = ""
    if args.ablate and protocol.flow is not None:
        ablation = ablation_table(protocol.flow[0], rows)
    first = listed[0].rule
    return [
        ("By budget", budget_table(listed, protocol.rules, family, args.task)),
        ("The parts of the flow", ablation),
        (
            f"Against {first}, problem by problem",
            mcnemar_table(listed, answers, task_ids, args.seed),
        ),
        ("Accuracy under parallelism", aup_table(listed)),
    ]
