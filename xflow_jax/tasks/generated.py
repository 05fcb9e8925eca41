"""Generated problems: split by hash, lists of different problems, and their readers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from xflow_jax.errors import UserError, require

HELD_OUT = 5  # one composition in HELD_OUT is never trained on
MOST_PROBLEMS = 1_000_000
MOST_REPEATED = 20_000  # draws without a new problem, after which there are probably no more

ProblemT = TypeVar("ProblemT")


def digest(text: str) -> int:
    """Returns a number of 64 bits that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(composition: str) -> bool:
    """Returns True if a composition is never trained on."""
    return digest(composition) % HELD_OUT == 0


def check_split(split: str) -> None:
    """Raises ValueError unless the split is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")


def different_problems(
    task: str,
    count: int,
    draw: Callable[[], ProblemT | None],
    prompt: Callable[[ProblemT], str],
) -> list[ProblemT]:
    """Draws problems with different prompts.

    Args:
        task: name of the task, for error messages.
        count: number of problems.
        draw: draws a problem, or None if the draw was unlucky.
        prompt: problem -> its prompt, whose case does not count.

    Raises:
        UserError: if there are not so many problems.
    """
    require(count <= MOST_PROBLEMS, f"{task} has at most {MOST_PROBLEMS} problems, not {count}")
    found: dict[str, ProblemT] = {}
    repeated = 0
    while len(found) < count:
        problem = draw()
        if problem is None:
            continue
        before = len(found)
        found.setdefault(prompt(problem).lower(), problem)
        repeated = 0 if len(found) > before else repeated + 1
        require(
            repeated < MOST_REPEATED,
            f"{task} has no {count} different problems, but about {len(found)}",
        )
    return list(found.values())


def problem_reader(
    task: str,
    problems: Callable[[str, int, int], list[ProblemT]],
    split: str,
    count: int,
    seed: int,
) -> Callable[[Path | None, int | None], list[ProblemT]]:
    """Builds the function (data, limit) -> problems of a task.

    Args:
        task: name of the task.
        problems: (split, count, seed) -> problems.
        split: "train" or "test".
        count: number of problems without a limit.
        seed: seed of the draws.
    """

    def read(data: Path | None, limit: int | None) -> list[ProblemT]:
        if data is not None:
            raise UserError(
                f"{task} generates its problems and reads no data file, so leave {data} out"
            )
        return problems(split, count if limit is None else limit, seed)

    return read
