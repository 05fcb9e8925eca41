"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.belief import Belief, BeliefOptions
from xflow_jax.policy import Policy, features
from xflow_jax.strict import require

if TYPE_CHECKING:
    from xflow_jax.decode import DecodeState, Step

Rule = Any  # a frozen dataclass that is called with (belief, state, step) and answers with an Action; see Threshold

SETTLED = 0.99  # progress from which a position counts as decided
A_MIN = 1 / 256


def static(default: Any, **more: Any) -> Any:
    return struct.field(pytree_node=False, default=default, **more)


def within(rule: Any, **largest: float) -> None:
    """Refuses a rule of which a number is neither None nor between 0 and its largest."""
    for name, top in largest.items():
        value = getattr(rule, name)
        bounds = "at least 0" if math.isinf(top) else f"between 0 and {top:g}"
        require(value is None or 0 <= value <= top, f"{name} must be {bounds}, not {value}")


@struct.dataclass
class Action:
    """What a rule does with every response position; all [B, N].

    a float32: the fraction of the remaining way to go, 0 ... 1 (Eq. 7). reset bool: go to c x_pred + (1 - c) m and
    t = c instead (re-editing, Eq. 10). commit bool: go all the way, whatever a says; with reset, also where t is 1: the
    token there is replaced. notes: what the rule wants kept of the step, a tree of arrays [B, ...] (Settings.notes).
    mixture float32 [B, N, 4]: what is not at t = 1 after the step is fed in as the embeddings of the likeliest tokens
    with these weights and m with the rest, while t stays. memory: the new DecodeState.memory (None: it stays).
    """

    a: jax.Array
    reset: jax.Array
    commit: jax.Array
    notes: Any = None
    mixture: jax.Array | None = None
    memory: Any = None

    @classmethod
    def unmask(cls, chosen: jax.Array) -> Action:
        """The action of a decoder that either writes a token or leaves the mask: a step of 1 where chosen."""
        no = jnp.zeros_like(chosen)
        return cls(chosen.astype(jnp.float32), no, no)


def highest(score: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """bool [B, N]: the `count` (a scalar or [B, 1]) highest scores [B, N] of each row `among` those allowed.

    Lowest index first where scores are equal; all of them where fewer are allowed.
    """
    rank = jnp.sum(ahead(score, among), axis=-1)  # counted: sorting is slow in every compiler, and N is small
    return among & (rank < count)


def at_least(scheduled: jax.Array, sure: jax.Array, quota: jax.Array) -> jax.Array:
    """bool [B, N], LLaDA2.0's choice: a row's `sure` ones where they are at least `quota`, else the `scheduled`."""
    return jnp.where(jnp.sum(sure, axis=-1, keepdims=True) >= quota, sure, scheduled)


def certainty(belief: Belief, order: str) -> jax.Array:
    """float32 [B, N]: by what masks are ordered, highest first: "confidence", "entropy" or "margin" (p1 - p2)."""
    if order == "entropy":
        return -belief.entropy
    return belief.top[..., 0] - belief.top[..., 1] if order == "margin" else belief.confidence


def ahead(score: jax.Array, among: jax.Array) -> jax.Array:
    """bool [B, N, N]: at [b, i, j], whether j is one `among` those allowed and comes before i in descending `score`."""
    mine, other = score[:, :, None], score[:, None, :]
    index = jnp.arange(score.shape[1])
    earlier = index[None, None, :] < index[None, :, None]
    return among[:, None, :] & ((other > mine) | ((other == mine) & earlier))


@functools.partial(struct.dataclass, kw_only=True)
class Speech:
    """What a rule lets the model say: options that all rules share.

    suppress_mask: neither the mask token nor a row without a token is predicted. logits_eos_inf: EOS is never
    predicted. confidence_eos_eot_inf: EOS and EoT may be predicted, but with confidence 0.
    """

    suppress_mask: bool = static(False)
    logits_eos_inf: bool = static(False)
    confidence_eos_eot_inf: bool = static(False)

    def belief_options(self, config: Any, eot_id: int | None) -> BeliefOptions:
        """What the rule asks of the belief."""
        never = (config.eos_id,) if self.logits_eos_inf else ()
        doubted = tuple(i for i in (config.eos_id, eot_id) if i is not None) if self.confidence_eos_eot_inf else ()
        if not self.suppress_mask:
            return BeliefOptions(never, doubted)
        return BeliefOptions((*never, config.mask_id), doubted, config.vocab_size)


@struct.dataclass
class Flow(Speech):
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
    power: float = static(2.0)
    jump: float | None = static(None)
    creep: float = static(0.1)
    revise_committed: bool = static(True)
    reedit_margin: float | None = static(0.1)
    commit: bool = static(True)
    synchronous: bool = static(False)
    suppress_mask: bool = static(True, kw_only=True)
    early_exit: bool = static(False)
    settled: float = static(SETTLED)
    sample: bool = static(False)

    def __post_init__(self) -> None:
        require(self.policy is not None or not self.sample, "only a policy can be sampled from; name its file")
        within(self, power=math.inf, jump=1.0, creep=1.0, reedit_margin=math.inf, settled=1.0)

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
            commit = highest(c, step.candidates & (after < SETTLED), 1)
        if notes is not None:
            notes["acted"] = step.candidates & (t < 1) & ~reset
        return Action(a, reset, commit, notes)


@struct.dataclass
class MaskPrediction(Speech):
    """The standard decoder of LLaDA (ML-GSAI/LLaDA, generate.py) and, with `threshold`, of LLaDA2.0.

    order: which masked positions are written first: "confidence", "random", "entropy" (lowest first) or "margin"
    (largest p1 - p2). temperature: of the Gumbel noise when choosing tokens; the confidence stays the one without it.
    cfg_scale: classifier-free guidance w. threshold: all positions above it are written when they are at least the
    scheduled number, else the scheduled number; blocks then end as soon as they hold no mask. The mask token and unused
    rows are left alone unless told, as in the official code. UserError for an unknown order and where a number is out
    of range.
    """

    order: str = static("confidence")
    temperature: float = static(0.0)
    cfg_scale: float = static(0.0)
    threshold: float | None = static(None)

    def __post_init__(self) -> None:
        orders = ("confidence", "random", "entropy", "margin")
        require(self.order in orders, f"order must be {', '.join(orders[:-1])} or {orders[-1]}, not {self.order!r}")
        within(self, temperature=math.inf, cfg_scale=math.inf, threshold=1.0)

    @property
    def early_exit(self) -> bool:
        """Whether forward passes that can change nothing are skipped unless the caller says otherwise."""
        return self.threshold is not None

    @property
    def needs_keys(self) -> bool:
        """Whether anything is drawn at random."""
        return self.order == "random" or self.temperature > 0

    def belief_options(self, config: Any, eot_id: int | None) -> BeliefOptions:
        """What the rule asks of the belief, with the noise and the guidance."""
        asked = Speech.belief_options(self, config, eot_id)  # flax makes the class anew, and super() the old one
        return dataclasses.replace(asked, temperature=self.temperature, guidance=self.cfg_scale)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on the scheduled number of masked positions."""
        masked = step.candidates & (state.t < 1)
        if self.order == "random":
            # A key of its own: the noise on the logits uses the step's key itself.
            score = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), masked.shape[1:]))(step.keys)
        else:
            score = certainty(belief, self.order)
        chosen = highest(score, masked, step.quota)
        if self.threshold is not None:
            chosen = at_least(chosen, masked & (belief.confidence > self.threshold), step.quota)
        return Action.unmask(chosen)


@struct.dataclass
class Threshold(Speech):
    """Fast-dLLM's confidence-aware decoding: every masked position with c >= tau, at least the surest one."""

    tau: float = static(0.9)
    early_exit: bool = static(True)
    needs_keys: bool = static(False)

    def __post_init__(self) -> None:
        within(self, tau=1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 where the confidence reaches tau."""
        masked = step.candidates & (state.t < 1)
        best = highest(belief.confidence, masked, 1)
        return Action.unmask((masked & (belief.confidence >= self.tau)) | best)
