"""Right answers to microcode's requests, in the many ways that people write them: the data that training is made of."""

from __future__ import annotations

import contextlib
import random

from xflow_jax.tasks.microcode.language import compositions, make_problem
from xflow_jax.tasks.microcode.solutions import USUAL, Habits, answer


def training_pair(seed: int, index: int, habits: Habits = USUAL) -> tuple[str, str]:
    """The `index`-th (request, right answer) of the endless training set number `seed`."""
    rng = random.Random(f"pair {seed} {index}")
    pool = compositions(held_out=False)
    while True:
        with contextlib.suppress(
            ValueError
        ):  # unlucky draws of a composition that few constants make sound
            problem = make_problem(rng, rng.choice(pool))
            return problem.prompt, answer(rng, problem, habits)
