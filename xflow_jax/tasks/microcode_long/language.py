"""The language of microcode-long: requests for two dependent functions.

"Write a function f to add 3 to a number, and to return 0 for odd numbers, and a function solve to
make n the largest, then keep the even numbers, then take f of each number, then subtract n from
each number, for a sum less than 5 return the count, and finally return the list." The function f
has one or two operations on a number and perhaps a guard. The function solve has three or four
operations on a list of microcode. One of them is f, and one may use a variable of an earlier list.
A condition may return something else. All of it without constants is a problem's composition, and a
hash of that decides whether it is held out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from xflow_jax.tasks.generated import digest
from xflow_jax.tasks.microcode.language import OPERATIONS, REDUCTIONS

NAME = "microcode-long"
CASES = 12  # inputs on which the function solve is judged
NUMBERS = tuple(range(-4, 12))  # inputs on which the function f is judged
VARIABLE = "n"  # the name in requests
CALL = "call"  # the operation that takes f of each number

# Maps of the function f, with {o} for "a number" or "the result".
NUMBER_PHRASES = {
    "add": ("add {c} to {o}", "increase {o} by {c}"),
    "subtract": ("subtract {c} from {o}", "decrease {o} by {c}"),
    "multiply": ("multiply {o} by {c}", "scale {o} by {c}"),
    "square": ("square {o}",),
    "negate": ("negate {o}",),
    "absolute": ("make {o} absolute",),
    "remainder": ("take {o} modulo {c}",),
}
# Guards of the function f.
GUARD_PHRASES = {
    "above": ("numbers greater than {c}", "values above {c}"),
    "below": ("numbers less than {c}", "values below {c}"),
    "even": ("even numbers",),
    "odd": ("odd numbers",),
    "multiple": ("multiples of {c}", "numbers divisible by {c}"),
    "positive": ("positive numbers",),
}
GUARD_VALUES = {"0": "0", "1": "1", "x": "the number"}
# Numbers that describe a list, for conditions and variables.
MEASURES = {
    "sum": ("sum", "total"),
    "count": ("count",),
    "largest": ("largest", "maximum"),
    "smallest": ("smallest", "minimum"),
    "first": ("first",),
    "last": ("last",),
}
TEST_PHRASES = {
    "above": ("greater than {c}", "above {c}"),
    "below": ("less than {c}", "below {c}"),
    "multiple": ("divisible by {c}",),
}
CONDITION_MEASURES = ("sum", "count", "largest", "smallest")
# Operations whose constant may be the variable.
VARIABLE_OPERATIONS = ("above", "below", "unequal", "add", "subtract", "multiply")
CALL_PHRASES = ("take f of each number", "make each number f of the number")

OPENING = "write a function f to "
MIDDLE = ", and a function solve to "

# (key of OPERATIONS, CALL or "let MEASURE", constant or VARIABLE)
Step: TypeAlias = tuple[str, int | str]


class Guard(NamedTuple):
    """Early return of the function f.

    Attributes:
        kind: key of GUARD_PHRASES.
        constant: its constant, or 0.
        value: key of GUARD_VALUES.
    """

    kind: str
    constant: int
    value: str


class Condition(NamedTuple):
    """Early return of the function solve, before its reduction.

    Attributes:
        measure: one of CONDITION_MEASURES.
        test: key of TEST_PHRASES.
        constant: its constant.
        value: "0", VARIABLE, or a key of REDUCTIONS.
    """

    measure: str
    test: str
    constant: int
    value: str


def passes(kind: str, constant: int, number: int) -> bool:
    """Returns True if a number passes a filter of OPERATIONS."""
    return bool(OPERATIONS[kind].run([number], constant))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A request for the functions f and solve.

    Attributes:
        prompt: the request in English.
        maps: (key of NUMBER_PHRASES, constant) of the function f, in order.
        guard: early return of the function f, or None.
        steps: operations of the function solve, in order.
        condition: early return of the function solve, or None.
        reduction: key of REDUCTIONS.
    """

    prompt: str
    maps: tuple[tuple[str, int], ...]
    guard: Guard | None
    steps: tuple[Step, ...]
    condition: Condition | None
    reduction: str

    @property
    def composition(self) -> str:
        """The problem without constants and wording, which decides the split."""
        steps = [kind + (f" {VARIABLE}" if c == VARIABLE else "") for kind, c in self.steps]
        parts = [" ".join(kind for kind, _ in self.maps)]
        parts += [f"{self.guard.kind} {self.guard.value}" if self.guard else ""]
        parts += [", ".join(steps)]
        how = self.condition
        parts += [f"{how.measure} {how.test} {how.value}" if how else "", self.reduction]
        return "/".join(parts)

    @property
    def task_id(self) -> str:
        """Readable identifier, unique for the request's meaning and wording."""
        names = [kind for kind, _ in (*self.maps, *self.steps)]
        words = "-".join([*names, self.reduction]).replace(" ", "-")
        return f"{NAME}/{words}-{digest(self.prompt) % 10**9:09d}"

    def call(self, x: int) -> int:
        """Computes the right result of the function f."""
        return _call(self.maps, self.guard, x)

    def solve(self, xs: list[int]) -> object:
        """Computes the right result of the function solve.

        Raises:
            IndexError: there is no element to return or measure.
            ValueError: likewise, for max and min.
        """
        n = 0
        for kind, c in self.steps:
            if kind.startswith("let "):
                n = _measure(kind[4:], xs)
            elif kind == CALL:
                xs = [self.call(x) for x in xs]
            else:
                xs = OPERATIONS[kind].run(xs, n if isinstance(c, str) else c)
        how = self.condition
        if how and passes(how.test, how.constant, _measure(how.measure, xs)):
            if how.value in ("0", VARIABLE):
                return n if how.value == VARIABLE else 0
            return REDUCTIONS[how.value].run(xs)
        return REDUCTIONS[self.reduction].run(xs)

    def cases(self) -> list[tuple[list[int], object]]:
        """Returns (input of solve, right result) pairs, always the same ones."""
        parts = (self.maps, self.guard, self.steps, self.condition, self.reduction)
        first, inputs = digest(repr(parts)), _inputs()
        cases: list[tuple[list[int], object]] = []
        for i in range(first, first + 4 * CASES):
            xs = inputs[i % len(inputs)]
            with contextlib.suppress(IndexError, ValueError):
                cases.append((xs, self.solve(xs)))
            if len(cases) == CASES:
                break
        return cases

    def call_cases(self) -> list[tuple[int, int]]:
        """Returns (input of f, right result) pairs."""
        return [(x, self.call(x)) for x in NUMBERS]

    def is_sound(self) -> bool:
        """Returns True if every part of the request changes a result."""
        calls, simpler = self.call_cases(), self._simpler_calls()
        if any(other.call_cases() == calls for other in simpler):
            return False
        cases = self.cases()
        if len(cases) < CASES or len({repr(want) for _, want in cases}) < 4:
            return False
        return all(_differs(other, cases) for other in (*self._shorter(), *simpler))

    def _simpler_calls(self) -> list[Problem]:
        """Returns the problems whose function f leaves out one part."""
        others = [dataclasses.replace(self, guard=None)] if self.guard else []
        if len(self.maps) > 1:
            others += [dataclasses.replace(self, maps=(how,)) for how in self.maps]
        return others

    def _shorter(self) -> list[Problem]:
        """Returns the problems whose function solve leaves out one part."""
        others = [
            dataclasses.replace(self, steps=self.steps[:i] + self.steps[i + 1 :])
            for i, (kind, _) in enumerate(self.steps)
            if not kind.startswith("let ")
        ]
        if self.condition:
            reduction = "count" if self.reduction != "count" else "list"
            # Without the condition, and without what comes after it.
            others.append(dataclasses.replace(self, condition=None))
            others.append(dataclasses.replace(self, reduction=reduction))
        return others


@functools.lru_cache(maxsize=2**14)  # a request is tried on the same numbers again and again
def _call(maps: tuple[tuple[str, int], ...], guard: Guard | None, x: int) -> int:
    if guard and passes(guard.kind, guard.constant, x):
        return x if guard.value == "x" else int(guard.value)
    for kind, c in maps:
        (x,) = OPERATIONS[kind].run([x], c)
    return x


@functools.cache
def _inputs() -> list[list[int]]:
    """Returns lists of small numbers around the constants, with repeats."""
    rng = random.Random(NAME)
    return [[rng.randint(-7, 13) for _ in range(rng.randint(3, 10))] for _ in range(997)]


def _measure(name: str, xs: list[int]) -> int:
    value = REDUCTIONS[name].run(xs)
    assert isinstance(value, int)
    return value


def _differs(other: Problem, cases: Sequence[tuple[list[int], object]]) -> bool:
    """Returns True if another problem differs in two results or more."""
    different = 0
    for xs, want in cases:
        try:
            different += other.solve(xs) != want
        except (IndexError, ValueError):
            different += 1
        if different > 1:
            return True
    return False


def _value_phrases(value: str) -> tuple[str, ...]:
    """Returns the phrases for the value of a condition."""
    if value in REDUCTIONS:
        return REDUCTIONS[value].phrases
    return (f"return {value}",)


def condition_phrases(measure: str, test: str, value: str) -> list[str]:
    """Returns the phrases for a condition, with {c} for its constant."""
    return [
        f"for a {noun} {phrase} {result}"
        for noun in MEASURES[measure]
        for phrase in TEST_PHRASES[test]
        for result in _value_phrases(value)
    ]


def step_phrases(kind: str) -> tuple[str, ...]:
    """Returns the phrases for a step, with {c} for its constant."""
    if kind.startswith("let "):
        return tuple(f"make {VARIABLE} the {noun}" for noun in MEASURES[kind[4:]])
    return CALL_PHRASES if kind == CALL else OPERATIONS[kind].phrases
