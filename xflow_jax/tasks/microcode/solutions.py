"""Generator of right answers to microcode's requests, in varied styles."""

from __future__ import annotations

import dataclasses
import random
import re

from xflow_jax.tasks.microcode.language import OPERATIONS, REDUCTIONS, Problem


@dataclasses.dataclass(frozen=True)
class AnswerStyle:
    """Distribution of the style of answers.

    Names and layouts are drawn uniformly, and the more usual ones are repeated.

    Attributes:
        function_names: names of the function.
        list_names: names of its argument.
        element_names: names of a loop's variable.
        layouts: "steps" (one statement for each operation), "fused" (one comprehension) or "loop".
            Requests with an operation on whole lists always use "steps".
        other_form: chance that an expression has another form than its usual one, in [0, 1].
        new_name: chance that steps name their list `out`.
        total: chance that a loop adds up instead of collecting.
        builtin: chance of `map` and `filter` instead of comprehensions.
        inline: chance that the last step has no name.
    """

    function_names: tuple[str, ...] = ("solve", "solve", "f")
    list_names: tuple[str, ...] = ("xs", "xs", "nums")
    element_names: tuple[str, ...] = ("x", "x", "n")
    layouts: tuple[str, ...] = ("steps", "steps", "steps", "steps", "fused", "loop")
    other_form: float = 0.05
    new_name: float = 0.1
    total: float = 0.2
    builtin: float = 0.1
    inline: float = 0.25


USUAL_STYLE = AnswerStyle()
WIDE_STYLE = AnswerStyle(
    function_names=("solve", "f"),
    list_names=("xs", "nums", "values"),
    element_names=("x", "n"),
    layouts=("steps", "steps", "fused", "loop"),
    other_form=0.2,
    new_name=0.4,
    total=0.7,
    builtin=0.2,
    inline=0.5,
)


def _choose_form(rng: random.Random, code: tuple[str, ...], style: AnswerStyle) -> str:
    if len(code) == 1 or rng.random() < 1 - style.other_form:
        return code[0]
    return rng.choice(code[1:])


def _parenthesize(expression: str) -> str:
    return expression if re.fullmatch(r"\w+|abs\(.*\)", expression) else f"({expression})"


def _element(rng: random.Random, operation: tuple[str, int], v: str, style: AnswerStyle) -> str:
    kind, c = operation
    return (
        _choose_form(rng, OPERATIONS[kind].code, style)
        .replace("{v}", _parenthesize(v))
        .replace("{c}", str(c))
    )


def _step(
    rng: random.Random,
    operation: tuple[str, int],
    xs: str,
    v: str,
    builtin: bool,
    style: AnswerStyle,
) -> str:
    kind, c = operation
    shape = OPERATIONS[kind].shape
    if shape == "list":
        return (
            _choose_form(rng, OPERATIONS[kind].code, style)
            .replace("{xs}", xs)
            .replace("{c}", str(c))
        )
    element = _element(rng, operation, v, style)
    if builtin:
        return f"list({shape}(lambda {v}: {element}, {xs}))"
    return (
        f"[{element} for {v} in {xs}]" if shape == "map" else f"[{v} for {v} in {xs} if {element}]"
    )


def _fused(
    rng: random.Random, operations: tuple[tuple[str, int], ...], xs: str, v: str, style: AnswerStyle
) -> str:
    value, tests = v, []
    for operation in operations:
        if OPERATIONS[operation[0]].shape == "map":
            value = _element(rng, operation, value, style)
        else:
            tests.append(_element(rng, operation, value, style))
    return f"[{value} for {v} in {xs}{' if ' if tests else ''}{' and '.join(tests)}]"


def _loop(rng: random.Random, problem: Problem, xs: str, v: str, style: AnswerStyle) -> list[str]:
    total = problem.reduction in ("sum", "count") and rng.random() < style.total
    out = ("total" if problem.reduction == "sum" else "count") if total else "out"
    lines = [f"{out} = {0 if total else '[]'}", f"for {v} in {xs}:"]
    value, indent = v, "    "
    for i, operation in enumerate(problem.operations):
        if OPERATIONS[operation[0]].shape == "filter":
            lines.append(f"{indent}if {_element(rng, operation, value, style)}:")
            indent += "    "
        elif i + 1 < len(problem.operations):
            lines.append(f"{indent}{v} = {_element(rng, operation, value, style)}")
        else:
            value = _element(rng, operation, value, style)
    if not total:
        lines.append(f"{indent}{out}.append({value})")
    else:
        lines.append(f"{indent}{out} += {value if problem.reduction == 'sum' else 1}")
    return [
        *lines,
        f"return {out if total else REDUCTIONS[problem.reduction].code.replace('{xs}', out)}",
    ]


def _reduce(reduction: str, expression: str) -> str:
    code = REDUCTIONS[reduction].code
    if expression.startswith("[") and reduction in ("sum", "largest", "smallest"):
        expression = expression[1:-1]
    return code.replace("{xs}", expression)


def sample_answer(rng: random.Random, problem: Problem, style: AnswerStyle = USUAL_STYLE) -> str:
    """Draws a right answer, Python code without a trailing newline."""
    name = rng.choice(style.function_names)
    xs = rng.choice(style.list_names)
    v = rng.choice(style.element_names)
    elementwise = all(OPERATIONS[kind].shape != "list" for kind, _ in problem.operations)
    layout = rng.choice(style.layouts if elementwise else ("steps",))
    # "spread" uses its list twice, so the list needs a name.
    inline = problem.reduction != "spread" and rng.random() < style.inline
    if layout == "loop":
        lines = _loop(rng, problem, xs, v, style)
    else:
        lines, current = [], xs
        builtin = layout == "steps" and rng.random() < style.builtin
        target = xs if rng.random() < 1 - style.new_name else "out"
        groups = [problem.operations] if layout == "fused" else [(op,) for op in problem.operations]
        for i, group in enumerate(groups):
            if layout == "fused":
                expression = _fused(rng, group, current, v, style)
            else:
                expression = _step(rng, group[0], current, v, builtin, style)
            if inline and i + 1 == len(groups):
                current = expression
            else:
                lines.append(f"{target} = {expression}")
                current = target
        lines.append(f"return {_reduce(problem.reduction, current)}")
    return f"def {name}({xs}):\n" + "\n".join("    " + line for line in lines)
