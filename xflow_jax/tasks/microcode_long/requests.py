"""Draws of microcode-long's requests."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

from xflow_jax.tasks.generated import check_split, different_problems, is_held_out
from xflow_jax.tasks.microcode.language import (
    CONSTANTS,
    ENDS,
    EXCLUDED_PAIRS,
    JOINS,
    OPERATIONS,
    REDUCTIONS,
)
from xflow_jax.tasks.microcode.words import split_words
from xflow_jax.tasks.microcode_long.language import (
    CALL,
    CONDITION_MEASURES,
    GUARD_PHRASES,
    GUARD_VALUES,
    MEASURES,
    MIDDLE,
    NAME,
    NUMBER_PHRASES,
    OPENING,
    TEST_PHRASES,
    VARIABLE,
    VARIABLE_OPERATIONS,
    Condition,
    Guard,
    Problem,
    Step,
    condition_phrases,
    step_phrases,
)

# Shares of problems with these parts. One of the last two is always there.
VARIABLE_SHARE, GUARD_SHARE, CONDITION_SHARE = 0.5, 0.6, 0.6
TWO_MAPS_SHARE = 0.5
FOUR_STEPS_SHARE = 0.5
ORDERING = ("sort", "descend", "reverse")
MOST_WORDS = 86  # of a request, and so of tokens. The chat template adds ten.


def draw_problem(rng: random.Random, held_out: bool) -> Problem | None:
    """Draws a problem of one side of the split, or None."""
    problem = _draw_parts(rng)
    if not _order_counts(problem) or is_held_out(problem.composition) != held_out:
        return None
    for _ in range(3):  # few constants make some compositions sound
        drawn = _draw_constants(rng, problem)
        if drawn.is_sound():
            prompt = _write_prompt(rng, drawn)
            if len(split_words(prompt)) <= MOST_WORDS:
                return dataclasses.replace(drawn, prompt=prompt)
    return None


def _order_counts(problem: Problem) -> bool:
    """Returns False if the problem orders the list for nothing."""
    kinds = [kind for kind, _ in problem.steps]
    last = max((kinds.index(kind) for kind in ORDERING if kind in kinds), default=-1)
    after = {"take", "drop"} & set(kinds[last + 1 :])
    return last < 0 or bool(after) or problem.reduction in ("list", "first", "last")


def _draw_parts(rng: random.Random) -> Problem:
    """Draws a composition, as a problem without constants and wording."""
    maps = rng.sample(sorted(NUMBER_PHRASES), 1 + (rng.random() < TWO_MAPS_SHARE))
    guarded = rng.random() < GUARD_SHARE
    conditional = not guarded or rng.random() < CONDITION_SHARE
    guard = (
        Guard(rng.choice(sorted(GUARD_PHRASES)), 0, rng.choice(sorted(GUARD_VALUES)))
        if guarded
        else None
    )
    kinds = _draw_kinds(rng, 2 + (rng.random() < FOUR_STEPS_SHARE))
    steps: list[Step] = [(kind, 0) for kind in kinds]
    users = [i for i, kind in enumerate(kinds) if kind in VARIABLE_OPERATIONS]
    variable = bool(users) and rng.random() < VARIABLE_SHARE
    if variable:
        user = rng.choice(users)
        steps[user] = (kinds[user], VARIABLE)
        # As early as possible in half of the problems, so that it is used late.
        place = 0 if rng.random() < 0.5 else rng.randint(0, user)
        steps.insert(place, (f"let {rng.choice(sorted(MEASURES))}", 0))
    reduction = rng.choice(sorted(REDUCTIONS))
    condition = None
    if conditional:
        values = ["0", *([VARIABLE] if variable else []), *sorted(set(REDUCTIONS) - {reduction})]
        condition = Condition(
            rng.choice(CONDITION_MEASURES), rng.choice(sorted(TEST_PHRASES)), 0, rng.choice(values)
        )
    return Problem("", tuple((kind, 0) for kind in maps), guard, tuple(steps), condition, reduction)


def _draw_kinds(rng: random.Random, count: int) -> list[str]:
    """Draws `count` operations of microcode and the call of f."""
    while True:
        kinds = rng.sample(sorted(OPERATIONS), count)
        pairs = itertools.combinations(kinds, 2)
        if not any(frozenset(pair) in EXCLUDED_PAIRS for pair in pairs):
            kinds.insert(rng.randint(0, count), CALL)
            return kinds


def _draw_constants(rng: random.Random, problem: Problem) -> Problem:
    def constant(kind: str) -> int:
        return rng.choice(OPERATIONS[kind].constants) if kind in OPERATIONS else 0

    steps = [(kind, c if c == VARIABLE else constant(kind)) for kind, c in problem.steps]
    guard, condition = problem.guard, problem.condition
    return dataclasses.replace(
        problem,
        maps=tuple((kind, constant(kind)) for kind, _ in problem.maps),
        guard=guard and guard._replace(constant=constant(guard.kind)),
        steps=tuple(steps),
        condition=condition and condition._replace(constant=rng.choice(CONSTANTS)),
    )


def _write_prompt(rng: random.Random, problem: Problem) -> str:
    """Draws the wording of a request."""
    first = []
    for i, (kind, c) in enumerate(problem.maps):
        phrase = rng.choice(NUMBER_PHRASES[kind])
        first.append(phrase.format(c=c, o="the result" if i else "a number"))
    text = OPENING + " and ".join(first)
    if problem.guard:
        kind, c, value = problem.guard
        text += f", and to return {GUARD_VALUES[value]} for "
        text += rng.choice(GUARD_PHRASES[kind]).format(c=c)
    steps = [rng.choice(step_phrases(kind)).format(c=c) for kind, c in problem.steps]
    ends: tuple[str, ...] = ENDS
    if problem.condition:
        measure, test, c, value = problem.condition
        ends = ENDS[1:]  # "return 0 and return the sum" would be no alternative
        steps.append(rng.choice(condition_phrases(measure, test, value)).format(c=c))
    text += MIDDLE + rng.choice(JOINS).join(steps) + rng.choice(ends)
    text += rng.choice(REDUCTIONS[problem.reduction].phrases) + "."
    return text[0].upper() + text[1:]


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Draws `count` different requests of a split.

    Args:
        split: "train" or "test".
        count: number of problems. A smaller number gives the beginning of the same list.
        seed: seed of the draws.

    Raises:
        UserError: if there are not so many problems.
    """
    check_split(split)
    rng = random.Random(f"{NAME} {split} {seed}")
    draw = functools.partial(draw_problem, rng, split == "test")
    return different_problems(NAME, count, draw, lambda problem: problem.prompt)
