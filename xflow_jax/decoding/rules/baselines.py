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
    select_within_factor,
    static_field,
)
from xflow_jax.decoding.state import DecodeConfig, DecodeState, Step
from xflow_jax.errors import require
from xflow_jax.types import Array, Bool, Float, Int

MOST_POST_STEPS = 1024.0  # of a block, far more than any model needs


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
        return Action.unmask(select_within_factor(belief.confidence, masked, self.factor))


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


# mode -> (tau, tau_edit) of Editing: two of LLaDA2.1's model card, and the defaults of its code
EDITING_MODES = {"quality": (0.7, 0.5), "speed": (0.5, 0.0), "default": (0.95, 0.9)}


@struct.dataclass
class Editing(TokenConstraints):
    """Decoder of LLaDA2.1 (arXiv:2602.08676): fills masks and edits tokens in one step.

    All masks with c > tau are written if they are at least the scheduled number, else the scheduled
    number. A written token is replaced if another one has c > tau_edit. A block without masks takes
    further steps until one changes nothing, at most `max_post_steps`. These come after the steps
    that the budget pays for. EOS ends a decode only with `eos_early_stop`, after its block.

    Attributes:
        mode: a name in EDITING_MODES, for the thresholds that are None.
        tau: threshold for masks.
        tau_edit: threshold for written tokens. At 0 every other prediction replaces a token, and at
            1 none does.
        max_post_steps: most steps of a block that has no mask left.
        num_to_transfer: least number of masks that a step writes, if the schedule has fewer.
        suppress_mask: predict neither the mask token nor a row without a token.
        early_exit: skip steps that can change nothing.

    Raises:
        UserError: for an unknown mode, or a number out of range.
    """

    tau: float | None = static_field(None)
    tau_edit: float | None = static_field(None)
    mode: str = static_field("quality")
    max_post_steps: int = static_field(16)
    num_to_transfer: int = static_field(1)
    suppress_mask: bool = static_field(True, kw_only=True)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        known = " or ".join(EDITING_MODES)
        require(self.mode in EDITING_MODES, f"mode must be {known}, not {self.mode!r}")
        check_ranges(self, tau=1.0, tau_edit=1.0, max_post_steps=MOST_POST_STEPS)
        least = self.num_to_transfer
        require(least >= 1, f"num_to_transfer must be at least 1, not {least}")

    @property
    def thresholds(self) -> tuple[float, float]:
        """The thresholds for masks and for written tokens."""
        tau, tau_edit = EDITING_MODES[self.mode]
        return (
            tau if self.tau is None else self.tau,
            tau_edit if self.tau_edit is None else self.tau_edit,
        )

    @property
    def revises(self) -> bool:
        """Returns True: written tokens are replaced."""
        return True

    def adapt(self, config: DecodeConfig) -> DecodeConfig:
        """Adds the steps without masks. EOS ends only on request."""
        config = dataclasses.replace(
            config,
            steps=config.steps + self.max_post_steps,
            extra_steps=self.max_post_steps,
        )
        if not config.block_causal:
            return config
        # The original looks for EOS after each block, not in it.
        return dataclasses.replace(
            config, stop_at_eos=config.eos_early_stop, eos_early_stop=False, cut_at_eos=True
        )

    def init_memory(self, batch: int, canvas: int) -> Int[Array, " B"]:
        """Returns how many steps without masks each row may still take."""
        return jnp.zeros(batch, jnp.int32)

    def is_open(self, state: DecodeState) -> Bool[Array, "B N"]:
        """Returns True at masks, and everywhere while another step may edit."""
        return (state.t < 1) | (state.memory > 0)[:, None]

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits masks, and replaces tokens by a committed reset."""
        tau, tau_edit = self.thresholds
        c, written = belief.confidence, step.candidates & (state.t >= 1)
        masked = step.candidates & (state.t < 1)
        filling = jnp.any(masked, axis=-1)
        least = jnp.maximum(step.quota, self.num_to_transfer)
        scheduled = select_highest(c, masked, least)
        chosen = quota_or_confident(scheduled, masked & (c > tau), least)
        replaced = written & (belief.tokens != state.tokens) & (c > tau_edit)
        replaced &= (filling | (state.memory > 0))[:, None]
        left = jnp.where(jnp.any(replaced, axis=-1), state.memory - 1, 0)
        memory = jnp.where(filling, self.max_post_steps, left)
        return Action(chosen.astype(jnp.float32), replaced, replaced, memory=memory)
