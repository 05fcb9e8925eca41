"""Answers on the disk, and the rows that sum them up."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Answer, Answers, summarize_answers

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


def test_answers_are_stored_and_read_again(tmp_path):
    first = Answers(tmp_path / "out", RUN)
    first.add([answer("a"), answer("b", passed=False)])
    again = Answers(tmp_path / "out", RUN)
    assert again.has("mask", "1/2", "a") and not again.has("mask", "1", "a")
    assert again.select("mask", "1/2", ["b", "c", "a"]) == [answer("b", passed=False), answer("a")]


def test_answers_of_one_problem_differ_by_their_seeds():
    answers = Answers(None, RUN)
    answers.add([answer("a", seed=0), answer("a", seed=2)])
    assert [answers.has("mask", "1/2", "a", seed) for seed in (0, 1, 2, None)] == [1, 0, 1, 1]
    assert not answers.has("mask", "1/2", "b") and not answers.has("flow", "1/2", "a", 0)


def test_an_incomplete_line_is_removed(tmp_path):
    Answers(tmp_path, RUN).add([answer("a"), answer("b")])
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Answers(tmp_path, RUN)
    assert again.has("mask", "1/2", "a") and not again.has("mask", "1/2", "b")
    again.add([answer("b")])
    assert file.read_bytes() == whole


def test_another_run_is_refused_and_unchanged(tmp_path):
    Answers(tmp_path, RUN).add([answer("a")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match="another run, which differs in rules, seed. Choose another folder"
    ):
        Answers(tmp_path, {"task": "t", "rules": {}, "seed": 1})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_with_other_contents(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made an output folder"):
        Answers(tmp_path / "file", RUN)
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no run.json that describes their run"):
        Answers(tmp_path, RUN)
    (tmp_path / "run.json").write_text('{"task": "t", "rules": {"mask": {"order": "confidence"}}}')
    with pytest.raises(UserError, match="answers.jsonl, line 1 is no answer"):
        Answers(tmp_path, RUN)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    answers = Answers(tmp_path, RUN)

    def full(*_):
        raise OSError(28, "No space left on device")

    answers.add([answer("a")])
    before = (tmp_path / "answers.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="answers.jsonl: the disk is full$"):
            answers.add([answer("b")])
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    answers.add([answer("b")])
    assert [a.task_id for a in Answers(tmp_path, RUN).all()] == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"passed": 1' + "0" * 5000 + "}",
        json.dumps(dataclasses.asdict(answer("a")) | {"passed": "yes"}),
        json.dumps(dataclasses.asdict(answer("a")) | {"seconds": "1"}),
        json.dumps(dataclasses.asdict(answer("a")) | {"task_id": []}),
        json.dumps(dataclasses.asdict(answer("a")) | {"more": 1}),
    ],
)
def test_damaged_answers_are_one_sentence(tmp_path, line):
    Answers(tmp_path, RUN)
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="answers.jsonl, line 1 is no answer"):
        Answers(tmp_path, RUN)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no run.json that describes their run"):
        Answers(tmp_path, RUN)


def test_a_pipe_in_a_run_folder_is_not_read(tmp_path):
    Answers(tmp_path, RUN)
    os.mkfifo(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match="it is a pipe or a device"):
        Answers(tmp_path, RUN)
