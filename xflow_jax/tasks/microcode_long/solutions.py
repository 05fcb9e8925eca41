"""Generator of right answers to microcode-long's requests, in varied styles."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from xflow_jax.tasks.microcode.language import OPERATIONS, REDUCTIONS, Operation
from xflow_jax.tasks.microcode.solutions import (
    AnswerStyle,
    BoundOperation,
    element_expression,
    fused_expression,
    loop_lines,
    reduce_expression,
    step_expression,
)
from xflow_jax.tasks.microcode.words import split_words
from xflow_jax.tasks.microcode_long.language import CALL, VARIABLE, Problem

LEAST_WORDS, MOST_WORDS = 60, 127  # of an answer, and so of tokens
TRIES = 8  # draws of an answer until its length is in this range

CALL_OPERATION = Operation("map", ("",), ("f({v})",), lambda xs, c: xs)


@dataclasses.dataclass(frozen=True)
class LongStyle:
    """Distribution of the style of answers.

    Attributes:
        lists: names of the list of numbers.
        elements: names of an element.
        variables: names of a variable.
        loop: chance that neighbouring operations on elements are a loop.
        fuse: chance that neighbouring filters are one comprehension, with a map after them.
        solve_first: chance that the function solve comes before the function f.
        assign: chance that the first of two operations of f is a statement of its own.
        name_measure: chance that the measure of a condition has a name.
        total: chance that a loop adds up instead of collecting.
        inline: chance that the last step has no name.
        short: style of expressions.
    """

    lists: tuple[str, ...] = ("xs", "xs", "nums", "values")
    elements: tuple[str, ...] = ("x", "x", "n", "a")
    variables: tuple[str, ...] = ("n", "n", "a", "total")
    loop: float = 0.35
    fuse: float = 0.5
    solve_first: float = 0.25
    assign: float = 0.5
    name_measure: float = 0.3
    total: float = 0.6
    inline: float = 0.3
    short: AnswerStyle = AnswerStyle(builtin=0.0)


WIDE_STYLE = LongStyle()
# A statement for each operation in its order, so that an answer follows the words of its request.
USUAL_STYLE = LongStyle(
    lists=("xs",),
    elements=("x",),
    variables=("n",),
    loop=0.0,
    fuse=0.0,
    solve_first=0.0,
    assign=1.0,
    name_measure=0.0,
    inline=0.0,
    short=AnswerStyle(other_form=0.0, new_name=0.0, builtin=0.0),
)


def sample_answer(rng: random.Random, problem: Problem, style: LongStyle = WIDE_STYLE) -> str:
    """Draws a right answer, Python code without a trailing newline.

    Args:
        rng: source of the draws.
        problem: the problem.
        style: distribution of the style.

    Returns:
        An answer of LEAST_WORDS to MOST_WORDS tokens, or the nearest of TRIES to them.
    """
    drawn = []
    for _ in range(TRIES):
        functions = [_number_function(rng, problem, style), _list_function(rng, problem, style)]
        if rng.random() < style.solve_first:
            functions.reverse()
        text = "\n\n".join(functions)
        length = len(split_words(text))
        distance = max(LEAST_WORDS - length, 2 * (length - MOST_WORDS), 0)
        drawn.append((distance, text))
        if not distance:
            break
    return min(drawn)[1]


def _function(name: str, argument: str, lines: Sequence[str]) -> str:
    return f"def {name}({argument}):\n" + "\n".join("    " + line for line in lines)


def _number_function(rng: random.Random, problem: Problem, style: LongStyle) -> str:
    """Draws the function f."""
    x = rng.choice(style.elements)
    lines = []
    if problem.guard:
        kind, c, value = problem.guard
        test = element_expression(rng, (OPERATIONS[kind], c), x, style.short)
        lines += [f"if {test}:", f"    return {x if value == 'x' else value}"]
    value = x
    for i, (kind, c) in enumerate(problem.maps):
        value = element_expression(rng, (OPERATIONS[kind], c), value, style.short)
        if i + 1 < len(problem.maps) and rng.random() < style.assign:
            lines.append(f"{x} = {value}")
            value = x
    return _function("f", x, [*lines, f"return {value}"])


class _Body:
    """Statements of the function solve so far.

    Attributes:
        lines: the statements.
        current: expression of the list.
    """

    def __init__(self, rng: random.Random, problem: Problem, style: LongStyle):
        self.rng, self.problem, self.style = rng, problem, style
        self.condition = problem.condition
        self.xs = self.current = rng.choice(style.lists)
        self.v = rng.choice(style.elements)
        self.variable = rng.choice([name for name in style.variables if name != self.v])
        self.total = rng.random() < style.total
        self.lines: list[str] = []

    def bind(self, step: tuple[str, int | str]) -> BoundOperation:
        """Returns a step with the variable's name in this answer."""
        kind, c = step
        operation = CALL_OPERATION if kind == CALL else OPERATIONS[kind]
        return operation, self.variable if c == VARIABLE else c

    def define(self, measure: str) -> None:
        """Adds the definition of the variable."""
        code = REDUCTIONS[measure].code.replace("{xs}", self.current)
        self.lines.append(f"{self.variable} = {code}")

    def loop(self, operations: Sequence[BoundOperation]) -> None:
        """Adds a loop that collects elements."""
        out = self.xs if self.current == "out" else "out"
        names = (self.current, self.v, out)
        self.lines += loop_lines(self.rng, operations, names, "list", self.style.short)
        self.current = out

    def expression(self, operations: Sequence[BoundOperation]) -> str:
        """Draws the expression of operations on the list."""
        if len(operations) > 1:
            return fused_expression(self.rng, operations, self.current, self.v, self.style.short)
        step = operations[0]
        return step_expression(self.rng, step, self.current, self.v, False, self.style.short)

    def assign(self, operations: Sequence[BoundOperation]) -> None:
        """Adds a statement of operations on the list."""
        self.lines.append(f"{self.xs} = {self.expression(operations)}")
        self.current = self.xs

    def adds_up(self) -> bool:
        """Returns True if the last loop computes the reduction."""
        return self.problem.reduction in ("sum", "count") and self.total and not self.condition

    def accumulate(self, last: Sequence[BoundOperation]) -> None:
        """Adds a loop that computes the reduction, and returns it."""
        out = self.xs if self.current == "out" else "out"
        names = (self.current, self.v, out)
        self.lines += loop_lines(self.rng, last, names, self.problem.reduction, self.style.short)
        self.lines.append(f"return {out}")

    def returns(self, last: Sequence[BoundOperation]) -> None:
        """Adds the last operations, if any, then the condition and the reduction."""
        reduction, value = self.problem.reduction, self.current
        one_use = reduction != "spread" and not self.condition
        if last and one_use and self.rng.random() < self.style.inline:
            value = self.expression(last)
        elif last:
            self.assign(last)
            value = self.current
        self.add_condition()
        self.lines.append(f"return {reduce_expression(reduction, value)}")

    def finish(self, group: Sequence[BoundOperation], loop: bool) -> None:
        """Adds the last operations and what follows them."""
        if loop and self.adds_up():
            self.accumulate(group)
        elif loop:
            self.loop(group)
            self.returns([])
        else:
            self.returns(group)

    def add_condition(self) -> None:
        """Adds the condition with its early return."""
        if self.condition is None:
            return
        measure, test, c, value = self.condition
        number = REDUCTIONS[measure].code.replace("{xs}", self.current)
        name = {"sum": "total", "count": "count"}.get(measure, "a")
        if name not in (self.v, self.variable) and self.rng.random() < self.style.name_measure:
            self.lines.append(f"{name} = {number}")
            number = name
        bound = (OPERATIONS[test], c)
        self.lines.append(f"if {element_expression(self.rng, bound, number, self.style.short)}:")
        if value == VARIABLE:
            value = self.variable
        elif value in REDUCTIONS:
            value = reduce_expression(value, self.current)
        self.lines.append(f"    return {value}")


def _group_size(operations: Sequence[BoundOperation], loop: bool) -> int:
    """Returns how many operations on elements one loop or one comprehension takes."""
    shapes = [how.shape for how, _ in operations]
    if loop:
        return next((i for i, shape in enumerate(shapes) if shape == "list"), len(shapes))
    filters = next((i for i, shape in enumerate(shapes) if shape != "filter"), len(shapes))
    return filters + (shapes[filters : filters + 1] == ["map"])


def _list_function(rng: random.Random, problem: Problem, style: LongStyle) -> str:
    """Draws the function solve."""
    body = _Body(rng, problem, style)
    steps = list(problem.steps)
    while steps:
        if steps[0][0].startswith("let "):
            body.define(steps.pop(0)[0][4:])
            continue
        # A definition divides the operations, because it needs the list of its time.
        end = next((i for i, (kind, _) in enumerate(steps) if kind[:4] == "let "), len(steps))
        operations = [body.bind(step) for step in steps[:end]]
        loop = rng.random() < style.loop
        fuse = loop or rng.random() < style.fuse
        group = operations[: max(_group_size(operations, loop), 1) if fuse else 1]
        loop = loop and group[0][0].shape != "list"
        del steps[: len(group)]
        if not steps:
            body.finish(group, loop)
        elif loop:
            body.loop(group)
        else:
            body.assign(group)
    return _function("solve", body.xs, body.lines)
