"""Decoders of the field as rules on the same flow.

They differ in the masks that they write in a step. Each names its source. A decoder without a
schedule of its own writes at least the first mask of its order in every step. Steps that remain
after everything is written are skipped.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import TOP, Belief
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    check_ranges,
    order_score,
    quota_or_confident,
    ranks_before,
    select_highest,
    static_field,
)
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.errors import require
from xflow_jax.types import Array, Bool, Float, Int


@struct.dataclass
class Threshold(TokenConstraints):
    """Confidence-aware decoding of Fast-dLLM (arXiv:2505.22618).

    Writes every mask with confidence of at least tau, and at least the most confident one.

    Attributes:
        tau: confidence threshold, in [0, 1].
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: if tau is out of range.
    """

    tau: float = static_field(0.9)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits masks whose confidence reaches tau."""
        masked = step.candidates & (state.t < 1)
        best = select_highest(belief.confidence, masked, 1)
        return Action.unmask((masked & (belief.confidence >= self.tau)) | best)


@struct.dataclass
class Factor(TokenConstraints):
    """Factor-based decoding of Fast-dLLM (arXiv:2505.22618).

    Writes the n most confident masks, for the largest n with (n + 1)(1 - c(n)) < factor. c(n) is
    the n-th highest confidence. The bound comes from the paper's theorem on when parallel and
    sequential greedy decoding agree.

    Attributes:
        factor: the bound, at least 0.
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: if the factor is negative.
    """

    factor: float = static_field(1.0)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, factor=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the longest prefix whose last member meets the bound."""
        masked = step.candidates & (state.t < 1)
        # Rank of each mask by confidence, counted from 1.
        rank = 1 + jnp.sum(ranks_before(belief.confidence, masked), axis=-1)
        meets = masked & ((rank + 1) * (1 - belief.confidence) < self.factor)
        count = jnp.max(jnp.where(meets, rank, 1), axis=-1, keepdims=True)
        return Action.unmask(masked & (rank <= count))


@struct.dataclass
class EntropyBounded(TokenConstraints):
    """Entropy-bounded sampler (arXiv:2505.24857).

    Writes the longest prefix of masks, by ascending entropy H, with sum H - max H <= gamma. The
    difference bounds, in nats, how much the tokens of the prefix can depend on each other.

    Attributes:
        gamma: the bound in nats, at least 0.
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: if gamma is negative.
    """

    gamma: float = static_field(0.1)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, gamma=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the longest prefix that meets the bound."""
        masked = step.candidates & (state.t < 1)
        # The last member of a prefix is its maximum, so the sum is over those before it.
        before = ranks_before(-belief.entropy, masked)
        spent = jnp.sum(jnp.where(before, belief.entropy[:, None, :], 0.0), axis=-1)
        return Action.unmask(masked & (spent <= self.gamma))


@struct.dataclass
class Klass(TokenConstraints):
    """KLASS (arXiv:2511.05664): writes masks whose belief is confident and stable.

    A belief is stable if KL(p now || p before) < epsilon in each of the last `history` steps of its
    block. A row without such masks writes the scheduled number by confidence. The divergence is
    over five classes: the four likeliest tokens of now, and all others as one. A token that was not
    among the four likeliest before counts with the fourth's probability, its upper bound.

    Attributes:
        tau: confidence threshold, in [0, 1].
        epsilon: largest divergence of a stable step, in nats.
        history: stable steps that are needed.
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: if a number is out of range.
    """

    tau: float = static_field(0.9)
    epsilon: float = static_field(0.01)
    history: int = static_field(2)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0, epsilon=math.inf, history=math.inf)

    def init_memory(self, batch: int, canvas: int) -> dict[str, jax.Array]:
        """Returns the previous belief, zero at first, and a count."""
        return {
            "top": jnp.zeros((batch, canvas, TOP)),
            "top_tokens": jnp.zeros((batch, canvas, TOP), jnp.int32),
            "stable": jnp.zeros((batch, canvas), jnp.int32),
        }

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits masks with a confident and stable belief."""
        memory, here = state.memory, step.candidates
        still = top_divergence(belief, memory["top"], memory["top_tokens"]) < self.epsilon
        stable = jnp.where(here & still & (memory["top"][..., 0] > 0), memory["stable"] + 1, 0)
        now = {"top": belief.top, "top_tokens": belief.top_tokens}
        # Only the active block's beliefs are kept, since with a cache there are no others.
        now = {name: jnp.where(here[..., None], x, memory[name]) for name, x in now.items()}
        masked = here & (state.t < 1)
        ready = masked & (belief.confidence > self.tau) & (stable >= self.history)
        scheduled = select_highest(belief.confidence, masked, jnp.maximum(step.quota, 1))
        chosen = jnp.where(jnp.any(ready, axis=-1, keepdims=True), ready, scheduled)
        return dataclasses.replace(Action.unmask(chosen), memory={**now, "stable": stable})


def top_divergence(
    belief: Belief, top: Float[Array, "B N 4"], top_tokens: Int[Array, "B N 4"]
) -> Float[Array, "B N"]:
    """Computes KL(p now || p before) in nats.

    The classes are the four likeliest tokens of now, and all others as one.

    Args:
        belief: predictions of this step.
        top: the four largest probabilities of the step before.
        top_tokens: their tokens.
    """
    same = belief.top_tokens[..., :, None] == top_tokens[..., None, :]
    known = jnp.sum(jnp.where(same, top[..., None, :], 0.0), axis=-1)
    before = jnp.where(jnp.any(same, axis=-1), known, top[..., -1:])

    def term(p: Array, q: Array) -> Array:
        ratio = jnp.log(jnp.maximum(p, 1e-12)) - jnp.log(jnp.maximum(q, 1e-12))
        return jnp.where(p > 0, p * ratio, 0.0)

    rest = jnp.maximum(1 - belief.top.sum(-1), 0.0), jnp.maximum(1 - before.sum(-1), 0.0)
    return jnp.sum(term(belief.top, before), axis=-1) + term(*rest)


@struct.dataclass
class SoftMask(TokenConstraints):
    """Soft-masking (arXiv:2510.17206) on mask prediction.

    Masks that stay are fed to the model as (1 - l) m + l sum p W_in, over the `likeliest` k tokens
    with renormalised p, with l = scale * sigmoid(steepness * (-H - offset)). The paper learns the
    three numbers with the model. The defaults here are plausible values for a model that was not
    trained on such inputs.

    Attributes:
        order: order in which masks are written: "confidence", "entropy" or "margin".
        likeliest: k, from 1 to 4.
        scale: largest share of the tokens, in [0, 1].
        steepness, offset: of the sigmoid over the entropy in nats.
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: for an unknown order, or a number out of range.
    """

    order: str = static_field("confidence")
    likeliest: int = static_field(3)
    scale: float = static_field(0.5)
    steepness: float = static_field(1.0)
    offset: float = static_field(-1.0)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        orders = ("confidence", "entropy", "margin")
        require(
            self.order in orders,
            f"order must be confidence, entropy or margin, not {self.order!r}",
        )
        require(
            1 <= self.likeliest <= TOP,
            f"likeliest must be between 1 and {TOP}, not {self.likeliest}",
        )
        require(math.isfinite(self.offset), f"offset must be a finite number, not {self.offset}")
        check_ranges(self, scale=1.0, steepness=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the scheduled number, and mixes the other inputs."""
        masked = step.candidates & (state.t < 1)
        chosen = select_highest(order_score(belief, self.order), masked, step.quota)
        p = jnp.where(jnp.arange(TOP) < self.likeliest, belief.top, 0.0)
        share = self.scale * jax.nn.sigmoid(self.steepness * (-belief.entropy - self.offset))
        mixture = share[..., None] * p / p.sum(-1, keepdims=True)
        return dataclasses.replace(Action.unmask(chosen), mixture=mixture)


@struct.dataclass
class Editing(TokenConstraints):
    """Token editing of LLaDA2.1 (arXiv:2602.08676).

    Masks are written by LLaDA2.0's rule: all with c > tau if they are at least the scheduled
    number, else the scheduled number. A written token is replaced if another one has c > tau_edit.
    Steps are skipped once everything is written and a step changed nothing.

    Attributes:
        tau: threshold for masks. 0.7 is the paper's quality mode, 0.5 its fast mode.
        tau_edit: threshold for written tokens. 0.5 in quality mode, 0 in fast mode.
        early_exit: skip steps that can change nothing.

    Raises:
        UserError: if a number is out of range.
    """

    tau: float = static_field(0.7)
    tau_edit: float = static_field(0.5)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0, tau_edit=1.0)

    @property
    def revises(self) -> bool:
        """Returns True: written tokens are replaced."""
        return True

    def init_memory(self, batch: int, canvas: int) -> Bool[Array, " B"]:
        """Returns whether a row's last step changed anything."""
        return jnp.zeros(batch, bool)

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at masks, and everywhere after a step that changed something."""
        return (state.t < 1) | state.memory[:, None]

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits masks, and replaces tokens by a committed reset."""
        c, written = belief.confidence, step.candidates & (state.t >= 1)
        masked = step.candidates & (state.t < 1)
        scheduled = select_highest(c, masked, step.quota)
        chosen = quota_or_confident(scheduled, masked & (c > self.tau), step.quota)
        replaced = written & (belief.tokens != state.tokens) & (c > self.tau_edit)
        changed = jnp.any(chosen | replaced, axis=-1)
        return Action(chosen.astype(jnp.float32), replaced, replaced, memory=changed)
