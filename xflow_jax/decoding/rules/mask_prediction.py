"""Mask prediction, the standard decoder of LLaDA and LLaDA2.0, as a rule."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import struct

from xflow_jax.decoding.belief import Belief, BeliefOptions
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    check_ranges,
    order_score,
    quota_or_confident,
    select_highest,
    static_field,
)
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.errors import require
from xflow_jax.types import ModelConfig


@struct.dataclass
class MaskPrediction(TokenConstraints):
    """Decoder of LLaDA (ML-GSAI/LLaDA, generate.py) and, with `threshold`, of LLaDA2.0.

    As in the official code, the mask token and unused rows of the head may be predicted unless
    `suppress_mask` is set.

    Attributes:
        order: order in which masks are written: "confidence", "random", "entropy" (lowest first)
            or "margin" (largest p1 - p2).
        temperature: of the Gumbel noise that chooses tokens. The confidence is without noise.
        cfg_scale: classifier-free guidance w.
        threshold: write all positions above it if they are at least the scheduled number, else the
            scheduled number. A block then ends as soon as it holds no mask.

    Raises:
        UserError: for an unknown order, or a number out of range.
    """

    order: str = static_field("confidence")
    temperature: float = static_field(0.0)
    cfg_scale: float = static_field(0.0)
    threshold: float | None = static_field(None)

    def __post_init__(self) -> None:
        orders = ("confidence", "random", "entropy", "margin")
        known = f"{', '.join(orders[:-1])} or {orders[-1]}"
        require(self.order in orders, f"order must be {known}, not {self.order!r}")
        check_ranges(self, temperature=math.inf, cfg_scale=math.inf, threshold=1.0)

    @property
    def early_exit(self) -> bool:
        """True with a threshold, as in LLaDA2.0's loop."""
        return self.threshold is not None

    @property
    def needs_keys(self) -> bool:
        """True if the order or the tokens are drawn."""
        return self.order == "random" or self.temperature > 0

    def belief_options(self, config: ModelConfig, eot_id: int | None) -> BeliefOptions:
        """Returns the constraints of the belief, with noise and guidance."""
        # struct.dataclass replaces the class, so zero-argument super() fails.
        options = TokenConstraints.belief_options(self, config, eot_id)
        return dataclasses.replace(options, temperature=self.temperature, guidance=self.cfg_scale)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the scheduled number of masked positions."""
        masked = step.candidates & (state.t < 1)
        if self.order == "random":
            # A folded key, since the noise on the logits uses the step's key itself.
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(step.keys)
            score = jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:]))(keys)
        else:
            score = order_score(belief, self.order)
        chosen = select_highest(score, masked, step.quota)
        if self.threshold is not None:
            confident = masked & (belief.confidence > self.threshold)
            chosen = quota_or_confident(chosen, confident, step.quota)
        return Action.unmask(chosen)
