"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

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


@struct.dataclass
class Threshold(TokenConstraints):
    """Fast-dLLM's confidence-aware decoding: every masked position with c >= tau, at least the surest one."""

    tau: float = static_field(0.9)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 where the confidence reaches tau."""
        masked = step.candidates & (state.t < 1)
        best = select_highest(belief.confidence, masked, 1)
        return Action.unmask((masked & (belief.confidence >= self.tau)) | best)


@struct.dataclass
class Factor(TokenConstraints):
    """Fast-dLLM's factor-based decoding (arXiv:2505.22618): the n surest masks, for the largest n with
    (n + 1)(1 - c(n)) < factor, c(n) being the n-th highest confidence.

    The bound comes from its theorem on when parallel and sequential greedy decoding agree. UserError for a factor
    below 0.
    """

    factor: float = static_field(1.0)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        check_ranges(self, factor=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on the longest prefix, in order of confidence, whose last member meets the bound."""
        masked = step.candidates & (state.t < 1)
        number = 1 + jnp.sum(
            ranks_before(belief.confidence, masked), axis=-1
        )  # n, from 1, of each mask
        meets = masked & ((number + 1) * (1 - belief.confidence) < self.factor)
        most = jnp.max(jnp.where(meets, number, 1), axis=-1, keepdims=True)
        return Action.unmask(masked & (number <= most))


@struct.dataclass
class EntropyBounded(TokenConstraints):
    """The EB-sampler (arXiv:2505.24857): masks in ascending order of entropy H, the longest prefix with
    sum H - max H <= gamma.

    That difference bounds, in nats, how much the prefix's tokens can depend on each other. UserError for a gamma below
    0.
    """

    gamma: float = static_field(0.1)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        check_ranges(self, gamma=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on that prefix; its last member is its maximum, so the sum is over those before it."""
        masked = step.candidates & (state.t < 1)
        before = ranks_before(-belief.entropy, masked)
        spent = jnp.sum(jnp.where(before, belief.entropy[:, None, :], 0.0), axis=-1)
        return Action.unmask(masked & (spent <= self.gamma))


@struct.dataclass
class Klass(TokenConstraints):
    """KLASS (arXiv:2511.05664): masks with c > tau whose belief has been stable, KL(p now || p before) < epsilon, in
    each of the last `history` steps of their block; where a row has none, the scheduled number by confidence.

    The divergence is over five classes, the four likeliest tokens of now and all others as one: what was not among the
    four likeliest before is taken to have had the fourth's probability, the most that it can have had. UserError where
    a number is out of range.
    """

    tau: float = static_field(0.9)
    epsilon: float = static_field(0.01)
    history: int = static_field(2)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0, epsilon=math.inf, history=math.inf)

    def init_memory(self, batch: int, canvas: int) -> dict[str, jax.Array]:
        """The belief before (no probability: none yet) and for how many steps it has been stable."""
        return {
            "top": jnp.zeros((batch, canvas, TOP)),
            "top_tokens": jnp.zeros((batch, canvas, TOP), jnp.int32),
            "stable": jnp.zeros((batch, canvas), jnp.int32),
        }

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 where belief is high and stable."""
        memory, here = state.memory, step.candidates
        still = top_divergence(belief, memory["top"], memory["top_tokens"]) < self.epsilon
        stable = jnp.where(here & still & (memory["top"][..., 0] > 0), memory["stable"] + 1, 0)
        now = {"top": belief.top, "top_tokens": belief.top_tokens}
        # Only the active block's beliefs are kept: under a cache there are no others.
        now = {name: jnp.where(here[..., None], x, memory[name]) for name, x in now.items()}
        masked = here & (state.t < 1)
        ready = masked & (belief.confidence > self.tau) & (stable >= self.history)
        scheduled = select_highest(belief.confidence, masked, jnp.maximum(step.quota, 1))
        chosen = jnp.where(jnp.any(ready, axis=-1, keepdims=True), ready, scheduled)
        return Action.unmask(chosen).replace(memory={**now, "stable": stable})


def top_divergence(belief: Belief, top: jax.Array, top_tokens: jax.Array) -> jax.Array:
    """KL(p now || p before) float32 [B, N] in nats, over the likeliest tokens of now and the rest as one class.

    top, top_tokens [B, N, 4]: of the belief before, which may have known less than all of the tokens.
    """
    same = belief.top_tokens[..., :, None] == top_tokens[..., None, :]
    known = jnp.sum(jnp.where(same, top[..., None, :], 0.0), axis=-1)
    before = jnp.where(jnp.any(same, axis=-1), known, top[..., -1:])

    def term(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.where(
            p > 0, p * (jnp.log(jnp.maximum(p, 1e-12)) - jnp.log(jnp.maximum(q, 1e-12))), 0.0
        )

    rest = jnp.maximum(1 - belief.top.sum(-1), 0.0), jnp.maximum(1 - before.sum(-1), 0.0)
    return jnp.sum(term(belief.top, before), axis=-1) + term(*rest)


@struct.dataclass
class SoftMask(TokenConstraints):
    """Soft-masking (arXiv:2510.17206) on mask prediction: masks that stay are fed in as (1 - l) m + l sum p~ W_in, over
    the `likeliest` k tokens with their probabilities renormalised, l = scale * sigmoid(steepness * (-H - offset)).

    The paper learns the three numbers with the model; those here are no more than plausible, for a model that never saw
    such inputs. order: of MaskPrediction, but for "random". UserError where a number is out of range.
    """

    order: str = static_field("confidence")
    likeliest: int = static_field(3)
    scale: float = static_field(0.5)
    steepness: float = static_field(1.0)
    offset: float = static_field(-1.0)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        orders = ("confidence", "entropy", "margin")
        require(
            self.order in orders, f"order must be confidence, entropy or margin, not {self.order!r}"
        )
        require(
            1 <= self.likeliest <= TOP,
            f"likeliest must be between 1 and {TOP}, not {self.likeliest}",
        )
        require(math.isfinite(self.offset), f"offset must be a finite number, not {self.offset}")
        check_ranges(self, scale=1.0, steepness=math.inf)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on the scheduled number of masks, and the mixture that the others are fed as."""
        masked = step.candidates & (state.t < 1)
        chosen = select_highest(order_score(belief, self.order), masked, step.quota)
        p = jnp.where(jnp.arange(TOP) < self.likeliest, belief.top, 0.0)
        share = self.scale * jax.nn.sigmoid(self.steepness * (-belief.entropy - self.offset))
        return Action.unmask(chosen).replace(
            mixture=share[..., None] * p / p.sum(-1, keepdims=True)
        )


@struct.dataclass
class Editing(TokenConstraints):
    """LLaDA2.1's decoding (arXiv:2602.08676): masks by LLaDA2.0's rule, all with c > tau where they are at least the
    scheduled number, else the scheduled number; and a written token is replaced where another one now has c > tau_edit.

    Steps are skipped once everything is written and a step changed nothing. tau, tau_edit: 0.7 and 0.5 are its quality
    mode, 0.5 and 0 its fast one. UserError where a number is out of range.
    """

    tau: float = static_field(0.7)
    tau_edit: float = static_field(0.5)
    early_exit: bool = static_field(True)
    needs_keys: bool = static_field(False)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0, tau_edit=1.0)

    def init_memory(self, batch: int, canvas: int) -> jax.Array:
        """Whether a row's last step changed anything, bool [B]."""
        return jnp.zeros(batch, bool)

    def open(self, state: DecodeState) -> jax.Array:
        """Where another step could still change something, bool [B, N]: at masks, and everywhere after a change."""
        return (state.t < 1) | state.memory[:, None]

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on masks; a reset that is committed at once on tokens to replace."""
        c, written = belief.confidence, step.candidates & (state.t >= 1)
        masked = step.candidates & (state.t < 1)
        chosen = quota_or_confident(
            select_highest(c, masked, step.quota), masked & (c > self.tau), step.quota
        )
        replaced = written & (belief.tokens != state.tokens) & (c > self.tau_edit)
        changed = jnp.any(chosen | replaced, axis=-1)
        return Action(chosen.astype(jnp.float32), replaced, replaced, memory=changed)
