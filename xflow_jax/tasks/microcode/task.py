"""microcode as a task: its language and its answers in one place, and the judge that runs what a model wrote."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from xflow_jax.errors import UserError
from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.microcode.language import NAME, Problem, problems
from xflow_jax.tasks.microcode.solutions import answer

HELD_OUT_PROBLEMS = 512


SETTINGS = TaskConfig(gen_length=48, block_length=16)


TRAINING_PROBLEMS = 2048


POLICY_SEED = 101  # of the training requests for policies: rules are tuned on those of seed 0, alignment uses others


def extract(text: str) -> str:
    """The code in a model's answer: the inside of its first fence where there is one, else all of it."""
    return extract_code(SETTINGS, text)


def checks(problem: Problem, code: str, cases: slice = slice(None)) -> str:
    """The program that judges `code` after it ran: calls its first function on every case, or on those of a slice."""
    function = re.search(r"^def (\w+)\(", code, re.MULTILINE)
    if not function:
        return "raise AssertionError('the answer defines no function')"
    return (
        f"for _args, _want in {problem.cases()[cases]!r}:\n"
        f"    _got = {function.group(1)}(list(_args))\n"
        f"    assert type(_got) is type(_want) and _got == _want, f'for {{_args}} got {{_got!r}}, not {{_want!r}}'\n"
    )


def _split(name: str, count: int, seed: int) -> Callable[[Path | None, int | None], list[Problem]]:
    def read(data: Path | None, limit: int | None) -> list[Problem]:
        if data is not None:
            raise UserError(
                f"microcode makes its own problems and reads no data file, so leave {data} out"
            )
        return problems(name, count if limit is None else limit, seed)

    return read


def _parts(problem: Problem, code: str) -> list[tuple[str, str]]:
    return [(code, checks(problem, code, slice(i, i + 1))) for i in range(len(problem.cases()))]


def _canonical(problem: Problem) -> str:
    return answer(random.Random(problem.task_id), problem)


TASK = Task(
    name=NAME,
    problems=_split("test", HELD_OUT_PROBLEMS, 0),
    task_id=lambda problem: problem.task_id,
    prompt=lambda problem: problem.prompt,
    extract=lambda problem, text: extract(text),
    program=lambda problem, code: (code, checks(problem, code)),
    canonical=_canonical,
    config=SETTINGS,
    parts=_parts,
    training=_split("train", TRAINING_PROBLEMS, POLICY_SEED),
)
