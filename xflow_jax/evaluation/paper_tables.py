"""An evaluation's tables: in the shape of the paper's, rules against each other, and the area under their curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from xflow_jax.checkpoints import write_atomic
from xflow_jax.decoding import Flow, MaskPrediction, Rule
from xflow_jax.evaluation.answers import Answers, Row
from xflow_jax.evaluation.plots import plot_accuracy
from xflow_jax.evaluation.statistics import aup, mcnemar
from xflow_jax.evaluation.tables import as_csv, markdown_lines, markdown_table
from xflow_jax.tasks import Task

PAPER = "arXiv:2606.29066"


# (model family, task) -> (budget, kind of rule) -> pass@1 in percent: the paper's Table 1, of LLaDA-8B-Instruct in one
# block and LLaDA2.0-mini in blocks of 32.
PUBLISHED: dict[tuple[str, str], dict[tuple[str, type], float]] = {
    ("llada", "humaneval"): {
        ("1/4", MaskPrediction): 33.54,
        ("1/4", Flow): 45.12,
        ("1", MaskPrediction): 46.34,
    },
    ("llada", "mbpp"): {
        ("1/4", MaskPrediction): 21.20,
        ("1/4", Flow): 33.00,
        ("1", MaskPrediction): 39.60,
    },
    ("llada2", "humaneval"): {
        ("1/4", MaskPrediction): 32.32,
        ("1/4", Flow): 59.76,
        ("1", MaskPrediction): 79.88,
    },
    ("llada2", "mbpp"): {
        ("1/4", MaskPrediction): 31.40,
        ("1/4", Flow): 43.80,
        ("1", MaskPrediction): 63.20,
    },
}


MODELS = {"llada": "LLaDA-8B", "llada2": "LLaDA2.0-mini"}


def budget_table(rows: Sequence[Row], rules: dict[str, Rule], family: str, task: str) -> str:
    """The rows as Markdown in the shape of the paper's Table 1: budgets, rules within them, the paper's own figures in
    a column of their own where it has any for this family of models and this task."""
    theirs = PUBLISHED.get((family, task), {})
    header = ["budget", "decoder", f"{task}, % solved", "95 % CI", "passes"]
    header += [f"{PAPER}, its own {MODELS[family]}"] * bool(theirs)
    lines = []
    for budget in sorted({row.budget for row in rows}, key=Fraction):
        for row in (row for row in rows if row.budget == budget):
            cells = [row.budget, row.rule, f"{row.accuracy:.1f}", f"{row.low:.1f}-{row.high:.1f}"]
            cells.append(f"{row.forward_passes:.1f}")
            if theirs:
                figure = theirs.get((budget, type(rules.get(row.rule))))
                cells.append("-" if figure is None else f"{figure:.2f}")
            lines.append(cells)
    return markdown_lines(header, lines, left=2)


def mcnemar_table(
    rows: Sequence[Row], answers: Answers, task_ids: Sequence[str], seed: int = 0
) -> str:
    """Every rule against the first one at the same budget, on the same problems, as Markdown; McNemar's exact test.

    Where there are several answers to a problem, those of `seed` count.
    """
    first, lines = rows[0].rule, []
    for row in rows[1:]:
        if row.rule == first:
            continue
        verdicts = []
        for rule in (row.rule, first):
            kept = answers.of(rule, row.budget, task_ids)
            verdicts.append(
                {answer.task_id: answer.passed for answer in kept if answer.seed == seed}
            )
        both = [i for i in task_ids if i in verdicts[0] and i in verdicts[1]]
        if both:
            better, worse, p = mcnemar([(verdicts[0][i], verdicts[1][i]) for i in both])
            lines.append([row.budget, row.rule, str(better), str(worse), f"{p:.2g}"])
    header = (
        "budget",
        f"rule, against {first}",
        "it alone solves",
        f"{first} alone solves",
        "p (McNemar, exact)",
    )
    return markdown_lines(header, lines, left=2) if lines else ""


def aup_table(rows: Sequence[Row]) -> str:
    """Accuracy under parallelism of each rule with several budgets, as Markdown, best first; parallelism is response
    positions, all N of them, by forward passes."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.rule, []).append((1 / row.passes_per_token, row.accuracy))
    best = max(row.accuracy for row in rows)
    found = sorted(
        ((aup(points, best), rule) for rule, points in curves.items() if len(points) > 1),
        reverse=True,
    )
    lines = [
        [rule, f"{area:.1f}", f"{max(rho for rho, _ in curves[rule]):.1f}"] for area, rule in found
    ]
    return markdown_lines(("rule", "AUP", "most tokens per pass"), lines, left=1) if lines else ""


def ablations(label: str, rule: Flow) -> dict[str, Rule]:
    """Table 2's variants of a flow, by name, each without one of its parts (alignment is the model's own)."""
    changes = {
        "asynchronous schedule": {"synchronous": True},
        "re-editing": {"reedit_margin": None},
        "hard commitment": {"commit": False},
    }
    if rule.policy is not None:
        changes["learned policy"] = {"policy": None}
    return {
        f"{label} without {part}": dataclasses.replace(rule, **change)
        for part, change in changes.items()
    }


def ablation_table(label: str, rows: Sequence[Row]) -> str:
    """The variants of the flow `label` in the shape of the paper's Table 2, a column for each budget, as Markdown."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    names = [name for name in dict.fromkeys(row.rule for row in rows) if name.startswith(label)]
    found = {
        (row.rule, row.budget): f"{row.accuracy:.1f} ({row.low:.1f}-{row.high:.1f})" for row in rows
    }
    lines = [[name, *(found.get((name, budget), "-") for budget in budgets)] for name in names]
    return markdown_lines(
        ("variant", *(f"budget {budget}, % solved (95 % CI)" for budget in budgets)), lines, left=1
    )


def legend(task: Task) -> str:
    """What the columns of the table mean, and the task's protocol."""
    s = task.config
    block = "the family's own blocks" if s.block_length is None else f"blocks of {s.block_length}"
    options = "".join(f", {k}={v}" for k, v in s.rule_options)
    stop = f", ends at {' or '.join(s.stop)}" if s.stop else ""
    return (
        f"{task.name}: {s.shots}-shot, {s.gen_length} response tokens, {block}{options}; prompt {s.prompt!r}; "
        f"code: {s.extraction}{stop}.\n"
        "passes: forward passes per sequence, mean; seconds: of decoding, compilation left out; "
        "tokens/s: response tokens."
    )


def write_report(
    folder: Path,
    task: Task,
    rows: Sequence[Row],
    notes: Sequence[str],
    tables: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Writes table.md and results.csv, and the picture where anything was decoded; the paths.

    tables: (title, Markdown) of further tables, of which empty ones are left out.
    """
    made = [folder / "table.md", folder / "results.csv"]
    parts = [f"## {title}\n\n{text}" for title, text in tables if text]
    parts += ["## All figures"] * bool(parts) + [markdown_table(rows), *notes]
    write_atomic(made[0], "\n\n".join(part.strip("\n") for part in parts) + "\n")
    write_atomic(made[1], as_csv(rows))
    if any(row.steps for row in rows):
        made.append(folder / "accuracy-over-budget.png")
        plot_accuracy(rows, made[-1], title=f"{task.name}, {rows[0].n} problems")
    return made
