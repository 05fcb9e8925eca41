"""Microcode: its split, its many right answers, and its checks."""

from __future__ import annotations

import hashlib
import random

import pytest

from xflow_jax.errors import UserError
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import run_many, run_program
from xflow_jax.tasks import microcode
from xflow_jax.tasks.base import get_task
from xflow_jax.tasks.microcode import language

TASK = microcode.TASK


def together(jobs: list[tuple[str, str]]) -> str:
    """Joins (program, checks) pairs into one program that runs all of them in order."""
    return "\n".join(f"{program}\n{checks}" for program, checks in jobs)


@pytest.mark.parametrize(
    ("seed", "style", "digest"),
    [
        (
            0,
            microcode.WIDE_STYLE,
            "b5954e27bb96dd377f00de656de42c41ea87f69159f265f6462e7a2cf4068114",
        ),
        (
            7,
            microcode.WIDE_STYLE,
            "f057049694f7578ed71573c36a4b2506a41ede89e976532b3e9a7f83c702d60d",
        ),
        (
            0,
            microcode.USUAL_STYLE,
            "bbebbbb79ebb39736143b345f7fc68dabfa2530764aa9b5bcfe6c3c6b5389e9b",
        ),
    ],
)
def test_the_training_set_stays_as_it_is(seed, style, digest):
    pairs = [microcode.training_pair(seed, index, style) for index in range(200)]
    assert hashlib.sha256(repr(pairs).encode()).hexdigest() == digest


def test_held_out_compositions_are_many_and_never_trained_on():
    held_out, trained = set(microcode.compositions(True)), set(microcode.compositions(False))
    assert len(held_out) >= 400 and not held_out & trained
    drawn = set()
    for index in range(200):
        problem = microcode.parse(microcode.training_pair(0, index)[0])
        drawn.add(problem.composition)
    assert len(drawn) > 150 and drawn <= trained


def test_held_out_problems():
    problems = TASK.problems(None, None)
    assert len(problems) >= 500
    assert (
        len({TASK.task_id(p) for p in problems})
        == len({p.prompt for p in problems})
        == len(problems)
    )
    assert len({p.composition for p in problems}) >= 400
    assert {p.composition for p in problems} <= set(microcode.compositions(True))
    assert (
        TASK.problems(None, 10) == problems[:10]
    )  # a smaller number is the beginning of a larger one
    assert microcode.problems("test", 10, seed=1) != problems[:10]


def test_every_reference_answer_passes_its_own_checks():
    jobs = []
    for problem in TASK.problems(None, None):
        texts = [
            TASK.canonical(problem),
            microcode.sample_answer(random.Random(problem.prompt), problem),
        ]
        jobs += [TASK.job(problem, text) for text in texts]
    result = run_program(
        "", together(jobs), Limits(seconds=60)
    )  # half a second of work, on a busy machine too
    assert result.passed, result.reason


def test_a_problem_has_many_right_answers():
    problem = microcode.parse(
        "Keep the even numbers, then multiply each number by 3 and return the sum."
    )
    answers = {microcode.sample_answer(random.Random(seed), problem) for seed in range(200)}
    assert len(answers) > 50
    assert any("for" in a and "append" not in a and "[" in a for a in answers)  # a comprehension
    assert any("filter(lambda" in a for a in answers) and any("+=" in a for a in answers)
    assert run_program("", together([TASK.job(problem, a) for a in sorted(answers)])).passed


def test_prompts_are_read_back():
    for problem in TASK.problems(None, None):
        read = microcode.parse("  " + problem.prompt.upper() + " ")
        assert (read.operations, read.reduction) == (problem.operations, problem.reduction)
    others = (
        "",
        "A joke, please.",
        "Keep the odd numbers",
        "return the sum",
        "Add 99 to each number and return it.",
    )
    assert [microcode.parse(other) for other in others] == [None] * len(others)


def test_wrong_answers_fail():
    problem = microcode.parse("Keep the even numbers and return the count.")
    answers = {
        "def f(xs):\n    return len([x for x in xs if x % 2 == 0])": "passed",
        "def f(xs):\n    return len(xs)": "wrong answer",
        # 3.0 is not 3.
        "def f(xs):\n    return float(len([x for x in xs if x % 2 == 0]))": "wrong answer",
        "def f(xs):\n    return len(": "syntax error",
        "print(3)": "error",
        "def f(xs):\n    return count": "error: NameError",
        "": "error",
    }
    results = run_many([TASK.job(problem, text) for text in answers])
    for (text, reason), result in zip(answers.items(), results, strict=True):
        assert result.reason.startswith(reason) or (reason == "error" and not result.passed), (
            text,
            result,
        )


def test_the_code_is_found_in_an_answer():
    code = "def f(xs):\n    return xs"
    fenced = [f"Sure!\n```python\n{code}\n```\nDone.", f"```\n{code}\n```", f"```python\n{code}"]
    for text in (code, f"\n{code}\n", *fenced):
        assert TASK.extract(None, text) == code


def test_bad_input():
    with pytest.raises(UserError, match="did you mean microcode"):
        get_task("mikrocode")
    with pytest.raises(UserError, match="leave f.jsonl out"):
        TASK.problems("f.jsonl", None)
    assert get_task("microcode") is TASK
    hash(TASK)  # frozen through and through


def test_more_problems_than_there_are(monkeypatch):
    with pytest.raises(UserError, match="microcode has at most 1000000 problems, not 10000000"):
        TASK.problems(None, 10**7)
    (only,) = language.problems("test", 1)
    monkeypatch.setattr(language, "make_problem", lambda *_: only)
    with pytest.raises(UserError, match="microcode has no 3 different problems, but about 1"):
        language.problems("test", 3)
