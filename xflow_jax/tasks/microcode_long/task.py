"""The Task of microcode-long: its protocol, problem sets, checks and training pairs."""

from __future__ import annotations

import random
import re

from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.generated import problem_reader
from xflow_jax.tasks.microcode.task import POLICY_SEED, call_checks
from xflow_jax.tasks.microcode.words import split_words
from xflow_jax.tasks.microcode_long.language import NAME, Problem
from xflow_jax.tasks.microcode_long.parsing import parse, respell
from xflow_jax.tasks.microcode_long.requests import draw_problem, problems
from xflow_jax.tasks.microcode_long.solutions import (
    LEAST_WORDS,
    USUAL_STYLE,
    WIDE_STYLE,
    sample_answer,
)

CONFIG = TaskConfig(gen_length=128, block_length=16)
# Of a held-out composition.
EXAMPLE = (
    "Write a function f to multiply a number by 4, and to return the number for odd numbers, and a "
    "function solve to make n the smallest, then keep the numbers greater than n, then decrease "
    "each by 3, then take f of each number and finally return the list."
)
HELD_OUT_PROBLEMS = 512
TRAINING_PROBLEMS = 2048


def checks(problem: Problem, code: str) -> list[str]:
    """Returns the programs that judge `code`, one for each test.

    Args:
        problem: the problem, with inputs and right results of both functions.
        code: the code in a model's answer.
    """
    missing = [
        name for name in ("f", "solve") if not re.search(rf"^def {name}\(", code, re.MULTILINE)
    ]
    if missing:
        return [f"raise AssertionError('the answer defines no function {missing[0]}')"]
    calls = [call_checks("f", problem.call_cases())]
    return calls + [call_checks("solve", [case]) for case in problem.cases()]


def training_pair(seed: int, index: int, early: bool = False) -> tuple[str, str]:
    """Returns (request, right answer) at an index of an endless training set.

    Args:
        seed: number of the training set.
        index: position in it, from 0.
        early: True for an answer of the wide style.
    """
    rng = random.Random(f"{NAME} pair {seed} {index}")
    while True:
        problem = draw_problem(rng, held_out=False)
        if problem is not None:
            answer = sample_answer(rng, problem, WIDE_STYLE if early else USUAL_STYLE)
            if len(split_words(answer)) < LEAST_WORDS:  # the usual style has no longer one
                answer = sample_answer(rng, problem)
            return problem.prompt, answer


def make_task(config: TaskConfig) -> Task[Problem]:
    """Builds the task with a protocol."""
    return Task(
        name=NAME,
        problems=problem_reader(NAME, problems, "test", HELD_OUT_PROBLEMS, 0),
        task_id=lambda problem: problem.task_id,
        prompt=lambda problem: config.prompt.format(prompt=problem.prompt),
        extract=lambda problem, text: extract_code(config, text),
        program=lambda problem, code: (code, "".join(checks(problem, code))),
        canonical=lambda problem: sample_answer(random.Random(problem.task_id), problem),
        config=config,
        parts=lambda problem, code: [(code, check) for check in checks(problem, code)],
        training=problem_reader(NAME, problems, "train", TRAINING_PROBLEMS, POLICY_SEED),
        respell=respell,
        example=EXAMPLE,
        parse=parse,
        case=lambda problem: next(iter(problem.cases()), None),
        generate=problems,
        training_pair=training_pair,
    )


TASK = make_task(CONFIG)
