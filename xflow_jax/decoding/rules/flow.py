"""x-prediction flow decoding, the method itself, as a rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.entry_policy import EntryPolicy
from xflow_jax.decoding.policy import Policy
from xflow_jax.decoding.rules import revision
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    chance_before,
    check_ranges,
    select_highest,
    select_within_factor,
    static_field,
)
from xflow_jax.decoding.state import SETTLED, DecodeState, Step
from xflow_jax.errors import describe, require
from xflow_jax.types import Array, Bool, Float

A_MIN = 1 / 256
ENTRY = 0.9  # confidence above which a mask enters, without `jump`
REEDITS = ("confidence", "disagreement", "always")


@struct.dataclass
class Flow(TokenConstraints):
    """x-prediction flow decoding (Eqs. 4-10).

    Re-editing (Eq. 10) sets x = c x_pred + (1 - c) m and t = c. `reedit` selects the positions:

    - "confidence": those with c - t < -reedit_margin, as the paper has it. c is the confidence of
      the present argmax, so a token that the model surely contradicts is not re-edited.
    - "disagreement": those whose argmax is not the token that stands there, with
      c > reedit_above. A token stands there if t >= reedit_above.
    - "always": all that have entered, in every step. A mask enters at c > jump (0.9 without
      `jump`), or by `factor`, and at least the surest one. A token that stands gives way to another
      at c > replace_above. The block is over if all c are at least `sure`, or if nothing changed.
      `power`, `creep` and `commit` have no effect, and a step-size policy is refused.

    With an entry policy a mask enters if its learned confidence is above `jump`, or above the
    policy's own threshold without `jump`, and at least the surest one enters. Without "always" an
    entry goes all the way, and nothing else moves.

    Attributes:
        policy: trained step-size policy, or entry policy. Without one, a = c ** power, or with
            `jump`, a = 1 at c > jump and a = creep elsewhere.
        power: exponent of the fixed rule.
        jump: confidence above which a position goes all the way, or None.
        creep: step of the other positions with `jump`.
        revise_committed: re-edit positions at t = 1 too.
        reedit_margin: how far confidence may fall behind progress before a position is re-edited
            (Eq. 10), or None for no re-editing.
        reedit: "confidence", "disagreement" or "always".
        reedit_above: confidence above which a disagreement counts.
        rescale: give a re-edited x the length c |x_pred| + (1 - c) |m|, as DMax does.
        expected: move toward the mean embedding of the four likeliest tokens instead of the
            likeliest one's. A position at t = 1 has the embedding of its token in either case.
        sure: confidence at which a prediction needs no further step, for "always".
        factor: for "always", in place of `jump`: the n surest masks enter together, for the largest
            n with (n + 1)(1 - c(n)) < factor, as in factor-based decoding.
        left: for "always", the weight of doubts to the left. A mask is judged by
            c * (product of c of the masks before it) ** left in the place of c. With 1 that is the
            chance that it and all before it are right, if they are independent.
        floor: least t of a position that has entered, for "always". It commits to one of several
            likely tokens, where c alone would leave the position near the mask. With 1 every entry
            is written, and written anew in each pass until no mask is left.
        replace_above: for "always", confidence above which another token replaces one that stands.
            Below it the position stays as it is. With 1 nothing is taken back.
        least_passes: passes of a block before it can be over. Above 1, a block is only over after a
            pass in which no token changed.
        commit: commit one position per sequence and step, whatever its step fraction.
        synchronous: one shared step a = 1 / (steps left), as in image diffusion.
        suppress_mask: predict neither the mask token nor a row without a token.
        early_exit: skip the steps left in a block once all its positions reach `settled`, or once
            it is over. The last predictions then stand.
        settled: progress from which a position is no longer open.
        sample: draw steps from the policy instead of taking their expectation. The draws are in
            the trace's notes (training/rollout.py).

    Raises:
        UserError: if a number is out of range, `sample` is set without a policy, or `factor` with
            `jump`, with a policy or without "always".
    """

    policy: Policy | EntryPolicy | None = None
    power: float = static_field(2.0)
    jump: float | None = static_field(None)
    creep: float = static_field(0.1)
    revise_committed: bool = static_field(True)
    reedit_margin: float | None = static_field(0.1)
    commit: bool = static_field(True)
    synchronous: bool = static_field(False)
    suppress_mask: bool = static_field(True, kw_only=True)
    early_exit: bool = static_field(False)
    settled: float = static_field(SETTLED)
    sample: bool = static_field(False)
    reedit: str = static_field("confidence")
    reedit_above: float = static_field(0.5)
    rescale: bool = static_field(False)
    expected: bool = static_field(False)
    sure: float = static_field(0.9)
    least_passes: int = static_field(1)
    floor: float = static_field(0.0)
    factor: float | None = static_field(None)
    left: float = static_field(0.0)
    replace_above: float = static_field(0.0)

    def __post_init__(self) -> None:
        # JAX builds trees with other leaves than policies, so only known mistakes are refused.
        require(
            not isinstance(self.policy, str | Path | Mapping | type),
            f"policy must be a policy from xflow_jax.load_policy, not {describe(self.policy)}",
        )
        require(
            self.policy is not None or not self.sample,
            "sample needs a policy, so name its file",
        )
        known = f"{', '.join(REEDITS[:-1])} or {REEDITS[-1]}"
        require(self.reedit in REEDITS, f"reedit must be {known}, not {self.reedit!r}")
        require(
            self.reedit != "always" or not (isinstance(self.policy, Policy) or self.synchronous),
            'reedit "always" takes no steps, so leave out step-size policies and synchronous',
        )
        require(
            not isinstance(self.policy, EntryPolicy)
            or self.reedit == "always"
            or (self.reedit == "confidence" and self.reedit_margin is None),
            "an entry policy needs reedit=always, or reedit_margin=none",
        )
        require(
            self.factor is None
            or (self.reedit == "always" and self.jump is None and self.policy is None),
            "factor needs reedit=always, and takes the place of jump and of a policy",
        )
        require(
            self.left == 0 or (self.reedit == "always" and self.policy is None),
            "left needs reedit=always, and no policy",
        )
        require(self.least_passes >= 1, f"least_passes must be at least 1, not {self.least_passes}")
        check_ranges(self, power=math.inf, jump=1.0, creep=1.0, reedit_margin=math.inf, settled=1.0)
        check_ranges(self, reedit_above=1.0, sure=1.0, floor=1.0, replace_above=1.0)
        check_ranges(self, factor=math.inf, left=math.inf)

    @property
    def needs_keys(self) -> bool:
        """True if steps are drawn from the policy."""
        return self.sample

    @property
    def revises(self) -> bool:
        """True if positions at t = 1 can be re-edited."""
        if self.reedit == "confidence":
            return self.reedit_margin is not None and self.revise_committed
        return self.reedit == "always" or self.revise_committed

    def init_memory(self, batch: int, canvas: int) -> revision.Revision | None:
        """Returns the memory before the first step, if the rule counts passes."""
        counts = self.reedit == "always" or self.least_passes > 1
        return revision.Revision.first(batch) if counts else None

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at positions that another step could still change."""
        if self.reedit == "always":
            return revision.is_open(state)
        below = state.t < self.settled
        return below if state.memory is None else below | ~state.memory.over[:, None]

    def fixed_step(self, c: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the step fraction without a policy, from the confidence alone."""
        if self.jump is not None:
            return jnp.where(c > self.jump, 1.0, self.creep)
        return jnp.clip(c**self.power, A_MIN, 1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Returns step fractions, resets and the hard commitment (Eqs. 5-10)."""
        if self.reedit == "always":
            return self._reedit_all(belief, state, step)
        c, t, notes = belief.confidence, state.t, None
        if isinstance(self.policy, EntryPolicy):
            enters, notes = self._entries(belief, state, step)
            memory = self._count_pass(state, step, enters)
            return dataclasses.replace(Action.unmask(enters), notes=notes, memory=memory)
        if self.synchronous:
            a = jnp.broadcast_to(1.0 / step.steps_left, t.shape)
        elif self.policy is not None:
            s = self.policy.observe(belief, t, step)
            if self.sample:
                y, a, log_prob = jax.vmap(self.policy.sample)(step.keys, s)
                notes = {"features": s, "y": y, "log_prob": log_prob, "tokens": state.tokens}
            else:
                a = self.policy.expected_step(s)
        else:
            a = self.fixed_step(c)
        reset = self._resets(belief, state, step)
        commit = jnp.zeros_like(step.candidates)
        if self.commit:
            after = jnp.where(reset, c, t + a * (1 - t))
            commit = select_highest(c, step.candidates & (after < SETTLED), 1)
        if notes is not None:
            notes["acted"] = step.candidates & (t < 1) & ~reset
        moves = step.candidates & ((t < 1) | reset) & (belief.tokens != state.tokens)
        memory = self._count_pass(state, step, moves)
        return Action(a, reset, commit, notes, None, memory, self.rescale, self.expected)

    def _count_pass(
        self, state: DecodeState, step: Step, moves: Bool[Array, "B N"]
    ) -> revision.Revision | None:
        """Counts a pass in which some positions move."""
        if state.memory is None:
            return None
        return state.memory.after(step, moves, self.least_passes)

    def _resets(self, belief: Belief, state: DecodeState, step: Step) -> Bool[Array, "B N"]:
        """Selects the positions to re-edit by confidence or by disagreement."""
        c, t = belief.confidence, state.t
        if self.reedit == "disagreement":
            differs = (t >= self.reedit_above) & (belief.tokens != state.tokens)
            reset = step.candidates & differs & (c > self.reedit_above)
        elif self.reedit_margin is not None:
            reset = step.candidates & (c - t < -self.reedit_margin)
        else:
            return jnp.zeros_like(step.candidates)
        return reset if self.revise_committed else reset & (t < 1)

    def _entries(
        self, belief: Belief, state: DecodeState, step: Step
    ) -> tuple[Bool[Array, "B N"], dict[str, Array] | None]:
        """Selects the masks that enter, with the notes of a sampled step."""
        c, masked = belief.confidence, step.candidates & (state.t == 0)
        if not isinstance(self.policy, EntryPolicy):
            c = c * chance_before(c, masked) ** self.left
            if self.factor is not None:
                return select_within_factor(c, masked, self.factor), None
            above = ENTRY if self.jump is None else self.jump
            return masked & (c > above) | select_highest(c, masked, 1), None
        s = self.policy.observe(belief, state.t, step)
        score = self.policy.expected_step(s)
        if self.sample:
            enters = self.policy.draw(step.keys, s)
        else:
            enters = score > (self.policy.above if self.jump is None else self.jump)
        enters = masked & enters | select_highest(score, masked, 1)
        if not self.sample:
            return enters, None
        y = enters.astype(jnp.float32)  # the surest mask enters in any case, and counts as drawn
        notes = {"features": s, "y": y, "log_prob": self.policy.log_prob(s, y)}
        return enters, notes | {"tokens": state.tokens, "acted": masked}

    def _reedit_all(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Re-edits all that has entered, and lets further masks enter."""
        enters, notes = self._entries(belief, state, step)
        action = revision.reedit_all(
            belief,
            state,
            step,
            enters,
            self.sure,
            self.least_passes,
            self.rescale,
            self.expected,
            floor=self.floor,
            replace_above=self.replace_above,
        )
        return dataclasses.replace(action, notes=notes)
