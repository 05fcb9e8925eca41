"""Evaluation: one task, many rules and budgets; every answer is run, kept and counted.

Several processes decode together on one mesh, each runs its own share of the programs, and the first one writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xflow_jax.cli.arguments import MODEL, RULE, add_device_arguments, add_refresh_argument
from xflow_jax.decoding import Flow, check_refresh, parse_budgets, parse_rules
from xflow_jax.errors import UserError
from xflow_jax.evaluation import (
    Row,
    ablation_table,
    ablations,
    aup_table,
    budget_table,
    describe_rule,
    describe_task,
    evaluate,
    fingerprint,
    format_table,
    hash_file,
    legend,
    make_cells,
    mcnemar_table,
    open_answers,
    read_answers,
    score_answers,
    write_report,
)
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh, multihost
from xflow_jax.tasks import Task, get_task

FAILURES = 10  # of answers made elsewhere: as many are printed with their reasons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow evaluate`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help=MODEL)
    source.add_argument(
        "--canonical", action="store_true", help="score the task's own reference answers"
    )
    source.add_argument(
        "--answers",
        metavar="FILE",
        help="score answers made elsewhere: jsonl, task_id and completion",
    )
    parser.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="microcode, humaneval or mbpp; likelihood, of given responses",
    )
    parser.add_argument(
        "--rules",
        default="mask,threshold,flow",
        metavar="RULES",
        help="separated by commas: " + RULE,
    )
    parser.add_argument(
        "--budgets", default="1,1/2,1/4,1/8", metavar="LIST", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="the first flow of RULES without each of its parts, too",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="with --ablate: the model before its alignment (default: tiny-base with tiny)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="answers to each problem, where a rule draws (default: 1)",
    )
    parser.add_argument(
        "--k", type=int, default=1, metavar="K", help="pass@K beside pass@1 (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first problems")
    parser.add_argument(
        "--out", metavar="DIR", help="keep every answer here; the same command again continues"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="the task's public jsonl or jsonl.gz (default: from the hub)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)"
    )
    add_refresh_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """`xflow evaluate`."""
    if args.task == "likelihood":
        from xflow_jax.cli import likelihood

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
    if not multihost.is_first_process():
        return
    parts = [
        format_table(rows),
        *(f"{title}\n\n{text}" for title, text in tables if text),
        legend(task),
        *_approximate(about),
    ]
    end = "The answers were not kept: --out DIR keeps them, with the tables and a picture."
    if args.out is not None:  # before anything is printed, to what may be a pipe that closes early
        end = (
            "Wrote "
            + ", ".join(
                map(str, write_report(Path(args.out), task, rows, _notes(task, about), tables))
            )
            + "."
        )
    print("\n" + "\n\n".join([*parts, end]))


def _notes(task: Task, about: dict[str, Any]) -> list[str]:
    """What stands below the table: its legend, and what the run was."""
    made_by = (
        [f"model {about['model']}, seed {about['seed']}"]
        if "model" in about
        else [f"source: {about['source']}"]
    )
    options = {
        label: ", ".join(f"{k} {v}" for k, v in rule.items() if k not in ("kind", "needs_keys"))
        for label, rule in about.get("rules", {}).items()
    }
    return [
        legend(task),
        *made_by,
        *_approximate(about),
        *(f"{label}: {text}" for label, text in options.items()),
    ]


def _approximate(about: dict[str, Any]) -> list[str]:
    """What is to be known of a run whose decoding was no exact one."""
    every = about.get("refresh")
    return (
        [f"The prompt's keys and values were read anew every {every} steps of a block only."]
        if every
        else []
    )


def _run_given(
    args: argparse.Namespace, task: Task, problems: Sequence[Any], about: dict[str, Any]
) -> Row:
    if args.canonical:
        label, texts = "canonical", [(task.task_id(p), task.canonical(p)) for p in problems]
    else:
        label, known = (
            "answers",
            [task.task_id(p) for p in task.problems(args.data and Path(args.data), None)],
        )
        wanted = [task.task_id(p) for p in problems]
        texts = read_answers(Path(args.answers), wanted, known + wanted)
        about["answers"] = hash_file(Path(args.answers))
    about["source"] = label
    row, failed = score_answers(task, problems, texts, label, open_answers(args.out, about))
    if multihost.is_first_process():
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
    rules = parse_rules(args.rules, task.config.rule_options)
    budgets = parse_budgets(args.budgets)
    flow = next((label for label, rule in rules.items() if isinstance(rule, Flow)), None)
    if args.ablate and flow is None:
        raise UserError("--ablate takes the parts from a flow, so put one among --rules")
    mesh = default_mesh(args.mesh)
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
    options = {
        "batch_size": args.batch_size,
        "seed": args.seed,
        "samples": args.samples,
        "k": args.k,
    }
    options["refresh"] = args.refresh
    rows = evaluate(lm, task, problems, cells, answers, **options)
    if base is not None:
        unaligned = make_cells(base, task, {f"{flow} without alignment": rules[flow]}, budgets)
        rows += evaluate(base, task, problems, unaligned, answers, **options)
    ids = [task.task_id(problem) for problem in problems]
    own = [row for row in rows if row.rule in rules]
    tables = [
        ("By budget", budget_table(own, rules, lm.config.family, task.name)),
        ("The parts of the flow", ablation_table(flow, rows) if args.ablate else ""),
        (f"Against {own[0].rule}, problem by problem", mcnemar_table(own, answers, ids, args.seed)),
        ("Accuracy under parallelism", aup_table(own)),
    ]
    return rows, tables
