"""Rules whose numbers are arrays, one for each row."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import TOP, Belief
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.own_loop import adapt_loop
from xflow_jax.decoding.state import DecodeConfig, DecodeState, Step
from xflow_jax.errors import UserError
from xflow_jax.types import Array, Float, ModelConfig

T = TypeVar("T")


def with_numbers(rule: T, numbers: dict[str, Float[Array, "B 1"]]) -> T:
    """Returns a rule with arrays in the place of numbers.

    Args:
        rule: the rule.
        numbers: option -> its number for each row.
    """
    rule = copy.copy(rule)
    for name, number in numbers.items():  # the constructor takes one number for all rows
        object.__setattr__(rule, name, number)
    return rule


def takes_arrays(rule: Rule, names: Sequence[str]) -> bool:
    """Returns True if the rule can compute with arrays in these options.

    Args:
        rule: the rule.
        names: options with numbers.
    """
    no, zero, grid = jnp.zeros((1, 1), bool), jnp.zeros((1, 1)), jnp.zeros((1, 1), jnp.int32)
    four = jnp.zeros((1, 1, TOP))

    def run(numbers: dict[str, jax.Array], keys: jax.Array) -> None:
        made = with_numbers(rule, numbers)
        state = DecodeState(four, zero, grid, grid[0], no[0], memory=made.init_memory(1, 1))
        step = Step(grid, grid, zero, grid, zero, share=zero, candidates=no, keys=keys)
        made(Belief(grid, zero, four, four.astype(jnp.int32), zero), state, step)
        made.is_open(state)

    numbers = {name: jax.ShapeDtypeStruct((1, 1), jnp.float32) for name in names}
    try:
        jax.eval_shape(run, numbers, jax.random.split(jax.random.key(0), 1))
    except (jax.errors.ConcretizationTypeError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error  # of a rule from a file
        if not isinstance(cause, jax.errors.ConcretizationTypeError):
            raise
        return False
    return True


def row_numbers(rule: Rule, model: ModelConfig) -> tuple[str, ...]:
    """Returns the options that can differ from row to row.

    These are decimal numbers on which neither the belief nor the loop depends.

    Args:
        rule: the rule.
        model: configuration of the model.
    """
    if not dataclasses.is_dataclass(rule):
        return ()
    found = []
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, float) and _only_in_steps(rule, field.name, model):
            found.append(field.name)
    return tuple(name for name in found if takes_arrays(rule, (name,)))


def _only_in_steps(rule: Rule, name: str, model: ModelConfig) -> bool:
    """Returns True if belief and loop do not depend on an option."""
    config = DecodeConfig(1, 1, 1)
    other = copy.copy(rule)
    object.__setattr__(other, name, object())  # which no computation accepts
    try:
        return all(
            view(other) == view(rule)
            for view in (
                lambda r: r.belief_options(model, None),
                lambda r: adapt_loop(r, config),
                lambda r: (r.early_exit, r.needs_keys, r.revises),
            )
        )
    except (TypeError, UserError):
        return False
