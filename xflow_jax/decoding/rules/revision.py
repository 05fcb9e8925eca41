"""Re-editing in every step, and the end of such a block."""

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    check_ranges,
    static_field,
)
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.types import Array, Bool, Int


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class Revision:
    """Memory of rules that stop when nothing changes.

    Attributes:
        over: True if the row's last step ended its block, bool [B].
        passes: passes of the row in its block, int [B].
    """

    over: jax.Array
    passes: jax.Array

    @classmethod
    def first(cls, batch: int) -> Revision:
        """Returns the memory before the first step."""
        return cls(jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))

    def count_pass(self, step: Step) -> Int[Array, " B"]:
        """Returns the passes of each block, with the present one."""
        begins = jnp.reshape(jnp.broadcast_to(step.rho == 0, (*self.passes.shape, 1)), (-1,))
        return jnp.where(begins, 0, self.passes) + 1

    def after(self, step: Step, moves: Bool[Array, "B N"], least_passes: int) -> Revision:
        """Returns the memory after a pass in which some positions move."""
        passes = self.count_pass(step)
        return Revision((passes >= least_passes) & ~jnp.any(moves, axis=-1), passes)


def reedit_all(
    belief: Belief,
    state: DecodeState,
    step: Step,
    enters: Bool[Array, "B N"],
    sure: Array | float,
    least_passes: int = 1,
    rescale: bool = False,
    expected: bool = False,
    floor: Array | float = 0.0,
    replace_above: Array | float = 0.0,
) -> Action:
    """Re-edits every position that has entered (Eq. 10 in every step).

    A mask that enters, and everything that has entered, gets x = c x_pred + (1 - c) m and t = c.
    Only a prediction of another token with c <= replace_above leaves the position as it is.
    The block of a row is over if all confidences are at least `sure`, or if the step changed no
    token that stood and no mask entered.

    Args:
        belief: predictions of the step.
        state: the state before it, with a Revision as memory. A position has entered if t > 0.
        step: slice of the schedule.
        enters: masks that enter.
        sure: confidence at which a prediction needs no further step, for all rows or [B, 1].
        least_passes: passes of a block before it can be over. Above 1, its last one must have
            changed nothing.
        rescale: as in Action.
        expected: as in Action.
        floor: least progress of positions that have entered, for all rows or [B, 1].
        replace_above: confidence above which another token replaces one that stands, for all rows
            or [B, 1].

    Returns:
        The action, with the new memory.
    """
    here, c = step.candidates, belief.confidence
    enters = here & enters & (state.t == 0)
    differs = belief.tokens != state.tokens
    stood = here & (state.t > 0) & (~differs | (c > replace_above))
    memory = state.memory.after(step, enters | stood & differs, least_passes)
    if least_passes == 1:
        memory = memory.replace(over=memory.over | jnp.all((c >= sure) | ~here, axis=-1))
    no = jnp.zeros_like(here)
    moved = stood | enters
    # Of all positions, since a row may have a number of its own.
    floor = jnp.broadcast_to(jnp.asarray(floor, c.dtype), c.shape)
    return Action(jnp.zeros_like(c), moved, no, None, None, memory, rescale, expected, floor=floor)


def is_open(state: DecodeState) -> Bool[Array, "B N"]:
    """Returns True at masks, and in blocks that are not over."""
    # A block begins with masks only, so the memory of the block before it does no harm.
    return (state.t == 0) | ((state.t < 1) & ~state.memory.over[:, None])


@struct.dataclass
class DMax(TokenConstraints):
    """Soft parallel decoding of DMax (arXiv:2604.08302).

    The masks that enter are the leftmost ones: all before the first with c < tau, and at least one.
    Everything that has entered is x = c x_pred + (1 - c) m in every step, rescaled to the length
    c |x_pred| + (1 - c) |m|. A block is over if all its confidences are at least `sure`, or if
    nothing changed. A mask that has not entered keeps it open, while the original code leaves such
    a mask in the answer. Made for models that were trained on their own predictions.

    Attributes:
        tau: confidence threshold. The authors' script for code has 0.65.
        sure: confidence at which a prediction needs no further step.
        rescale: rescale the mixture.
        suppress_mask: predict neither the mask token nor a row without a token.
        early_exit: skip steps of blocks that are over.

    Raises:
        UserError: if a number is out of range.
    """

    tau: float = static_field(0.65)
    sure: float = static_field(0.9)
    rescale: bool = static_field(True)
    suppress_mask: bool = static_field(True, kw_only=True)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0, sure=1.0)

    @property
    def revises(self) -> bool:
        """Returns True: tokens change until their block is over."""
        return True

    def init_memory(self, batch: int, canvas: int) -> Revision:
        """Returns the memory before the first step."""
        return Revision.first(batch)

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at positions that another step could still change."""
        return is_open(state)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Re-edits everything that has entered, with the leftmost masks."""
        masked = step.candidates & (state.t == 0)
        doubtful = masked & (belief.confidence < self.tau)
        leading = masked & (jnp.cumsum(doubtful, axis=-1) == 0)
        first = masked & (jnp.cumsum(masked, axis=-1) == 1)
        enters = leading | first
        return reedit_all(belief, state, step, enters, self.sure, rescale=self.rescale)
