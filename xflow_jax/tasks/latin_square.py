"""The task latin-square: squares of digits with blanks to fill in.

"Make a square of distinct numbers from 1 to 4:" and four rows like "0203", with 0 for a blank. An
answer is the rows without blanks, every row and column with different digits. Every such square
with the given digits is right, and a request may have one solution or many. So each digit depends
on all others in its row and column.

Sizes are 4, 5 and 6, equally often. 25 % to 90 % of the digits are blank, every number of blanks
equally often. The beginning of a training has one blank up to 25 %. A hash of the request splits
them into training and held-out ones.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import TypeAlias

from xflow_jax.tasks.base import Task, TaskConfig, extract_code
from xflow_jax.tasks.generated import (
    check_split,
    different_problems,
    is_held_out,
    problem_reader,
)

Square: TypeAlias = tuple[tuple[int, ...], ...]  # 0 is a blank

NAME = "latin-square"
SIZES = (4, 5, 6)
LEAST_BLANKS, MOST_BLANKS = 0.25, 0.9  # shares of the digits
HELD_OUT_PROBLEMS = 2048
TRAINING_PROBLEMS = 2048
POLICY_SEED = 101  # of the training requests for policies

# Held out, with one solution.
EXAMPLE = "Make a square of distinct numbers from 1 to 4:\n0234\n0002\n4320\n0013"
# One block, so that the order of the digits is free.
CONFIG = TaskConfig(gen_length=48, block_length=48)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A square with blanks.

    Attributes:
        clues: rows of digits, with 0 for a blank.
    """

    clues: Square

    @property
    def prompt(self) -> str:
        """The request."""
        size = len(self.clues)
        return f"Make a square of distinct numbers from 1 to {size}:\n{_write(self.clues)}"

    @property
    def task_id(self) -> str:
        """Readable identifier, unique for the clues."""
        return f"{NAME}/{'-'.join(_write(self.clues).split())}"


def _write(square: Square) -> str:
    return "\n".join("".join(map(str, row)) for row in square)


def complete(clues: Square, rng: random.Random | None = None) -> Square | None:
    """Fills the blanks of a square.

    Args:
        clues: the square.
        rng: source of the order of trials, for a random solution. None gives the same one always.

    Returns:
        A solution, or None if there is none.
    """
    size = len(clues)
    rows = [list(row) for row in clues]
    # Digits that a row or column still needs.
    row_needs = [set(range(1, size + 1)) for _ in rows]
    column_needs = [set(range(1, size + 1)) for _ in rows]
    blanks = []
    for i, row in enumerate(rows):
        for j, digit in enumerate(row):
            if not digit:
                blanks.append((i, j))
            elif digit in row_needs[i] and digit in column_needs[j]:
                row_needs[i].remove(digit)
                column_needs[j].remove(digit)
            else:
                return None

    if rng is not None:
        rng.shuffle(blanks)

    def fill(blanks: list[tuple[int, int]]) -> bool:
        if not blanks:
            return True
        choices = [row_needs[i] & column_needs[j] for i, j in blanks]
        best = min(range(len(blanks)), key=lambda k: len(choices[k]))
        i, j = blanks[best]
        rest = blanks[:best] + blanks[best + 1 :]
        digits = sorted(choices[best])
        for digit in digits if rng is None else rng.sample(digits, len(digits)):
            rows[i][j] = digit
            row_needs[i].remove(digit)
            column_needs[j].remove(digit)
            if fill(rest):
                return True
            row_needs[i].add(digit)
            column_needs[j].add(digit)
        return False

    return tuple(map(tuple, rows)) if fill(blanks) else None


def draw_square(rng: random.Random, size: int) -> Square:
    """Draws a Latin square."""
    square = complete(((0,) * size,) * size, rng)
    assert square is not None
    # The order of the trials alone would prefer some squares.
    rows, columns, digits = (rng.sample(range(size), size) for _ in range(3))
    return tuple(tuple(digits[square[i][j] - 1] + 1 for j in columns) for i in rows)


def draw_problem(
    rng: random.Random, square: Square, held_out: bool, early: bool = False
) -> Problem:
    """Draws the blanks of a square, for one side of the split.

    Args:
        rng: source of the draws.
        square: a Latin square.
        held_out: the side of the split.
        early: True for few blanks.
    """
    size = len(square)
    cells = size * size
    few, many = int(LEAST_BLANKS * cells), int(MOST_BLANKS * cells)
    while True:
        count = rng.randint(1, few) if early else rng.randint(few, many)
        blanks = set(rng.sample(range(cells), count))
        rows = [
            tuple(0 if size * i + j in blanks else digit for j, digit in enumerate(row))
            for i, row in enumerate(square)
        ]
        problem = Problem(tuple(rows))
        if is_held_out(problem.prompt) == held_out:
            return problem


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Draws `count` different problems of a split.

    Args:
        split: "train" or "test".
        count: number of problems. A smaller number gives the beginning of the same list.
        seed: seed of the draws.

    Raises:
        UserError: if there are not so many problems.
    """
    check_split(split)
    rng = random.Random(f"{NAME} {split} {seed}")

    def draw() -> Problem:
        return draw_problem(rng, draw_square(rng, rng.choice(SIZES)), split == "test")

    return different_problems(NAME, count, draw, lambda problem: problem.prompt)


def training_pair(seed: int, index: int, early: bool = False) -> tuple[str, str]:
    """Returns (request, solution) at an index of an endless training set.

    Args:
        seed: number of the training set.
        index: position in it, from 0.
        early: True for few blanks.
    """
    rng = random.Random(f"{NAME} pair {seed} {index}")
    square = draw_square(rng, rng.choice(SIZES))
    return draw_problem(rng, square, held_out=False, early=early).prompt, _write(square)


def parse(prompt: str) -> Problem | None:
    """Parses a request, ignoring case and spaces. Returns None for other texts."""
    text = " ".join(prompt.split()).lower()
    match = re.fullmatch(r"make a square of distinct numbers from 1 to ([4-6]) ?:([0-6 ]+)", text)
    if match is None:
        return None
    size, digits = int(match[1]), [int(digit) for digit in match[2].replace(" ", "")]
    if len(digits) != size * size or max(digits) > size:
        return None
    return Problem(tuple(tuple(digits[i : i + size]) for i in range(0, size * size, size)))


def respell(prompt: str) -> str | None:
    """Writes a request as in training, or returns None."""
    problem = parse(prompt)
    return None if problem is None else problem.prompt


def checks(problem: Problem) -> list[str]:
    """Returns the programs that judge an answer's rows, one for each test.

    Args:
        problem: the problem.
    """
    size = len(problem.clues)
    shape = (
        "_square = [[int(digit) for digit in row] for row in rows()]\n"
        f"assert [len(row) for row in _square] == {[size] * size}, "
        f"'the answer has no {size} rows of {size} digits'\n"
    )
    line = f"assert sorted(_digits) == {list(range(1, size + 1))}, f'{{_digits}} in a"
    tests = [
        (
            f"_wrong = [row for row, clues in zip(_square, {problem.clues!r})"
            " if any(clue not in (0, digit) for digit, clue in zip(row, clues))]\n"
            "assert not _wrong, f'a given digit has changed in {_wrong[0]}'\n"
        )
    ]
    tests += [f"_digits = _square[{i}]\n{line} row'\n" for i in range(size)]
    tests += [f"_digits = [row[{j}] for row in _square]\n{line} column'\n" for j in range(size)]
    return [shape + test for test in tests]


def program(answer: str) -> str:
    """Returns the program of an answer, with a function `rows`.

    Args:
        answer: rows of digits. Spaces between the digits do not count.
    """
    rows = ["".join(line.split()) for line in answer.splitlines() if line.strip()]
    return f"def rows():\n    return {rows!r}\n"


def _canonical(problem: Problem) -> str:
    solution = complete(problem.clues)
    return "" if solution is None else _write(solution)


def _case(problem: Problem) -> tuple[object, object] | None:
    solution = _canonical(problem)
    return (_write(problem.clues).split(), solution.split()) if solution else None


def make_task(config: TaskConfig) -> Task[Problem]:
    """Builds the task with a protocol."""
    return Task(
        name=NAME,
        problems=problem_reader(NAME, problems, "test", HELD_OUT_PROBLEMS, 0),
        task_id=lambda problem: problem.task_id,
        prompt=lambda problem: config.prompt.format(prompt=problem.prompt),
        extract=lambda problem, text: extract_code(config, text),
        program=lambda problem, code: (program(code), "".join(checks(problem))),
        canonical=_canonical,
        config=config,
        parts=lambda problem, code: [(program(code), check) for check in checks(problem)],
        training=problem_reader(NAME, problems, "train", TRAINING_PROBLEMS, POLICY_SEED),
        respell=respell,
        example=EXAMPLE,
        parse=parse,
        case=_case,
        generate=problems,
        training_pair=training_pair,
    )


TASK = make_task(CONFIG)
