"""Tasks as data: Task, TaskConfig, extract_code and get_task.

A task is a module or package of this package with the function make_task(config) and with TASK, the
frozen `Task` of its default protocol.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from xflow_jax.errors import UserError, require
from xflow_jax.sandbox import Limits
from xflow_jax.tasks.extraction import EXTRACTIONS
from xflow_jax.toml_config import with_overrides

ProblemT = TypeVar("ProblemT")

# Each has a module here, with _ for -.
NAMES = ("microcode", "microcode-long", "latin-square", "humaneval", "mbpp")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Evaluation protocol of a task, printed and stored with every result.

    Attributes:
        gen_length: N, response positions. The full budget is as many steps.
        block_length: positions of a block. None takes the model family's own.
        shots: worked examples in the prompt.
        prompt: template of one problem, with the names of its parts in braces.
        extraction: key of EXTRACTIONS, the function that finds the code in an answer.
        stop: an answer ends before the first of these texts.
        after_eos: keep the text after the first EOS, without special tokens.
        rule_options: (name, value) pairs for every rule that has the option, for example the
            treatment of EOS. Options that the user gives take precedence.
        limits: limits of the sandbox.

    Raises:
        UserError: for a number out of range, or a template with other parts than `parts`.
    """

    gen_length: int
    block_length: int | None = None
    shots: int = 0
    prompt: str = "{prompt}"
    extraction: str = "first-fence"
    stop: tuple[str, ...] = ()
    after_eos: bool = False
    rule_options: tuple[tuple[str, object], ...] = ()
    limits: Limits = Limits()

    parts: ClassVar[tuple[str, ...]] = ("prompt",)  # names in the template of a problem
    most_shots: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(self.gen_length >= 1, f"gen_length must be at least 1, not {self.gen_length}")
        block = self.block_length
        require(block is None or block >= 1, f"block_length must be at least 1, not {block}")
        most = self.most_shots
        require(0 <= self.shots <= most, f"shots must be 0 to {most}, not {self.shots}")
        self.check_template("prompt", self.prompt)

    def end_ids(self, stop_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the ids that end an answer, none with after_eos."""
        return () if self.after_eos else stop_ids

    def check_template(self, name: str, template: str) -> None:
        """Raises UserError unless the template has only the parts of a problem."""
        try:
            template.format(**dict.fromkeys(self.parts, ""))
        except (KeyError, IndexError, ValueError, AttributeError):
            known = " and ".join(f"{{{part}}}" for part in self.parts)
            raise UserError(f"{name} must be a text with {known}, not {template!r}") from None


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
        respell: prompt -> the prompt as the task writes it, for a model that knows only this task.
            None if such a model cannot answer it.
        example: a request that the bundled model answers rightly.
        hint: (problem, text) -> a sentence on an answer that only another protocol accepts, or
            None.
        parse: prompt -> its problem, or None for a prompt that is none of the task.
        case: problem -> (input, a right output), or None for a problem without a right answer.
        generate: (split "train" or "test", count, seed) -> problems, or None if they come from a
            data file.
        training_pair: (seed, index, early) -> (prompt, right answer) at an index of an endless
            training set, or None if the task has none. `early` asks for the distribution of the
            beginning of a training.
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
    respell: Callable[[str], str | None] = lambda prompt: prompt
    example: str = ""
    hint: Callable[[ProblemT, str], str | None] = lambda problem, text: None
    parse: Callable[[str], ProblemT | None] = lambda prompt: None
    case: Callable[[ProblemT], tuple[object, object] | None] = lambda problem: None
    generate: Callable[[str, int, int], Sequence[ProblemT]] | None = None
    training_pair: Callable[[int, int, bool], tuple[str, str]] | None = None

    def job(self, problem: ProblemT, text: str) -> tuple[str, str]:
        """Returns the (program, checks) pair that judges a model's answer `text`."""
        return self.program(problem, self.extract(problem, text))


def extract_code(config: TaskConfig, text: str) -> str:
    """Returns the code in a model's answer.

    Args:
        config: the protocol, of which `stop` and `extraction` count.
        text: the answer.
    """
    ends = [text.find(stop) for stop in config.stop if stop in text]
    return EXTRACTIONS[config.extraction].extract(text[: min(ends, default=None)])


def find_problem(prompt: str) -> tuple[Task[Any], object] | None:
    """Returns (task, problem) of a prompt, or None for other prompts."""
    for task in map(get_task, NAMES):
        problem = task.parse(prompt)
        if problem is not None:
            return task, problem
    return None


def find_tasks(names: Sequence[str]) -> list[Task[Any]]:
    """Returns the tasks of names, or none if one is unknown."""
    return [get_task(name) for name in names] if set(names) <= set(NAMES) else []


def get_task(name: str, overrides: Sequence[str] = ()) -> Task:
    """Returns the task of a name.

    Args:
        name: one of NAMES.
        overrides: changes of its protocol, texts like "gen_length=256" or "limits.seconds=3".

    Raises:
        UserError: there is no such task (with the nearest name), or no such key or value.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise UserError(f"there is no task {name!r}: {hint}")
    module = importlib.import_module(f"xflow_jax.tasks.{name.replace('-', '_')}")
    if not overrides:
        return module.TASK
    config = module.TASK.config
    where = f"the protocol of {name}"
    return module.make_task(
        with_overrides(type(config), dataclasses.asdict(config), overrides, where)
    )
