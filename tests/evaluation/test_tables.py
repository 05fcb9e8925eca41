"""Rows as text, Markdown and CSV, and the report of a run."""

from __future__ import annotations

import csv
import io

import pytest

from tests.evaluation.test_answers import answer
from xflow_jax.evaluation.answers import summarize_answers
from xflow_jax.evaluation.tables import rows_to_csv, rows_to_markdown, rows_to_text, write_report
from xflow_jax.sandbox import SAME_INTERPRETER
from xflow_jax.tasks.base import get_task


def test_the_formats_of_rows():
    rows = [
        summarize_answers("mask", "1", 8, 8, [answer("a"), answer("b", passed=False)]),
        summarize_answers("flow:power=4,commit=false", "1/2", 4, 8, [answer("a")]),
        summarize_answers("canonical", "", 0, 8, [answer("a", seconds=0.0)]),
    ]
    lines = rows_to_text(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 100
    assert "50.0 %" in lines[2] and lines[4].split()[1:3] == ["-", "-"]
    assert rows_to_markdown(rows).count("\n") == 5 and all(
        line.count("|") == 10 for line in rows_to_markdown(rows).splitlines()
    )
    read = list(csv.DictReader(io.StringIO(rows_to_csv(rows))))
    assert [r["rule"] for r in read] == [r.rule for r in rows]
    assert float(read[0]["accuracy"]) == 50.0 and float(read[0]["low"]) < 50


def test_a_report_of_several_samples_has_a_column_for_pass_at_k(tmp_path):
    kept = [
        answer("a", True),
        answer("a", False, seed=1),
        answer("b", False),
        answer("b", False, seed=1),
    ]
    rows = [
        summarize_answers("mask", "1/2", 4, 8, kept, k=2),
        summarize_answers("flow", "1/2", 4, 8, [answer("a"), answer("b")], k=2),
    ]
    assert [(r.accuracy, r.pass_at_k) for r in rows] == [(25.0, 50.0), (100.0, None)]
    made = write_report(
        tmp_path, get_task("microcode"), rows, ["a note"], [("Title", "| a |\n"), ("Empty", "")]
    )
    text = made[0].read_text()
    assert (
        text.startswith("## Title\n\n| a |\n\n## All figures\n\n| rule |") and "Empty" not in text
    )
    assert "| pass@2 |" in text and "50.0 % |" in text and text.endswith("\n\na note\n")
    assert "pass_at_k" in made[1].read_text().splitlines()[0]
    assert pytest.approx(rows[0].forward_passes) == 4


def test_passes_in_the_same_interpreter_are_counted():
    forgeable = answer("a", reason=SAME_INTERPRETER)
    rows = [
        summarize_answers("mask", "1", 8, 8, [forgeable, answer("b")]),
        summarize_answers("flow", "1", 8, 8, [answer("a"), answer("b", passed=False)]),
    ]
    assert [row.same_interpreter for row in rows] == [1, 0] and rows[0].accuracy == 100
    lines = rows_to_text(rows).splitlines()
    assert lines[0].endswith("same interpreter") and lines[2].split()[-1] == "1"
    assert "same interpreter" in rows_to_markdown(rows)
    assert "same interpreter" not in rows_to_text(rows[1:])
    assert list(csv.DictReader(io.StringIO(rows_to_csv(rows))))[0]["same_interpreter"] == "1"
