"""MBPP (Austin et al., arXiv:2108.07732), three-shot on its 500 test problems.

The protocol is that of LLaDA's authors (OpenCompass): worked examples as turns of a chat, each
answer in quotes between [BEGIN] and [DONE]. The examples are problems 2, 3 and 4 of the data, as in
its paper. The test problems are 11 to 510. The code runs before the set-up code and the tests,
since the set-up of two problems uses a class that the solution defines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits
from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.datasets import read_problems

HUB = ("google-research-datasets/mbpp", "full", ("prompt", "test", "train"))
# Ranges of task_id.
SHOTS = (2, 3, 4)
TESTS = range(11, 511)
TRAINING = range(601, 975)

CONFIG = TaskConfig(
    gen_length=256,
    shots=len(SHOTS),
    prompt="You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n {tests}  \n",
    extraction="[BEGIN]",
    stop=("[DONE]",),
    rule_options=(("confidence_eos_eot_inf", True),),
    limits=Limits(seconds=20.0),  # one reference solution takes five on a free core
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Problem of MBPP, a line of the public jsonl, with worked examples."""

    task_id: int
    text: str
    code: str
    test_list: tuple[str, ...]
    test_setup_code: str
    shots: tuple[Problem, ...] = ()


def problems(data: Path | None, limit: int | None, wanted: range = TESTS) -> list[Problem]:
    """Reads problems, each with the worked examples.

    Args:
        data: the public jsonl. None reads the hub's data set.
        limit: number of problems. None reads all.
        wanted: task_id of the problems.

    Raises:
        UserError: the data has no such problems, lacks a worked example, or cannot be read.
    """
    keys = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
    rows = read_problems(data, keys, "mbpp", HUB)
    by_id = {
        row["task_id"]: Problem(
            **{**{k: row[k] for k in keys}, "test_list": tuple(row["test_list"])}
        )
        for row in rows
    }
    source = HUB[0] if data is None else data
    if missing := [i for i in SHOTS if i not in by_id]:
        raise UserError(
            f"{source} has no problem {missing[0]}, "
            f"one of the worked examples {', '.join(map(str, SHOTS))}"
        )
    found = [by_id[i] for i in wanted if i in by_id]
    if not found:
        raise UserError(f"{source} has none of the problems {wanted[0]} to {wanted[-1]}")
    shots = tuple(by_id[i] for i in SHOTS)
    return [dataclasses.replace(problem, shots=shots) for problem in found[:limit]]


def question(problem: Problem) -> str:
    """Returns the user's message for one problem."""
    return CONFIG.prompt.format(text=problem.text, tests="\n".join(problem.test_list))


def checks(problem: Problem, tests: Sequence[str]) -> str:
    """Returns the program that judges a solution after it ran."""
    return "\n".join((problem.test_setup_code, *tests, ""))


def canonical(problem: Problem) -> str:
    """Returns the reference solution in the form of the worked examples."""
    return f"[BEGIN]\n '{problem.code}' \n[DONE] \n\n "


def prompt(problem: Problem) -> list[dict[str, str]]:
    """Returns chat messages: the worked examples in turns, then the question."""
    turns = [
        turn
        for shot in problem.shots
        for turn in (("user", question(shot)), ("assistant", canonical(shot)))
    ]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", question(problem))]]


TASK: Task[Problem] = Task(
    name="mbpp",
    problems=problems,
    task_id=lambda problem: f"MBPP/{problem.task_id}",
    prompt=prompt,
    extract=lambda problem, text: extract_code(CONFIG, text),
    program=lambda problem, code: (code, checks(problem, problem.test_list)),
    canonical=canonical,
    config=CONFIG,
    parts=lambda problem, code: [(code, checks(problem, [test])) for test in problem.test_list],
    training=lambda data, limit: problems(data, limit, TRAINING),
)
