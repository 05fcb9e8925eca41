"""Tasks: what a model is asked, how its answer becomes a program, and how that program is judged, all as data.

A task is one frozen `Task` named TASK in its own module here; `get_task` finds it by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits

NAMES = ("microcode", "humaneval", "mbpp")  # each has a module here


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The protocol of a task, printed with every result.

    gen_length N: response positions; the full budget is as many steps. block_length: None = the model family's own.
    shots: worked examples in the prompt. prompt: of one problem, with the names of its parts in braces. extraction: of
    the code from an answer, one of EXTRACTIONS. stop: the first of these texts ends an answer. rule_options: options
    that every rule which has them gets, unless the user says otherwise (the treatment of EOS, for example). limits: of
    the sandbox.
    """

    gen_length: int
    block_length: int | None = None
    shots: int = 0
    prompt: str = "{prompt}"
    extraction: str = "first fence"
    stop: tuple[str, ...] = ()
    rule_options: tuple[tuple[str, Any], ...] = ()
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, as functions of its own kind of problem.

    problems(data, limit): the first `limit` problems (None = the usual number) from the file `data` (None = the task's
    own); raises UserError. task_id(problem): unique in the task. prompt(problem): one user's text, or chat messages.
    extract(problem, text): the code in a model's answer. program(problem, code): (program, checks) for the sandbox.
    canonical(problem): a right answer, in the text that a model would write. parts(problem, code): as program, a pair
    for each of the problem's tests. training(data, limit): problems to train on, none of which `problems` has.
    """

    name: str
    problems: Callable[[Path | None, int | None], Sequence[Any]]
    task_id: Callable[[Any], str]
    prompt: Callable[[Any], str | Sequence[dict[str, str]]]
    extract: Callable[[Any, str], str]
    program: Callable[[Any, str], tuple[str, str]]
    canonical: Callable[[Any], str]
    config: TaskConfig
    parts: Callable[[Any, str], list[tuple[str, str]]]
    training: Callable[[Path | None, int | None], Sequence[Any]]

    def job(self, problem: Any, text: str) -> tuple[str, str]:
        """What the sandbox runs to judge a model's answer `text`."""
        return self.program(problem, self.extract(problem, text))


def _fence(text: str) -> str:
    fence = re.search(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fence.group(1) if fence else text).strip("\n")


def _begin(text: str) -> str:
    code = text.partition("[BEGIN]")[2] if "[BEGIN]" in text else text
    if "```" in code:
        return _fence(code)
    code = code.strip()
    return code[1:].removesuffix("'") if code.startswith("'") else code


EXTRACTIONS: dict[str, Callable[[str], str]] = {
    "first fence": _fence,  # the inside of the first fence where there is one, else all of the text
    "[BEGIN]": _begin,  # what follows [BEGIN], without the quotes around it; of that the first fence where there is one
}


def extract_code(config: TaskConfig, text: str) -> str:
    """The code in a model's answer, by the task's protocol."""
    ends = [text.find(stop) for stop in config.stop if stop in text]
    return EXTRACTIONS[config.extraction](text[: min(ends, default=None)])


def get_task(name: str) -> Task:
    """The task of that name; UserError with the nearest name where there is none."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        help_ = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise UserError(f"there is no task {name!r}; {help_}")
    return importlib.import_module(f"xflow_jax.tasks.{name}").TASK
