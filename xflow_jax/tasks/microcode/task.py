"""The Task of microcode: its protocol, problem sets, code extraction and checks."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.generated import problem_reader
from xflow_jax.tasks.microcode.language import NAME, Problem, parse, problems, respell
from xflow_jax.tasks.microcode.solutions import USUAL_STYLE, WIDE_STYLE, sample_answer
from xflow_jax.tasks.microcode.training_pairs import training_pair

CONFIG = TaskConfig(gen_length=48, block_length=16)
# Of a held-out composition. Every rule answers it rightly, from the full budget to a quarter.
EXAMPLE = "Square them, then drop the even numbers and return the largest."
HELD_OUT_PROBLEMS = 512
TRAINING_PROBLEMS = 2048
# Seed of the training requests for policies. Rules are tuned on those of seed 0, and alignment uses
# others.
POLICY_SEED = 101


def extract(text: str) -> str:
    """Returns the inside of an answer's first fence, or the whole answer."""
    return extract_code(CONFIG, text)


def checks(problem: Problem, code: str, cases: slice = slice(None)) -> str:
    """Returns the program that judges `code` after it ran.

    It calls the first function of the code on the problem's cases.

    Args:
        problem: the problem, whose cases have inputs and right results.
        code: the code in a model's answer.
        cases: the cases to use, all by default.
    """
    function = re.search(r"^def (\w+)\(", code, re.MULTILINE)
    if not function:
        return "raise AssertionError('the answer defines no function')"
    return call_checks(function.group(1), problem.cases()[cases])


def call_checks(function: str, cases: Sequence[tuple[object, object]]) -> str:
    """Returns checks of a function's results.

    Args:
        function: name of the function.
        cases: (argument, right result) pairs. The function receives a copy of a list.
    """
    return (
        f"for _args, _want in {list(cases)!r}:\n"
        f"    _got = {function}(list(_args) if isinstance(_args, list) else _args)\n"
        "    assert type(_got) is type(_want) and _got == _want, "
        "f'for {_args} got {_got!r}, not {_want!r}'\n"
    )


def _parts(problem: Problem, code: str) -> list[tuple[str, str]]:
    return [(code, checks(problem, code, slice(i, i + 1))) for i in range(len(problem.cases()))]


def _canonical(problem: Problem) -> str:
    return sample_answer(random.Random(problem.task_id), problem)


def _training_pair(seed: int, index: int, early: bool) -> tuple[str, str]:
    return training_pair(seed, index, WIDE_STYLE if early else USUAL_STYLE)


def make_task(config: TaskConfig) -> Task[Problem]:
    """Builds the task with a protocol."""
    return Task(
        name=NAME,
        problems=problem_reader(NAME, problems, "test", HELD_OUT_PROBLEMS, 0),
        task_id=lambda problem: problem.task_id,
        prompt=lambda problem: config.prompt.format(prompt=problem.prompt),
        extract=lambda problem, text: extract_code(config, text),
        program=lambda problem, code: (code, checks(problem, code)),
        canonical=_canonical,
        config=config,
        parts=_parts,
        training=problem_reader(NAME, problems, "train", TRAINING_PROBLEMS, POLICY_SEED),
        respell=respell,
        example=EXAMPLE,
        parse=parse,
        case=lambda problem: next(iter(problem.cases()), None),
        generate=problems,
        training_pair=_training_pair,
    )


TASK = make_task(CONFIG)
