"""The language of microcode: operations, reductions, problems, split and parser.

A problem asks for one or two operations on a list of numbers and for a reduction of the result:
"Keep the numbers greater than 5, then square them and return the sum." Every problem has many right
answers (names, loop, comprehension or built-in, one statement or several, equivalent expressions).
So an answer is right if and only if it computes the right values. The operations and the reduction
without constants are a problem's composition. A hash splits the compositions into training and
held-out ones, so no request of a held-out composition occurs in training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xflow_jax.tasks.generated import check_split, different_problems, digest, is_held_out

NAME = "microcode"
CASES = 10  # inputs on which an answer is judged
CONSTANTS = range(2, 10)  # one token each ("take" and "drop" use the first three)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on a list of numbers.

    Attributes:
        shape: variable of `code`. "filter" and "map" take one element {v}, "list" a list {xs}.
        phrases: requests in English, with {c} for the constant.
        code: Python expressions, the most usual one first.
        run: (xs, c) -> the resulting list.
    """

    shape: str
    phrases: tuple[str, ...]
    code: tuple[str, ...]
    run: Callable[[list[int], int], list[int]]

    @property
    def constants(self) -> range:
        """Constants of this operation, range(0, 1) if it takes none."""
        if "{c}" not in self.phrases[0]:
            return range(1)
        return CONSTANTS[:3] if self.shape == "list" else CONSTANTS


def _filter(
    phrases: tuple[str, ...], code: tuple[str, ...], test: Callable[[int, int], bool]
) -> Operation:
    return Operation("filter", phrases, code, lambda xs, c: [x for x in xs if test(x, c)])


def _map(
    phrases: tuple[str, ...], code: tuple[str, ...], f: Callable[[int, int], int]
) -> Operation:
    return Operation("map", phrases, code, lambda xs, c: [f(x, c) for x in xs])


OPERATIONS: dict[str, Operation] = {
    "above": _filter(
        ("keep the numbers greater than {c}", "keep values above {c}"),
        ("{v} > {c}", "{c} < {v}"),
        lambda x, c: x > c,
    ),
    "below": _filter(
        ("keep the numbers less than {c}", "keep values below {c}"),
        ("{v} < {c}", "{c} > {v}"),
        lambda x, c: x < c,
    ),
    "even": _filter(
        ("keep the even numbers", "drop the odd numbers"),
        ("{v} % 2 == 0", "not {v} % 2"),
        lambda x, c: x % 2 == 0,
    ),
    "odd": _filter(
        ("keep the odd numbers", "drop the even numbers"),
        ("{v} % 2 == 1", "{v} % 2"),
        lambda x, c: x % 2 == 1,
    ),
    "multiple": _filter(
        ("keep the multiples of {c}", "keep the numbers divisible by {c}"),
        ("{v} % {c} == 0", "not {v} % {c}"),
        lambda x, c: x % c == 0,
    ),
    "unequal": _filter(
        ("remove every {c}", "drop the numbers equal to {c}"),
        ("{v} != {c}", "{c} != {v}"),
        lambda x, c: x != c,
    ),
    "positive": _filter(
        ("keep the positive numbers", "keep positive values"),
        ("{v} > 0", "0 < {v}"),
        lambda x, c: x > 0,
    ),
    "add": _map(
        ("add {c} to each number", "increase each by {c}"),
        ("{v} + {c}", "{c} + {v}"),
        lambda x, c: x + c,
    ),
    "subtract": _map(
        ("subtract {c} from each number", "decrease each by {c}"),
        ("{v} - {c}",),
        lambda x, c: x - c,
    ),
    "multiply": _map(
        ("multiply each number by {c}", "scale each by {c}"),
        ("{v} * {c}", "{c} * {v}"),
        lambda x, c: x * c,
    ),
    "square": _map(
        ("square each number", "square them"), ("{v} * {v}", "{v} ** 2"), lambda x, c: x * x
    ),
    "negate": _map(("negate each number", "flip the signs"), ("-{v}", "0 - {v}"), lambda x, c: -x),
    "absolute": _map(
        ("take absolute values", "make each number absolute"), ("abs({v})",), lambda x, c: abs(x)
    ),
    "remainder": _map(
        ("take each number modulo {c}", "take remainders by {c}"),
        ("{v} % {c}",),
        lambda x, c: x % c,
    ),
    "sort": Operation(
        "list", ("sort them", "sort the numbers"), ("sorted({xs})",), lambda xs, c: sorted(xs)
    ),
    "descend": Operation(
        "list",
        ("sort them in descending order", "sort from high to low"),
        ("sorted({xs}, reverse=True)", "sorted({xs})[::-1]"),
        lambda xs, c: sorted(xs, reverse=True),
    ),
    "reverse": Operation(
        "list",
        ("reverse the list", "reverse the order"),
        ("{xs}[::-1]", "list(reversed({xs}))"),
        lambda xs, c: xs[::-1],
    ),
    "take": Operation(
        "list",
        ("take the first {c}", "keep only the first {c}"),
        ("{xs}[:{c}]",),
        lambda xs, c: xs[:c],
    ),
    "drop": Operation(
        "list", ("skip the first {c}", "drop the first {c}"), ("{xs}[{c}:]",), lambda xs, c: xs[c:]
    ),
    "unique": Operation(
        "list",
        ("sort the distinct values", "remove duplicates and sort"),
        ("sorted(set({xs}))",),
        lambda xs, c: sorted(set(xs)),
    ),
}


class Reduction(NamedTuple):
    """Value to return of the resulting list.

    Attributes:
        phrases: requests in English.
        code: a Python expression over the list {xs}.
        run: xs -> the value.
    """

    phrases: tuple[str, ...]
    code: str
    run: Callable[[list[int]], object]


REDUCTIONS: dict[str, Reduction] = {
    "list": Reduction(("return the list", "return the result"), "{xs}", lambda xs: xs),
    "sum": Reduction(("return the sum", "return the total"), "sum({xs})", sum),
    "largest": Reduction(("return the largest", "return the maximum"), "max({xs})", max),
    "smallest": Reduction(("return the smallest", "return the minimum"), "min({xs})", min),
    "count": Reduction(("return the count", "return how many there are"), "len({xs})", len),
    "first": Reduction(("return the first one", "return the first"), "{xs}[0]", lambda xs: xs[0]),
    "last": Reduction(("return the last one", "return the last"), "{xs}[-1]", lambda xs: xs[-1]),
    "spread": Reduction(
        ("return the largest minus the smallest", "return the range"),
        "max({xs}) - min({xs})",
        lambda xs: max(xs) - min(xs),
    ),
}


# Parts of a request: before the first operation, between operations, before the reduction.
_OPENINGS = ("", "Write a function to ", "Given a list of numbers, ", "Write Python code to ")
JOINS = (", then ", " and then ", ", ")
ENDS = (" and ", ", then ", " and finally ")
CONNECTION = ", then |, and | and then | and finally |, | and "

# Pairs of which one operation is redundant, or that leave nothing to return.
EXCLUDED_PAIRS = {
    frozenset(pair)
    for pair in (
        ("even", "odd"),
        ("sort", "descend"),
        ("sort", "unique"),
        ("descend", "unique"),
        ("sort", "reverse"),
    )
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A request for a list function.

    Attributes:
        prompt: the request in English.
        operations: (key of OPERATIONS, constant) in order. The constant is 0 if it has none.
        reduction: key of REDUCTIONS.
    """

    prompt: str
    operations: tuple[tuple[str, int], ...]
    reduction: str

    @property
    def composition(self) -> tuple[str, ...]:
        """Operations and reduction without constants. They decide the side of the split."""
        return (*(kind for kind, _ in self.operations), self.reduction)

    @property
    def task_id(self) -> str:
        """Readable identifier, unique for the request's meaning and wording."""
        steps = "-".join(kind + (str(c) if c else "") for kind, c in self.operations)
        return f"{NAME}/{steps}-{self.reduction}-{digest(self.prompt) % 10**6:06d}"

    def solve(self, xs: list[int]) -> object:
        """Computes the right result for `xs`.

        Raises:
            IndexError: the reduction has no element to return.
            ValueError: likewise, for max and min.
        """
        for kind, c in self.operations:
            xs = OPERATIONS[kind].run(xs, c)
        return REDUCTIONS[self.reduction].run(xs)

    def cases(self) -> list[tuple[list[int], object]]:
        """Returns (input, right result) pairs, the same ones for the same operations.

        There are fewer than `CASES` if the request leaves nothing to return for most inputs.
        """
        rng = random.Random(digest(repr((self.operations, self.reduction))))
        cases: list[tuple[list[int], object]] = []
        for _ in range(8 * CASES):
            # Small numbers around the constants, with repeats: every operation has an effect.
            xs = [rng.randint(-6, 14) for _ in range(rng.randint(5, 12))]
            with contextlib.suppress(IndexError, ValueError):
                cases.append((xs, self.solve(xs)))
            if len(cases) == CASES:
                break
        return cases

    def is_sound(self) -> bool:
        """Returns True if enough inputs have a result and the results differ."""
        cases = self.cases()
        return len(cases) == CASES and len({repr(want) for _, want in cases}) >= 3


@functools.cache
def compositions(held_out: bool) -> tuple[tuple[str, ...], ...]:
    """Returns all compositions on one side of the split.

    Each has one or two operations and a reduction.
    """
    singles = [(a,) for a in OPERATIONS]
    pairs = [
        (a, b)
        for a in OPERATIONS
        for b in OPERATIONS
        if a != b and frozenset((a, b)) not in EXCLUDED_PAIRS
    ]
    every = [(*ops, r) for ops in singles + pairs for r in REDUCTIONS]
    side = (c for c in every if is_held_out(" ".join(c)) == held_out)
    # A few compositions leave nothing for any constants ("keep absolute values below 0").
    return tuple(c for c in side if _sound_operations(random.Random(" ".join(c)), c) is not None)


def _sound_operations(
    rng: random.Random, composition: tuple[str, ...]
) -> tuple[tuple[str, int], ...] | None:
    *kinds, reduction = composition
    for _ in range(20):
        operations = tuple((kind, rng.choice(OPERATIONS[kind].constants)) for kind in kinds)
        if Problem("", operations, reduction).is_sound():
            return operations
    return None


def make_problem(rng: random.Random, composition: tuple[str, ...]) -> Problem:
    """Draws a request for a composition, with random constants and wording.

    Raises:
        ValueError: the draws found no constants that make the problem sound.
    """
    operations = _sound_operations(rng, composition)
    if operations is None:
        raise ValueError(f"no constants make {composition} a sound problem")
    reduction = composition[-1]
    steps = [rng.choice(OPERATIONS[kind].phrases).format(c=c) for kind, c in operations]
    text = rng.choice(_OPENINGS) + rng.choice(JOINS).join(steps) + rng.choice(ENDS)
    text += rng.choice(REDUCTIONS[reduction].phrases) + "."
    return Problem(text[0].upper() + text[1:], operations, reduction)


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Draws `count` different requests of a split.

    Each composition has its turn before any of them repeats.

    Args:
        split: "train" or "test".
        count: number of problems. A smaller number gives the beginning of the same list.
        seed: seed of the draws.

    Raises:
        UserError: if there are not so many problems.
    """
    check_split(split)
    rng = random.Random(f"{split} {seed}")
    remaining: list[tuple[str, ...]] = []

    def draw() -> Problem | None:
        if not remaining:
            remaining.extend(compositions(held_out=split == "test"))
            rng.shuffle(remaining)
        with contextlib.suppress(ValueError):  # few constants make some compositions sound
            return make_problem(rng, remaining.pop())
        return None

    return different_problems(NAME, count, draw, lambda problem: problem.prompt)


def respell(prompt: str) -> str | None:
    """Writes a request with the capitals, spaces and full stop of training.

    Returns:
        The request, or None for a text that is no request of one or two operations.
    """
    problem = parse(prompt)
    if problem is None or len(problem.operations) > 2:
        return None
    text = " ".join(prompt.split()).rstrip(".").lower()
    return text[0].upper() + text[1:].replace("python", "Python") + "."


def parse(prompt: str) -> Problem | None:
    """Parses a request, ignoring case and spaces. Returns None for other texts."""
    text = " ".join(prompt.split()).rstrip(".").lower()
    for opening in _OPENINGS[1:]:
        text = text.removeprefix(opening.lower())
    operations: list[tuple[str, int]] = []
    while True:
        for name, reduction in REDUCTIONS.items():
            if text in reduction.phrases and operations:
                return Problem(prompt, tuple(operations), name)
        for kind, operation in OPERATIONS.items():
            match = match_phrase(text, operation.phrases)
            if match is not None and int(match[0]) in operation.constants:
                operations.append((kind, int(match[0])))
                text = match[1]
                break
        else:
            return None


def match_phrase(
    text: str, phrases: Sequence[str], constant: str = r"\d+", follow: str = CONNECTION
) -> tuple[str, str] | None:
    """Matches the beginning of a request with phrases.

    A longer phrase may begin like a shorter one ("sort them in descending order"), so a connection
    must follow.

    Args:
        text: the request in lower case.
        phrases: phrases with {c} for a constant.
        constant: regular expression of a constant.
        follow: regular expression of what must follow.

    Returns:
        (constant, the rest of the request), or None. The constant is "0" without one.
    """
    pattern = "|".join(re.escape(p).replace(r"\{c\}", f"({constant})") for p in phrases)
    match = re.match(rf"(?:{pattern})(?:{follow})", text)
    if match is None:
        return None
    return next((group for group in match.groups() if group), "0"), text[match.end() :]
