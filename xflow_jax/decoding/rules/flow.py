"""x-prediction flow decoding, the method itself, as a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

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
from xflow_jax.errors import describe, require
from xflow_jax.types import Array, Float

A_MIN = 1 / 256


@struct.dataclass
class Flow(TokenConstraints):
    """x-prediction flow decoding (Eqs. 4-10).

    Attributes:
        policy: trained step-size policy. Without one, a = c ** power, or with `jump`, a = 1 at
            c > jump and a = creep elsewhere.
        power: exponent of the fixed rule.
        jump: confidence above which a position goes all the way, or None.
        creep: step of the other positions with `jump`.
        revise_committed: re-edit positions at t = 1 too.
        reedit_margin: how far confidence may fall behind progress before a position is re-edited
            (Eq. 10), or None for no re-editing.
        commit: commit one position per sequence and step, whatever its step fraction.
        synchronous: one shared step a = 1 / (steps left), as in image diffusion.
        suppress_mask: predict neither the mask token nor a row without a token.
        early_exit: skip the steps left in a block once all its positions reach `settled`. The last
            predictions then stand.
        settled: progress from which a position is no longer open.
        sample: draw steps from the policy instead of taking their expectation. The draws are in
            the trace's notes (training/rollout.py).

    Raises:
        UserError: if a number is out of range, or if `sample` is set without a policy.
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
        # JAX builds trees with other leaves than policies, so only known mistakes are refused.
        require(
            not isinstance(self.policy, str | Path | Mapping | type),
            f"policy must be a policy from xflow_jax.load_policy, not {describe(self.policy)}",
        )
        require(
            self.policy is not None or not self.sample,
            "sample needs a policy, so name its file",
        )
        check_ranges(self, power=math.inf, jump=1.0, creep=1.0, reedit_margin=math.inf, settled=1.0)

    @property
    def needs_keys(self) -> bool:
        """True if steps are drawn from the policy."""
        return self.sample

    @property
    def revises(self) -> bool:
        """True if positions at t = 1 can be re-edited."""
        return self.reedit_margin is not None and self.revise_committed

    def fixed_step(self, c: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the step fraction without a policy, from the confidence alone."""
        if self.jump is not None:
            return jnp.where(c > self.jump, 1.0, self.creep)
        return jnp.clip(c**self.power, A_MIN, 1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Returns step fractions, resets and the hard commitment (Eqs. 5-10)."""
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
