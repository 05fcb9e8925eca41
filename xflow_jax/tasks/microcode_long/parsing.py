"""Parser of microcode-long's requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

from xflow_jax.tasks.microcode.language import CONNECTION, OPERATIONS, REDUCTIONS, match_phrase
from xflow_jax.tasks.microcode_long.language import (
    CALL,
    CONDITION_MEASURES,
    GUARD_PHRASES,
    GUARD_VALUES,
    MEASURES,
    MIDDLE,
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

Key = TypeVar("Key")
_CONDITIONS = list(
    itertools.product(CONDITION_MEASURES, TEST_PHRASES, ("0", VARIABLE, *REDUCTIONS))
)


def respell(prompt: str) -> str | None:
    """Writes a request as in training, or returns None."""
    if parse(prompt) is None:
        return None
    text = _normalize(prompt)
    return text[0].upper() + text[1:] + "."


def _normalize(prompt: str) -> str:
    return " ".join(prompt.split()).rstrip(".").lower()


def parse(prompt: str) -> Problem | None:
    """Parses a request, ignoring case and spaces. Returns None for other texts."""
    first, middle, second = _normalize(prompt).partition(MIDDLE)
    if not middle or not first.startswith(OPENING):
        return None
    number = _parse_number_function(first.removeprefix(OPENING))
    body = _parse_list_function(second)
    if number is None or body is None:
        return None
    (maps, guard), (steps, condition, reduction) = number, body
    return Problem(prompt, maps, guard, steps, condition, reduction)


def _find(
    text: str, choices: Sequence[tuple[Key, Sequence[str]]], constant: str, follow: str
) -> tuple[Key, str, str] | None:
    """Returns (key, constant, rest) of the first choice that matches."""
    for key, phrases in choices:
        match = match_phrase(text, phrases, constant, follow)
        if match is not None:
            return key, *match
    return None


def _parse_number_function(text: str) -> tuple[tuple[tuple[str, int], ...], Guard | None] | None:
    maps: list[tuple[str, int]] = []
    guard = None
    body, guarded, rest = text.partition(", and to return ")
    if guarded:
        guards = [
            ((kind, value), [f"{words} for {phrase}" for phrase in phrases])
            for kind, phrases in GUARD_PHRASES.items()
            for value, words in GUARD_VALUES.items()
        ]
        found = _find(rest, guards, "[2-9]", "$")
        if found is None:
            return None
        (kind, value), c, _ = found
        guard = Guard(kind, int(c), value)
    while body:
        noun = "the result" if maps else "a number"
        choices = [
            (kind, [phrase.replace("{o}", noun) for phrase in phrases])
            for kind, phrases in NUMBER_PHRASES.items()
        ]
        match = _find(body, choices, "[2-9]", " and |$")
        if match is None:
            return None
        name, c, body = match
        maps.append((name, int(c)))
    return (tuple(maps), guard) if maps and not body else None


def _parse_list_function(
    text: str,
) -> tuple[tuple[Step, ...], Condition | None, str] | None:
    kinds = [CALL, *(f"let {name}" for name in MEASURES), *OPERATIONS]
    choices = [(kind, step_phrases(kind)) for kind in kinds]
    steps: list[Step] = []
    while (found := _find(text, choices, f"[2-9]|{VARIABLE}", CONNECTION)) is not None:
        kind, c, text = found
        steps.append((kind, c if c == VARIABLE else int(c)))
    condition = None
    conditions = [(key, condition_phrases(*key)) for key in _CONDITIONS]
    how = _find(text, conditions, "[2-9]", CONNECTION)
    if how is not None:
        (measure, test, value), c, text = how
        condition = Condition(measure, test, int(c), value)
    for name, reduction in REDUCTIONS.items():
        if text in reduction.phrases and _is_complete(steps, condition):
            return tuple(steps), condition, name
    return None


def _is_complete(steps: Sequence[Step], condition: Condition | None) -> bool:
    """Returns True if the numbers of steps and variables are right."""
    operations = [kind for kind, _ in steps if not kind.startswith("let ")]
    defined = False
    for kind, c in steps:
        if kind.startswith("let "):
            if defined:
                return False
            defined = True
        elif c == VARIABLE:
            if not defined or kind not in VARIABLE_OPERATIONS:
                return False
        elif kind in OPERATIONS and c not in OPERATIONS[kind].constants:
            return False
    used = defined or condition is None or condition.value != VARIABLE
    return used and len(operations) in (3, 4) and operations.count(CALL) == 1
