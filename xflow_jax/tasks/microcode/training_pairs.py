"""Training pairs of microcode: a request of the training split and a right answer."""

from __future__ import annotations

import contextlib
import random

from xflow_jax.tasks.microcode.language import compositions, make_problem
from xflow_jax.tasks.microcode.solutions import USUAL_STYLE, AnswerStyle, sample_answer


def training_pair(seed: int, index: int, style: AnswerStyle = USUAL_STYLE) -> tuple[str, str]:
    """Returns the pair (request, right answer) at `index` of the endless training set `seed`."""
    rng = random.Random(f"pair {seed} {index}")
    pool = compositions(held_out=False)
    while True:
        # Few constants make some compositions sound, and the draws may miss them.
        with contextlib.suppress(ValueError):
            problem = make_problem(rng, rng.choice(pool))
            return problem.prompt, sample_answer(rng, problem, style)
