"""Generator of right answers to microcode's requests, in varied styles."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import TypeAlias

from xflow_jax.tasks.microcode.language import OPERATIONS, REDUCTIONS, Operation, Problem

# An operation with its constant, or with the name of a variable in the place of the constant.
BoundOperation: TypeAlias = tuple[Operation, int | str]


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
    is_atom = re.fullmatch(r"\w+|\w+\(\w+\)|abs\(.*\)", expression)
    return expression if is_atom else f"({expression})"


def element_expression(
    rng: random.Random, operation: BoundOperation, v: str, style: AnswerStyle
) -> str:
    """Draws the expression of a filter's test, or of a map's value.

    Args:
        rng: source of the draws.
        operation: the filter or map.
        v: expression of the element.
        style: distribution of the style.
    """
    how, c = operation
    return (
        _choose_form(rng, how.code, style).replace("{v}", _parenthesize(v)).replace("{c}", str(c))
    )


def step_expression(
    rng: random.Random,
    operation: BoundOperation,
    xs: str,
    v: str,
    builtin: bool,
    style: AnswerStyle,
) -> str:
    """Draws the expression of one operation on a list.

    Args:
        rng: source of the draws.
        operation: the operation.
        xs: expression of the list.
        v: name of an element.
        builtin: True for `map` and `filter` instead of comprehensions.
        style: distribution of the style.
    """
    how, c = operation
    if how.shape == "list":
        return _choose_form(rng, how.code, style).replace("{xs}", xs).replace("{c}", str(c))
    element = element_expression(rng, operation, v, style)
    if builtin:
        return f"list({how.shape}(lambda {v}: {element}, {xs}))"
    return (
        f"[{element} for {v} in {xs}]"
        if how.shape == "map"
        else f"[{v} for {v} in {xs} if {element}]"
    )


def fused_expression(
    rng: random.Random, operations: Sequence[BoundOperation], xs: str, v: str, style: AnswerStyle
) -> str:
    """Draws a comprehension of filters and maps, like `step_expression`."""
    value, tests = v, []
    for operation in operations:
        if operation[0].shape == "map":
            value = element_expression(rng, operation, value, style)
        else:
            tests.append(element_expression(rng, operation, value, style))
    return f"[{value} for {v} in {xs}{' if ' if tests else ''}{' and '.join(tests)}]"


def loop_lines(
    rng: random.Random,
    operations: Sequence[BoundOperation],
    names: tuple[str, str, str],
    reduction: str,
    style: AnswerStyle,
) -> list[str]:
    """Draws a loop over a list.

    Args:
        rng: source of the draws.
        operations: filters and maps.
        names: names of the list, of an element and of the result.
        reduction: "sum" or "count" for a result that adds up, else the result is a list.
        style: distribution of the style.
    """
    xs, v, out = names
    total = reduction in ("sum", "count")
    lines = [f"{out} = {0 if total else '[]'}", f"for {v} in {xs}:"]
    value, indent = v, "    "
    for i, operation in enumerate(operations):
        if operation[0].shape == "filter":
            lines.append(f"{indent}if {element_expression(rng, operation, value, style)}:")
            indent += "    "
        elif i + 1 < len(operations):
            lines.append(f"{indent}{v} = {element_expression(rng, operation, value, style)}")
        else:
            value = element_expression(rng, operation, value, style)
    if not total:
        lines.append(f"{indent}{out}.append({value})")
    else:
        lines.append(f"{indent}{out} += {value if reduction == 'sum' else 1}")
    return lines


def reduce_expression(reduction: str, expression: str) -> str:
    """Returns the expression of a reduction of the list `expression`."""
    code = REDUCTIONS[reduction].code
    if expression.startswith("[") and reduction in ("sum", "largest", "smallest"):
        expression = expression[1:-1]
    return code.replace("{xs}", expression)


def _loop(
    rng: random.Random,
    operations: Sequence[BoundOperation],
    reduction: str,
    xs: str,
    v: str,
    style: AnswerStyle,
) -> list[str]:
    """Draws the body of an answer with the layout "loop"."""
    total = reduction in ("sum", "count") and rng.random() < style.total
    out = ("total" if reduction == "sum" else "count") if total else "out"
    lines = loop_lines(rng, operations, (xs, v, out), reduction if total else "list", style)
    return [*lines, f"return {out if total else REDUCTIONS[reduction].code.replace('{xs}', out)}"]


def sample_answer(rng: random.Random, problem: Problem, style: AnswerStyle = USUAL_STYLE) -> str:
    """Draws a right answer, Python code without a trailing newline."""
    name = rng.choice(style.function_names)
    xs = rng.choice(style.list_names)
    v = rng.choice(style.element_names)
    operations = [(OPERATIONS[kind], c) for kind, c in problem.operations]
    elementwise = all(how.shape != "list" for how, _ in operations)
    layout = rng.choice(style.layouts if elementwise else ("steps",))
    # "spread" uses its list twice, so the list needs a name.
    inline = problem.reduction != "spread" and rng.random() < style.inline
    if layout == "loop":
        lines = _loop(rng, operations, problem.reduction, xs, v, style)
    else:
        lines, current = [], xs
        builtin = layout == "steps" and rng.random() < style.builtin
        target = xs if rng.random() < 1 - style.new_name else "out"
        groups = [operations] if layout == "fused" else [[op] for op in operations]
        for i, group in enumerate(groups):
            if layout == "fused":
                expression = fused_expression(rng, group, current, v, style)
            else:
                expression = step_expression(rng, group[0], current, v, builtin, style)
            if inline and i + 1 == len(groups):
                current = expression
            else:
                lines.append(f"{target} = {expression}")
                current = target
        lines.append(f"return {reduce_expression(problem.reduction, current)}")
    return f"def {name}({xs}):\n" + "\n".join("    " + line for line in lines)
