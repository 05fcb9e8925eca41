"""Right answers to microcode's requests, in the many ways that people write them: the data that training is made of."""

from __future__ import annotations

import dataclasses
import random
import re

from xflow_jax.tasks.microcode.language import OPERATIONS, REDUCTIONS, Problem


@dataclasses.dataclass(frozen=True)
class Habits:
    """How varied answers are: what is drawn from, with repeats for what is usual, and chances between 0 and 1.

    names, lists, elements: of the function, its argument and a loop's variable. styles: of requests without list
    operations. other_form: an expression is written in another than its usual form. new_name: steps name their list
    `out`. total: a loop adds up instead of collecting. builtin: map and filter. inline: no name for the last step.
    """

    names: tuple[str, ...] = ("solve", "solve", "f")
    lists: tuple[str, ...] = ("xs", "xs", "nums")
    elements: tuple[str, ...] = ("x", "x", "n")
    styles: tuple[str, ...] = ("steps", "steps", "steps", "steps", "fused", "loop")
    other_form: float = 0.05
    new_name: float = 0.1
    total: float = 0.2
    builtin: float = 0.1
    inline: float = 0.25


USUAL = Habits()


WIDE = Habits(
    names=("solve", "f"),
    lists=("xs", "nums", "values"),
    elements=("x", "n"),
    styles=("steps", "steps", "fused", "loop"),
    other_form=0.2,
    new_name=0.4,
    total=0.7,
    builtin=0.2,
    inline=0.5,
)


def _form(rng: random.Random, code: tuple[str, ...], habits: Habits) -> str:
    return (
        code[0] if len(code) == 1 or rng.random() < 1 - habits.other_form else rng.choice(code[1:])
    )


def _wrap(expression: str) -> str:
    return expression if re.fullmatch(r"\w+|abs\(.*\)", expression) else f"({expression})"


def _element(rng: random.Random, operation: tuple[str, int], v: str, habits: Habits) -> str:
    kind, c = operation
    return _form(rng, OPERATIONS[kind].code, habits).replace("{v}", _wrap(v)).replace("{c}", str(c))


def _over(
    rng: random.Random, operation: tuple[str, int], xs: str, v: str, builtin: bool, habits: Habits
) -> str:
    kind, c = operation
    shape = OPERATIONS[kind].shape
    if shape == "list":
        return _form(rng, OPERATIONS[kind].code, habits).replace("{xs}", xs).replace("{c}", str(c))
    element = _element(rng, operation, v, habits)
    if builtin:
        return f"list({shape}(lambda {v}: {element}, {xs}))"
    return (
        f"[{element} for {v} in {xs}]" if shape == "map" else f"[{v} for {v} in {xs} if {element}]"
    )


def _fused(
    rng: random.Random, operations: tuple[tuple[str, int], ...], xs: str, v: str, habits: Habits
) -> str:
    value, tests = v, []
    for operation in operations:
        if OPERATIONS[operation[0]].shape == "map":
            value = _element(rng, operation, value, habits)
        else:
            tests.append(_element(rng, operation, value, habits))
    return f"[{value} for {v} in {xs}{' if ' if tests else ''}{' and '.join(tests)}]"


def _loop(rng: random.Random, problem: Problem, xs: str, v: str, habits: Habits) -> list[str]:
    total = problem.reduction in ("sum", "count") and rng.random() < habits.total
    out = ("total" if problem.reduction == "sum" else "count") if total else "out"
    lines = [f"{out} = {0 if total else '[]'}", f"for {v} in {xs}:"]
    value, indent = v, "    "
    for i, operation in enumerate(problem.operations):
        if OPERATIONS[operation[0]].shape == "filter":
            lines.append(f"{indent}if {_element(rng, operation, value, habits)}:")
            indent += "    "
        elif i + 1 < len(problem.operations):
            lines.append(f"{indent}{v} = {_element(rng, operation, value, habits)}")
        else:
            value = _element(rng, operation, value, habits)
    if not total:
        lines.append(f"{indent}{out}.append({value})")
    else:
        lines.append(f"{indent}{out} += {value if problem.reduction == 'sum' else 1}")
    return [
        *lines,
        f"return {out if total else REDUCTIONS[problem.reduction][1][0].replace('{xs}', out)}",
    ]


def _generator(reduction: str, expression: str) -> str:
    code = REDUCTIONS[reduction][1][0]
    if expression.startswith("[") and reduction in ("sum", "largest", "smallest"):
        expression = expression[1:-1]
    return code.replace("{xs}", expression)


def answer(rng: random.Random, problem: Problem, habits: Habits = USUAL) -> str:
    """One right answer out of the many, without a trailing newline."""
    name, xs, v = rng.choice(habits.names), rng.choice(habits.lists), rng.choice(habits.elements)
    elementwise = all(OPERATIONS[kind].shape != "list" for kind, _ in problem.operations)
    style = rng.choice(habits.styles if elementwise else ("steps",))
    # A list is not consumed twice: where the reduction names it twice, it needs a name.
    inline = problem.reduction != "spread" and rng.random() < habits.inline
    if style == "loop":
        lines = _loop(rng, problem, xs, v, habits)
    else:
        lines, current = [], xs
        builtin = style == "steps" and rng.random() < habits.builtin
        target = xs if rng.random() < 1 - habits.new_name else "out"
        groups = [problem.operations] if style == "fused" else [(op,) for op in problem.operations]
        for i, group in enumerate(groups):
            if style == "fused":
                expression = _fused(rng, group, current, v, habits)
            else:
                expression = _over(rng, group[0], current, v, builtin, habits)
            if inline and i + 1 == len(groups):
                current = expression
            else:
                lines.append(f"{target} = {expression}")
                current = target
        lines.append(f"return {_generator(problem.reduction, current)}")
    return f"def {name}({xs}):\n" + "\n".join("    " + line for line in lines)
