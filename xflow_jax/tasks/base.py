"""Tasks as data: Task, TaskConfig, code extraction and get_task.

A task is one frozen `Task` named TASK, in a module or package of this package.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits

ProblemT = TypeVar("ProblemT")

NAMES = ("microcode", "humaneval", "mbpp")  # each has a module here


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Evaluation protocol of a task, printed with every result.

    Attributes:
        gen_length: N, response positions. The full budget is as many steps.
        block_length: positions of a block. None takes the model family's own.
        shots: worked examples in the prompt.
        prompt: template of one problem, with the names of its parts in braces.
        extraction: key of EXTRACTIONS, the function that finds the code in an answer.
        stop: an answer ends before the first of these texts.
        rule_options: (name, value) pairs for every rule that has the option, for example the
            treatment of EOS. Options that the user gives take precedence.
        limits: limits of the sandbox.
    """

    gen_length: int
    block_length: int | None = None
    shots: int = 0
    prompt: str = "{prompt}"
    extraction: str = "first fence"
    stop: tuple[str, ...] = ()
    rule_options: tuple[tuple[str, object], ...] = ()
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Task(Generic[ProblemT]):
    """Evaluation task, as functions of its own type of problem.

    Attributes:
        name: name on the command line.
        problems: (data, limit) -> the first `limit` problems (None: the usual number) of the file
            `data` (None: the task's own source). Raises UserError.
        task_id: problem -> identifier, unique in the task.
        prompt: problem -> the text of one user, or chat messages.
        extract: (problem, text) -> the code in the answer `text` of a model.
        program: (problem, code) -> (program, checks) for the sandbox.
        canonical: problem -> a right answer, in the form that a model would write.
        config: evaluation protocol.
        parts: (problem, code) -> one (program, checks) pair for each test of the problem.
        training: (data, limit) -> problems to train on, none of which `problems` returns.
    """

    name: str
    problems: Callable[[Path | None, int | None], Sequence[ProblemT]]
    task_id: Callable[[ProblemT], str]
    prompt: Callable[[ProblemT], str | Sequence[dict[str, str]]]
    extract: Callable[[ProblemT, str], str]
    program: Callable[[ProblemT, str], tuple[str, str]]
    canonical: Callable[[ProblemT], str]
    config: TaskConfig
    parts: Callable[[ProblemT, str], list[tuple[str, str]]]
    training: Callable[[Path | None, int | None], Sequence[ProblemT]]

    def job(self, problem: ProblemT, text: str) -> tuple[str, str]:
        """Returns the (program, checks) pair that judges a model's answer `text`."""
        return self.program(problem, self.extract(problem, text))


def _first_fence(text: str) -> str:
    fence = re.search(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fence.group(1) if fence else text).strip("\n")


def _after_begin(text: str) -> str:
    code = text.partition("[BEGIN]")[2] if "[BEGIN]" in text else text
    if "```" in code:
        return _first_fence(code)
    code = code.strip()
    return code[1:].removesuffix("'") if code.startswith("'") else code


EXTRACTIONS: dict[str, Callable[[str], str]] = {
    # The inside of the first fence. Without a fence, the whole text.
    "first fence": _first_fence,
    # The text after [BEGIN] without the quotes around it, or the inside of its first fence.
    "[BEGIN]": _after_begin,
}


def extract_code(config: TaskConfig, text: str) -> str:
    """Returns the code in a model's answer.

    Args:
        config: the protocol, of which `stop` and `extraction` count.
        text: the answer.
    """
    ends = [text.find(stop) for stop in config.stop if stop in text]
    return EXTRACTIONS[config.extraction](text[: min(ends, default=None)])


def get_task(name: str) -> Task:
    """Returns the task of a name.

    Raises:
        UserError: there is no such task. The sentence has the nearest name.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise UserError(f"there is no task {name!r}: {hint}")
    return importlib.import_module(f"xflow_jax.tasks.{name}").TASK
