"""MBPP (Austin et al., arXiv:2108.07732), three-shot on its 500 test problems.

The protocol is that of LLaDA's authors: the configuration mbpp_gen of the OpenCompass in their
repository (ML-GSAI/LLaDA). Worked examples are turns of a chat, each answer in quotes between
[BEGIN] and [DONE]. The examples are problems 2, 3 and 4 of the data. The test problems are 11 to
510. The time limit is longer than the 9 seconds of the original, which also leaves out the set-up
code that the tests of two problems need. Classes of the set-up code are there while the solution
runs. Its other statements run between the solution and the tests, since they use its classes.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits
from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.datasets import read_problems

HUB = ("google-research-datasets/mbpp", "full", ("prompt", "test", "train"))
# Ranges of task_id.
SHOTS = (2, 3, 4)
TESTS = range(11, 511)
TRAINING = range(601, 975)
_QUESTION = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n {tests}"
)


@dataclasses.dataclass(frozen=True)
class MbppConfig(TaskConfig):
    """Protocol of MBPP.

    Attributes:
        shot_prompt: template of a worked example, which has less space at its end than `prompt`.
        setup_code: run the set-up code of a problem. The original protocol does not, so problem
            367 has no right answer there.
    """

    gen_length: int = 256
    shots: int = len(SHOTS)
    prompt: str = _QUESTION + "  \n"
    extraction: Literal["llada-mbpp", "opencompass-mbpp", "begin-or-fence"] = "llada-mbpp"
    after_eos: bool = True
    rule_options: tuple[tuple[str, object], ...] = (("confidence_eos_eot_inf", True),)
    limits: Limits = Limits(seconds=20.0)  # one reference solution takes five on a free core
    shot_prompt: str = _QUESTION + " \n"
    setup_code: bool = True

    parts: ClassVar[tuple[str, ...]] = ("text", "tests")
    most_shots: ClassVar[int] = len(SHOTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_template("shot_prompt", self.shot_prompt)


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


def judged(
    problem: Problem, code: str, tests: Sequence[str], setup_code: bool = True
) -> tuple[str, str]:
    """Builds (program, checks) for the sandbox."""
    classes, setup = split_setup(problem.test_setup_code if setup_code else "")
    return classes + code, "\n".join((setup, *tests, ""))


def split_setup(setup: str) -> tuple[str, str]:
    """Returns the classes of set-up code, and its other statements."""
    try:
        statements = ast.parse(setup).body
    except (SyntaxError, ValueError):
        return "", setup
    classes = [s for s in statements if isinstance(s, ast.ClassDef)]
    if not classes:
        return "", setup
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    rest = [s for s in statements if s not in classes]
    texts = ["".join(f"{ast.unparse(s)}\n" for s in part) for part in (imports + classes, rest)]
    return texts[0], texts[1]


def canonical(problem: Problem) -> str:
    """Returns the reference solution in the form of the worked examples.

    The protocol of LLaDA's authors removes a quote at the end of the code. So a solution that ends
    in one gets another.
    """
    code = problem.code.rstrip()
    return _marked(code + "'" * code.endswith("'"))


def _marked(code: str) -> str:
    return f"[BEGIN]\n '{code}' \n[DONE] \n\n "


def _example(config: MbppConfig, shot: Problem) -> list[dict[str, str]]:
    """Returns the turns of a worked example, with the original spaces."""
    tests = [test.rstrip() + " " for test in shot.test_list]
    if shot.task_id == SHOTS[0]:
        tests[:1] = [test.rstrip() for test in tests[:1]]
    question = config.shot_prompt.format(text=shot.text, tests="\n".join(tests).removesuffix(" "))
    answer = _marked(shot.code.rstrip())
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def prompt(config: MbppConfig, problem: Problem) -> list[dict[str, str]]:
    """Returns chat messages: the worked examples in turns, then the question."""
    turns = [turn for shot in problem.shots[: config.shots] for turn in _example(config, shot)]
    question = config.prompt.format(text=problem.text, tests="\n".join(problem.test_list))
    return [*turns, {"role": "user", "content": question}]


def make_task(config: MbppConfig) -> Task[Problem]:
    """Builds the task with a protocol."""

    def judge(problem: Problem, code: str, tests: Sequence[str]) -> tuple[str, str]:
        return judged(problem, code, tests, config.setup_code)

    return Task(
        name="mbpp",
        problems=problems,
        task_id=lambda problem: f"MBPP/{problem.task_id}",
        prompt=lambda problem: prompt(config, problem),
        extract=lambda problem, text: extract_code(config, text),
        program=lambda problem, code: judge(problem, code, problem.test_list),
        canonical=canonical,
        config=config,
        parts=lambda problem, code: [judge(problem, code, [test]) for test in problem.test_list],
        training=lambda data, limit: problems(data, limit, TRAINING),
    )


CONFIG = MbppConfig()
TASK = make_task(CONFIG)
