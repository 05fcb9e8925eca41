"""Comparisons in the form of the paper, as Markdown.

Accuracy by budget beside the published figures, the ablation of the flow, McNemar's test of each
rule against the first, and the area under accuracy over parallelism.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

from xflow_jax.decoding import Flow, MaskPrediction, Rule
from xflow_jax.errors import require
from xflow_jax.evaluation.answers import Answers, Row
from xflow_jax.evaluation.statistics import aup, mcnemar
from xflow_jax.evaluation.tables import markdown_table

PAPER = "arXiv:2606.29066"
# (model family, task) -> (budget, class of the rule) -> pass@1 in percent: Table 1 of the paper,
# LLaDA-8B-Instruct in one block and LLaDA2.0-mini in blocks of 32.
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


def budget_table(rows: Sequence[Row], rules: Mapping[str, Rule], family: str, task: str) -> str:
    """Builds a table in the form of the paper's Table 1.

    It is ordered by budget, with the rules within each. The published figures have a column of
    their own if there are any for this family and task.

    Args:
        rows: one row for each rule and budget.
        rules: label -> rule.
        family: name of the model family.
        task: name of the task.
    """
    published = PUBLISHED.get((family, task), {})
    header = ["budget", "decoder", f"{task}, % solved", "95 % CI", "passes"]
    if published:
        header.append(f"{PAPER}, its own {MODELS[family]}")
    lines = []
    for budget in sorted({row.budget for row in rows}, key=Fraction):
        for row in (row for row in rows if row.budget == budget):
            cells = [row.budget, row.rule, f"{row.accuracy:.1f}", f"{row.low:.1f}-{row.high:.1f}"]
            cells.append(f"{row.forward_passes:.1f}")
            if published:
                figure = published.get((budget, type(rules.get(row.rule))))
                cells.append("-" if figure is None else f"{figure:.2f}")
            lines.append(cells)
    return markdown_table(header, lines, left=2)


def mcnemar_table(
    rows: Sequence[Row], answers: Answers, task_ids: Sequence[str], seed: int = 0
) -> str:
    """Builds a table that compares every rule with the first.

    Rules are compared at equal budgets. The test is McNemar's exact test on the problems that both
    rules answered.

    Args:
        rows: one row for each rule and budget.
        answers: all answers of the run.
        task_ids: names of the problems.
        seed: seed of the answers that count if a problem has several.

    Returns:
        Markdown, or an empty text if there is nothing to compare.
    """
    first, lines = rows[0].rule, []
    for row in rows[1:]:
        if row.rule == first:
            continue
        mine, other = (
            {
                a.task_id: a.passed
                for a in answers.select(rule, row.budget, task_ids)
                if a.seed == seed
            }
            for rule in (row.rule, first)
        )
        both = [i for i in task_ids if i in mine and i in other]
        if both:
            better, worse, p = mcnemar([(mine[i], other[i]) for i in both])
            lines.append([row.budget, row.rule, str(better), str(worse), f"{p:.2g}"])
    header = ("budget", "rule", "only this solves", f"only {first} solves", "p (McNemar, exact)")
    return markdown_table(header, lines, left=2) if lines else ""


def aup_table(rows: Sequence[Row]) -> str:
    """Builds a table of accuracy under parallelism, best rule first.

    Parallelism is response positions, all N of them, per forward pass. Rules with a single budget
    are left out.

    Returns:
        Markdown, or an empty text if no rule has several budgets.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.rule, []).append((1 / row.passes_per_token, row.accuracy))
    best = max(row.accuracy for row in rows)
    areas = [(aup(points, best), rule) for rule, points in curves.items() if len(points) > 1]
    lines = [
        [rule, f"{area:.1f}", f"{max(rho for rho, _ in curves[rule]):.1f}"]
        for area, rule in sorted(areas, reverse=True)
    ]
    return markdown_table(("rule", "AUP", "most tokens per pass"), lines, left=1) if lines else ""


def ablations(label: str, rule: Flow) -> dict[str, Rule]:
    """Returns variants of a flow, each without one of its parts.

    They are those of the paper's Table 2. Alignment is a part of the model, so it is not among
    them.

    Args:
        label: the flow as the user wrote it. The names of the variants begin with it.
        rule: the flow.

    Returns:
        Name of the variant -> rule.

    Raises:
        UserError: for a flow that takes no steps.
    """
    require(
        rule.reedit != "always",
        f"an ablation takes the parts from a flow with steps, which {label} has not. Leave out "
        "reedit=always.",
    )
    replace = dataclasses.replace
    variants: dict[str, Rule] = {
        "asynchronous schedule": replace(rule, synchronous=True),
        "re-editing": replace(rule, reedit_margin=None),
        "hard commitment": replace(rule, commit=False),
    }
    if rule.policy is not None:
        variants["learned policy"] = replace(rule, policy=None)
    return {f"{label} without {part}": variant for part, variant in variants.items()}


def ablation_table(label: str, rows: Sequence[Row]) -> str:
    """Builds a table in the form of the paper's Table 2.

    It has a column for each budget.

    Args:
        label: the flow as the user wrote it. Rows of rules whose names begin with it are used.
        rows: one row for each rule and budget.
    """
    budgets = list(dict.fromkeys(row.budget for row in rows))
    names = [name for name in dict.fromkeys(row.rule for row in rows) if name.startswith(label)]
    found = {
        (row.rule, row.budget): f"{row.accuracy:.1f} ({row.low:.1f}-{row.high:.1f})" for row in rows
    }
    lines = [[name, *(found.get((name, budget), "-") for budget in budgets)] for name in names]
    header = ("variant", *(f"budget {budget}, % solved (95 % CI)" for budget in budgets))
    return markdown_table(header, lines, left=1)
