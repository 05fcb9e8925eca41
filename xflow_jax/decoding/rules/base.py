"""Protocol of a decoding rule, its action, and shared helpers.

A rule is a frozen dataclass. It receives the belief, the state before the step and a slice of the
schedule, and returns an Action: how far each position moves. Mask prediction, threshold decoding
and their like are rules that only take steps of 0 or 1.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief, BeliefOptions
from xflow_jax.decoding.state import SETTLED, DecodeState, Step
from xflow_jax.errors import require
from xflow_jax.types import Array, Bool, Float, Int, ModelConfig

T = TypeVar("T")


@runtime_checkable
class Rule(Protocol):
    """Strategy of a decode: a frozen dataclass, hashable unless it holds arrays.

    Attributes:
        early_exit: skip passes of blocks without open positions, unless the caller says otherwise.
        settled: progress from which a position is no longer open.
        needs_keys: True if the rule draws random numbers from step.keys.
        revises: True if the rule can change a token after its position reached t = 1.
    """

    @property
    def early_exit(self) -> bool: ...
    @property
    def settled(self) -> float: ...
    @property
    def needs_keys(self) -> bool: ...
    @property
    def revises(self) -> bool: ...

    def belief_options(self, config: ModelConfig, eot_id: int | None) -> BeliefOptions:
        """Returns the constraints, noise and guidance of the belief."""
        ...

    def init_memory(self, batch: int, canvas: int) -> Any:
        """Returns the first memory, a tree of arrays [B, ...], or None."""
        ...

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at positions that another step could still change."""
        ...

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Returns how far each position moves in this step."""
        ...


def static_field(default: T, **options: bool) -> T:
    """Declares an option that is part of the compiled program.

    Args:
        default: value of the option.
        **options: of dataclasses.field, such as kw_only. Left out, those of the class hold.
    """
    return struct.field(pytree_node=False, default=default, **options)


def check_ranges(rule: Rule, **largest: float) -> None:
    """Raises UserError unless each option is None or in its range.

    The range is from 0 to the given value.
    """
    for name, top in largest.items():
        value = getattr(rule, name)
        bounds = "at least 0" if math.isinf(top) else f"between 0 and {top:g}"
        require(value is None or 0 <= value <= top, f"{name} must be {bounds}, not {value}")


@struct.dataclass
class Action:
    """Moves of one step, arrays [B, N] unless stated otherwise.

    Attributes:
        a: fraction of the remaining way, float32 in [0, 1] (Eq. 7).
        reset: True where the position is re-edited: x = c x_pred + (1 - c) m and t = c (Eq. 10).
        commit: True where the position goes all the way, whatever `a` is. Together with `reset`
            it replaces a token at t = 1.
        notes: what a trace keeps of the step, a tree of arrays [B, ...] (DecodeConfig.notes).
        mixture: float32 [B, N, 4]. Positions below t = 1 after the step get as x the embeddings of
            the four likeliest tokens with these weights, and m with the rest. t stays.
        memory: the new DecodeState.memory, or None to keep it.
        remask: True where the position becomes a mask again: x = m and t = 0. Or None.
        rescale: give the x of re-edited positions the length c |x_pred| + (1 - c) |m|, since a
            mixture of two vectors is shorter than the mean of their lengths.
        expected: below t = 1, x_pred is the mean embedding of the four likeliest tokens, with
            renormalised probabilities, instead of the likeliest one's.
        floor: least progress of re-edited positions. Where c is below it, it replaces c. Or None.
    """

    a: jax.Array
    reset: jax.Array
    commit: jax.Array
    notes: Any = None
    mixture: jax.Array | None = None
    memory: Any = None
    rescale: bool = static_field(False)
    expected: bool = static_field(False)
    remask: jax.Array | None = None
    floor: jax.Array | None = None

    @classmethod
    def unmask(cls, chosen: Bool[Array, "B N"]) -> Action:
        """Returns the action that commits the chosen positions and leaves the others."""
        no = jnp.zeros_like(chosen)
        return cls(chosen.astype(jnp.float32), no, no)


class RuleDefaults:
    """Defaults for parts of the Rule protocol that few rules need."""

    @property
    def early_exit(self) -> bool:
        """Returns False: every step is taken."""
        return False

    @property
    def settled(self) -> float:
        """Returns the usual progress from which a position is decided."""
        return SETTLED

    @property
    def needs_keys(self) -> bool:
        """Returns False: nothing is drawn at random."""
        return False

    @property
    def revises(self) -> bool:
        """Returns False: a token at t = 1 stays."""
        return False

    def init_memory(self, batch: int, canvas: int) -> Any:
        """Returns None: nothing is kept from step to step."""
        return None

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at positions whose progress is below `settled`."""
        return state.t < self.settled


@struct.dataclass(kw_only=True)
class TokenConstraints(RuleDefaults):
    """Base class with options on the tokens that may be predicted.

    Attributes:
        suppress_mask: predict neither the mask token nor a row of the head without a token.
        logits_eos_inf: never predict EOS.
        confidence_eos_eot_inf: predict EOS and EoT with confidence 0.
    """

    suppress_mask: bool = static_field(False)
    logits_eos_inf: bool = static_field(False)
    confidence_eos_eot_inf: bool = static_field(False)

    def belief_options(self, config: ModelConfig, eot_id: int | None) -> BeliefOptions:
        """Returns the constraints of the belief."""
        never = (config.eos_id,) if self.logits_eos_inf else ()
        doubted: tuple[int, ...] = ()
        if self.confidence_eos_eot_inf:
            doubted = tuple(i for i in (config.eos_id, eot_id) if i is not None)
        if not self.suppress_mask:
            return BeliefOptions(never, doubted)
        return BeliefOptions((*never, config.mask_id), doubted, config.vocab_size)


def select_highest(
    score: Float[Array, "B N"], among: Bool[Array, "B N"], count: Int[Array, ...] | int
) -> Bool[Array, "B N"]:
    """Selects the highest scores of each row.

    Args:
        score: larger is better.
        among: positions that may be selected.
        count: how many to select, a scalar or [B, 1].

    Returns:
        True at `count` positions of each row, or at all allowed ones if there are fewer. Among
        equal scores the lowest index comes first.
    """
    # Ranks are counted, since sorting is slow in every compiler and N is small.
    rank = jnp.sum(ranks_before(score, among), axis=-1)
    return among & (rank < count)


def select_within_factor(
    confidence: Float[Array, "B N"], among: Bool[Array, "B N"], factor: Float[Array, ...] | float
) -> Bool[Array, "B N"]:
    """Selects the surest positions by the bound of Fast-dLLM (arXiv:2505.22618).

    Args:
        confidence: confidence of each position.
        among: positions that may be selected.
        factor: the bound, a scalar or [B, 1].

    Returns:
        True at the n highest confidences of each row, for the largest n with
        (n + 1)(1 - c(n)) < factor and at least 1. c(n) is the n-th highest confidence.
    """
    rank = 1 + jnp.sum(ranks_before(confidence, among), axis=-1)
    meets = among & ((rank + 1) * (1 - confidence) < factor)
    count = jnp.max(jnp.where(meets, rank, 1), axis=-1, keepdims=True)
    return among & (rank <= count)


def chance_before(
    confidence: Float[Array, "B N"], among: Bool[Array, "B N"]
) -> Float[Array, "B N"]:
    """Returns the product of the allowed confidences before each position."""
    factors = jnp.where(among, confidence, 1.0)
    shifted = jnp.pad(factors[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
    return jnp.cumprod(shifted, axis=-1)


def quota_or_confident(
    scheduled: Bool[Array, "B N"], confident: Bool[Array, "B N"], quota: Int[Array, ...]
) -> Bool[Array, "B N"]:
    """Selects confident positions if they fill the quota, else the scheduled ones.

    This is the choice of LLaDA2.0's decoder. The quota is a scalar or [B, 1].
    """
    enough = jnp.sum(confident, axis=-1, keepdims=True) >= quota
    return jnp.where(enough, confident, scheduled)


def order_score(belief: Belief, order: str) -> Float[Array, "B N"]:
    """Returns the score by which masks are ordered, highest first.

    Args:
        belief: predictions of the step.
        order: "confidence", "entropy" (lowest first) or "margin" (p1 - p2).
    """
    if order == "entropy":
        return -belief.entropy
    return belief.top[..., 0] - belief.top[..., 1] if order == "margin" else belief.confidence


def ranks_before(score: Float[Array, "B N"], among: Bool[Array, "B N"]) -> Bool[Array, "B N N"]:
    """Compares positions by descending score.

    Returns:
        At [b, i, j], True if j is allowed and comes before i. Of equal scores the lower index
        comes first.
    """
    mine, other = score[:, :, None], score[:, None, :]
    index = jnp.arange(score.shape[1])
    earlier = index[None, None, :] < index[None, :, None]
    return among[:, None, :] & ((other > mine) | ((other == mine) & earlier))
