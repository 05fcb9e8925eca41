"""microcode as a task: its language and its answers in one place, and the judge that runs what a model wrote."""

from __future__ import annotations

import random
import re
from pathlib import Path

from xflow_jax.strict import UserError
from xflow_jax.tasks import Settings, Task, extract_code
from xflow_jax.tasks.microcode_answers import USUAL, WIDE, Habits, answer, training_pair
from xflow_jax.tasks.microcode_language import NAME, Problem, compositions, make_problem, parse, problems

__all__ = [
    "TASK",
    "USUAL",
    "WIDE",
    "Habits",
    "Problem",
    "answer",
    "checks",
    "compositions",
    "extract",
    "make_problem",
    "parse",
    "problems",
    "training_pair",
]
HELD_OUT_PROBLEMS = 512
SETTINGS = Settings(gen_length=48, block_length=16)


def extract(text: str) -> str:
    """The code in a model's answer: the inside of its first fence where there is one, else all of it."""
    return extract_code(SETTINGS, text)


def checks(problem: Problem, code: str) -> str:
    """The program that judges `code` after it ran: calls its first function on every case."""
    function = re.search(r"^def (\w+)\(", code, re.MULTILINE)
    if not function:
        return "raise AssertionError('the answer defines no function')"
    return (
        f"for _args, _want in {problem.cases()!r}:\n"
        f"    _got = {function.group(1)}(list(_args))\n"
        f"    assert type(_got) is type(_want) and _got == _want, f'for {{_args}} got {{_got!r}}, not {{_want!r}}'\n"
    )


def _held_out(data: Path | None, limit: int | None) -> list[Problem]:
    if data is not None:
        raise UserError(f"microcode makes its own problems and reads no data file, so leave {data} out")
    return problems("test", HELD_OUT_PROBLEMS if limit is None else limit)


def _canonical(problem: Problem) -> str:
    return answer(random.Random(problem.task_id), problem)


TASK = Task(
    name=NAME,
    problems=_held_out,
    task_id=lambda problem: problem.task_id,
    prompt=lambda problem: problem.prompt,
    extract=lambda problem, text: extract(text),
    program=lambda problem, code: (code, checks(problem, code)),
    canonical=_canonical,
    settings=SETTINGS,
)
