"""HumanEval (Chen et al., arXiv:2107.03374), zero-shot.

The protocol is that of LLaDA's authors (OpenCompass). The prompt is "Complete the following python
code:" and the problem. The first fenced block of the answer is the code. It runs below the
problem's own text, so an answer may repeat the whole function or give its body alone.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits
from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.datasets import read_problems

HUB = ("openai/openai_humaneval", None, ("test",))

CONFIG = TaskConfig(
    gen_length=512,
    prompt="Complete the following python code:\n{prompt}",
    extraction="first fence",
    rule_options=(("logits_eos_inf", True),),
    limits=Limits(seconds=10.0),  # one reference solution takes seconds
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Problem of HumanEval, a line of the public jsonl."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def problems(data: Path | None, limit: int | None) -> list[Problem]:
    """Reads the first `limit` problems of a file or the hub."""
    keys = [field.name for field in dataclasses.fields(Problem)]
    rows = read_problems(data, dict.fromkeys(keys, str), "humaneval", HUB)
    return [Problem(**{key: row[key] for key in keys}) for row in rows[:limit]]


def program(problem: Problem, code: str) -> tuple[str, str]:
    """Builds (program, checks) for the sandbox.

    The program is the problem's text with the answer below it. The checks are the problem's tests,
    called on its function.
    """
    if not re.search(rf"^(async )?def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        code = _indent_body(code)
    checks = f"{problem.test}\n\ncheck({problem.entry_point})\n"
    return f"{problem.prompt}\n{code}\n", checks


def _indent_body(code: str) -> str:
    """Indents a body, since answers may lack some of the indentation."""
    if code[:1].isspace():
        return code
    try:
        ast.parse(code)
    except SyntaxError:
        return "    " + code
    return textwrap.indent(code, "    ")


def no_training(data: Path | None, limit: int | None) -> list[Problem]:
    """Raises UserError, since all problems of HumanEval are for testing."""
    raise UserError("humaneval has no problems to train on: use those of mbpp")


def canonical(problem: Problem) -> str:
    """Returns the reference solution as a model's answer, in a fence."""
    solution = problem.prompt + problem.canonical_solution.rstrip("\n")
    return (
        f"Here is the completed function:\n\n```python\n{solution}\n```\n\n"
        "It does what its description says."
    )


TASK: Task[Problem] = Task(
    name="humaneval",
    problems=problems,
    task_id=lambda problem: problem.task_id,
    prompt=lambda problem: CONFIG.prompt.format(prompt=problem.prompt),
    extract=lambda problem, text: extract_code(CONFIG, text),
    program=program,
    canonical=canonical,
    config=CONFIG,
    parts=lambda problem, code: [program(problem, code)],  # its tests are one function
    training=no_training,
)
