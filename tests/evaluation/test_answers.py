"""Answers on the disk, and what they add up to."""

from __future__ import annotations

import csv
import dataclasses
import io

import numpy as np
import pytest

from xflow_jax.errors import UserError
from xflow_jax.evaluation import answers as answers_module
from xflow_jax.evaluation.answers import Answer, Answers, summarize_answers
from xflow_jax.evaluation.statistics import wilson
from xflow_jax.evaluation.tables import as_csv, format_table, markdown_table

RUN = {"task": "t", "rules": {"mask": {"order": "confidence"}}}


def answer(task_id: str, passed: bool = True, **changes) -> Answer:
    made = Answer(
        task_id,
        "mask",
        "1/2",
        0,
        "text\u2028 of\nlines",
        passed,
        "passed" if passed else "wrong",
        4,
        0.5,
    )
    return dataclasses.replace(made, **changes)


def test_wilson_interval():
    # 8 of 10, worked out by hand: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.84146
    assert np.allclose(wilson(8, 10), (0.490162, 0.943318), atol=1e-6)
    assert np.allclose(wilson(0, 64), (0.0, 0.056624), atol=1e-6) and wilson(64, 64)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_summary():
    row = summarize_answers(
        "mask", "1/2", 4, 8, [answer("a"), answer("b", passed=False), answer("c", forward_passes=1)]
    )
    assert (row.n, row.steps, row.forward_passes, row.passes_per_token, row.seconds) == (
        3,
        4,
        3.0,
        3 / 8,
        1.5,
    )
    assert row.accuracy == pytest.approx(200 / 3) and row.tokens_per_second == pytest.approx(
        24 / 1.5
    )
    assert row.low < row.accuracy < row.high
    twice = summarize_answers(
        "mask", "1/2", 4, 8, [answer("a"), answer("a", passed=False), answer("b")]
    )
    assert (twice.n, twice.accuracy) == (2, 75.0)  # pass@1 is the mean over a problem's answers


def test_answers_are_kept_and_read_again(tmp_path):
    first = Answers(tmp_path / "out", RUN)
    first.add([answer("a"), answer("b", passed=False)])
    again = Answers(tmp_path / "out", RUN)
    assert again.has("mask", "1/2", "a") and not again.has("mask", "1", "a")
    assert again.of("mask", "1/2", ["b", "c", "a"]) == [answer("b", passed=False), answer("a")]


def test_half_a_line_is_dropped(tmp_path):
    Answers(tmp_path, RUN).add([answer("a"), answer("b")])
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Answers(tmp_path, RUN)
    assert again.has("mask", "1/2", "a") and not again.has("mask", "1/2", "b")
    again.add([answer("b")])
    assert file.read_bytes() == whole


def test_another_run_is_refused_and_left_alone(tmp_path):
    Answers(tmp_path, RUN).add([answer("a")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match="another run, which differs in rules, seed; choose another folder"
    ):
        Answers(tmp_path, {"task": "t", "rules": {}, "seed": 1})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made an output folder"):
        Answers(tmp_path / "file", RUN)
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no run.json says of which run"):
        Answers(tmp_path, RUN)
    (tmp_path / "run.json").write_text('{"task": "t", "rules": {"mask": {"order": "confidence"}}}')
    with pytest.raises(UserError, match="answers.jsonl, line 1 is no answer"):
        Answers(tmp_path, RUN)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    answers = Answers(tmp_path, RUN)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers_module.os, "fsync", full)
    with pytest.raises(UserError, match="answers.jsonl cannot be written: No space left on device"):
        answers.add([answer("a")])


def test_tables():
    rows = [
        summarize_answers("mask", "1", 8, 8, [answer("a"), answer("b", passed=False)]),
        summarize_answers("flow:power=4,commit=false", "1/2", 4, 8, [answer("a")]),
        summarize_answers("canonical", "", 0, 8, [answer("a", seconds=0.0)]),
    ]
    lines = format_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 100
    assert "50.0 %" in lines[2] and lines[4].split()[1:3] == ["-", "-"]
    assert markdown_table(rows).count("\n") == 5 and all(
        line.count("|") == 10 for line in markdown_table(rows).splitlines()
    )
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [r["rule"] for r in read] == [r.rule for r in rows]
    assert float(read[0]["accuracy"]) == 50.0 and float(read[0]["low"]) < 50
