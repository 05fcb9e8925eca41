"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.policy import Policy, features
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    check_ranges,
    select_highest,
    static_field,
)
from xflow_jax.decoding.state import SETTLED, DecodeState, Step
from xflow_jax.errors import require

A_MIN = 1 / 256


@struct.dataclass
class Flow(TokenConstraints):
    """x-prediction flow decoding (Eqs. 4-10), the method itself.

    policy: the trained step-size policy, in its expectation or, with `sample`, drawn from (what was drawn goes into the
    trace's notes: see rollout.py). Without one a = c ** power, or, with `jump`, a = 1 where c > jump and a = creep
    elsewhere. revise_committed: positions at t = 1 are re-edited, too. reedit_margin: how far
    confidence may fall behind progress; None: no re-editing. commit: one hard commitment per sequence and step.
    synchronous: one shared step, a = 1 / (steps left), as image diffusion has it. early_exit: skip the steps left in a
    block once all its positions have a progress of at least `settled`; the last predictions then stand. UserError where
    a number is out of range.
    """

    policy: Policy | None = None
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

    def __post_init__(self) -> None:
        require(
            self.policy is not None or not self.sample,
            "only a policy can be sampled from; name its file",
        )
        check_ranges(self, power=math.inf, jump=1.0, creep=1.0, reedit_margin=math.inf, settled=1.0)

    @property
    def needs_keys(self) -> bool:
        """Whether anything is drawn at random."""
        return self.sample

    def fixed_step(self, c: jax.Array) -> jax.Array:
        """The step fraction of the rule without a policy, from the confidence alone."""
        if self.jump is not None:
            return jnp.where(c > self.jump, 1.0, self.creep)
        return jnp.clip(c**self.power, A_MIN, 1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Eqs. 5-10 and the hard commitment."""
        c, t, notes = belief.confidence, state.t, None
        if self.synchronous:
            a = jnp.broadcast_to(1.0 / step.steps_left, t.shape)
        elif self.policy is not None:
            s = features(belief.top, t, step.rho)
            if self.sample:
                y, a, log_prob = jax.vmap(self.policy.sample)(step.keys, s)
                notes = {"features": s, "y": y, "log_prob": log_prob, "tokens": state.tokens}
            else:
                a = self.policy.expected_step(s)
        else:
            a = self.fixed_step(c)
        reset = jnp.zeros_like(step.candidates)
        if self.reedit_margin is not None:
            reset = step.candidates & (c - t < -self.reedit_margin)
            if not self.revise_committed:
                reset &= t < 1
        commit = jnp.zeros_like(step.candidates)
        if self.commit:
            after = jnp.where(reset, c, t + a * (1 - t))
            commit = select_highest(c, step.candidates & (after < SETTLED), 1)
        if notes is not None:
            notes["acted"] = step.candidates & (t < 1) & ~reset
        return Action(a, reset, commit, notes)
