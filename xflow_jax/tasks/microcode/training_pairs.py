"""Training pairs of microcode: requests with right answers."""

from __future__ import annotations

import contextlib
import random

from xflow_jax.tasks.microcode.language import compositions, make_problem
from xflow_jax.tasks.microcode.solutions import USUAL_STYLE, AnswerStyle, sample_answer


def training_pair(seed: int, index: int, style: AnswerStyle = USUAL_STYLE) -> tuple[str, str]:
    """Returns (request, right answer) at an index of an endless training set.

    Args:
        seed: number of the training set.
        index: position in it, from 0.
        style: style of the answers.
    """
    rng = random.Random(f"pair {seed} {index}")
    pool = compositions(held_out=False)
    while True:
        # Few constants make some compositions sound, and the draws may miss them.
        with contextlib.suppress(ValueError):
            problem = make_problem(rng, rng.choice(pool))
            return problem.prompt, sample_answer(rng, problem, style)
