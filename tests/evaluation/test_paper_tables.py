"""Comparisons in the form of the paper."""

from __future__ import annotations

import dataclasses

import jax

from tests.evaluation.test_answers import answer
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.evaluation.answers import Answers, Row
from xflow_jax.evaluation.paper_tables import (
    ablation_table,
    ablations,
    aup_table,
    budget_table,
    mcnemar_table,
)

RULES = {"mask": MaskPrediction(), "flow:power=4": Flow(power=4.0), "threshold": Threshold()}


def row(rule: str, budget: str, accuracy: float, passes: float) -> Row:
    return Row(
        rule, budget, 4, 10, accuracy, accuracy - 5, accuracy + 5, passes, passes / 8, 1.0, 1.0
    )


def test_the_budget_table_has_the_published_figures():
    rows = [row(rule, budget, 50.0, 4) for rule in RULES for budget in ("1", "1/4")]
    lines = budget_table(rows, RULES, "llada2", "humaneval").splitlines()
    assert lines[0].endswith("| arXiv:2606.29066, its own LLaDA2.0-mini |") and len(lines) == 8
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    figures = {(c[0], c[1]): c[5] for c in cells}
    assert [c[0] for c in cells] == ["1/4"] * 3 + ["1"] * 3
    assert figures[("1/4", "mask")] == "32.32" and figures[("1/4", "flow:power=4")] == "59.76"
    assert (
        figures[("1", "mask")] == "79.88"
        and figures[("1", "flow:power=4")] == figures[("1/4", "threshold")] == "-"
    )
    for family in ("llada", "sdar"):  # of which one has published figures, for other tasks
        assert "arXiv" not in budget_table(rows, RULES, family, "microcode")


def test_mcnemar_compares_rules_on_the_same_problems():
    answers = Answers(None, {})
    mask, flow = [True] * 6 + [False] * 6, [True] * 2 + [False] * 10
    for rule, verdicts in (("mask", mask), ("flow", flow)):
        answers.add(
            [answer(str(i), passed, rule=rule, seed=3) for i, passed in enumerate(verdicts)]
        )
    answers.add([answer("0", False, rule="flow", seed=4)])  # another sample, which does not count
    rows = [row("mask", "1/2", 50, 4), row("flow", "1/2", 17, 4)]
    text = mcnemar_table(rows, answers, [str(i) for i in range(12)], seed=3)
    assert "| 1/2 | flow | 0 | 4 | 0.12 |" in text  # 2 (1/2)^4 = 0.125
    assert mcnemar_table(rows[:1], answers, ["0"]) == ""


def test_the_aup_table_has_the_best_rule_first():
    rows = [
        row("mask", "1", 50, 8),
        row("mask", "1/2", 48, 4),
        row("flow", "1", 49, 8),
        row("flow", "1/2", 49, 2),
    ]
    lines = aup_table(rows).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["flow", "mask"]
    assert lines[2].endswith("| 4.0 |") and lines[3].endswith("| 2.0 |")
    assert aup_table(rows[:1]) == ""  # a single point spans no area


def test_ablations_of_a_flow():
    flow = Flow(policy=init_policy(jax.random.key(0), 8))
    variants = ablations("flow", flow)
    assert list(variants) == [
        f"flow without {part}"
        for part in ("asynchronous schedule", "re-editing", "hard commitment", "learned policy")
    ]
    assert variants["flow without learned policy"] == dataclasses.replace(flow, policy=None)
    assert (
        all(variant != flow for variant in variants.values())
        and len(ablations("flow", Flow())) == 3
    )
    rows = [
        row("mask", "1/4", 1, 4),
        row("flow", "1/4", 50, 4),
        row("flow without re-editing", "1/4", 40, 4),
    ]
    text = ablation_table("flow", rows)
    assert (
        "| flow | 50.0 (45.0-55.0) |" in text
        and "| flow without re-editing | 40.0 (35.0-45.0) |" in text
    )
    assert "mask" not in text
