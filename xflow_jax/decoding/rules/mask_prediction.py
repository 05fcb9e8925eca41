"""Mask prediction, the standard decoder of masked diffusion, as a rule."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
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
from xflow_jax.decoding.state import DecodeConfig, DecodeState, Step
from xflow_jax.errors import require
from xflow_jax.types import Array, Bool, Int, ModelConfig


@struct.dataclass
class MaskPrediction(TokenConstraints):
    """Decoder of LLaDA (ML-GSAI/LLaDA, generate.py) and, with `threshold`, of LLaDA2.0.

    With `schedule` "eps" it is that of Dream, whose orders are called maskgit_plus (confidence),
    topk_margin, entropy and origin there. With order "sequential" it is one of SDAR's.

    As in the official code, the mask token and unused rows of the head may be predicted unless
    `suppress_mask` is set.

    Attributes:
        order: order in which masks are written: "confidence", "random", "entropy" (lowest first),
            "margin" (largest p1 - p2), "sequential" (from the left) or "origin" (each mask by
            chance, with the share of its step, which needs schedule "eps").
        schedule: "even", or "eps" for a share 1 - t[i + 1] / t[i] of each row's masks, rounded
            down, with times t from 1 to eps. The last step writes the rest.
        eps: end of the times of the schedule "eps".
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
    schedule: str = static_field("even")
    eps: float = static_field(1e-3)

    def __post_init__(self) -> None:
        orders = ("confidence", "random", "entropy", "margin", "sequential", "origin")
        known = f"{', '.join(orders[:-1])} or {orders[-1]}"
        require(self.order in orders, f"order must be {known}, not {self.order!r}")
        known = "even or eps"
        require(
            self.schedule in known.split(" or "), f"schedule must be {known}, not {self.schedule!r}"
        )
        require(self.order != "origin" or self.schedule == "eps", "order origin needs schedule eps")
        require(0 < self.eps < 1, f"eps must be between 0 and 1, not {self.eps}")
        check_ranges(self, temperature=math.inf, cfg_scale=math.inf, threshold=1.0)

    @property
    def early_exit(self) -> bool:
        """True with a threshold, as in LLaDA2.0's loop."""
        return self.threshold is not None

    @property
    def needs_keys(self) -> bool:
        """True if the order or the tokens are drawn."""
        return self.order in ("random", "origin") or self.temperature > 0

    def adapt(self, config: DecodeConfig) -> DecodeConfig:
        """Adds the times of the schedule."""
        return dataclasses.replace(config, eps=self.eps) if self.schedule == "eps" else config

    def belief_options(self, config: ModelConfig, eot_id: int | None) -> BeliefOptions:
        """Returns the constraints of the belief, with noise and guidance."""
        # struct.dataclass replaces the class, so zero-argument super() fails.
        options = TokenConstraints.belief_options(self, config, eot_id)
        return dataclasses.replace(options, temperature=self.temperature, guidance=self.cfg_scale)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the scheduled number of masked positions."""
        masked = step.candidates & (state.t < 1)
        if self.order in ("random", "origin"):
            # A folded key, since the noise on the logits uses the step's key itself.
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(step.keys)
            score = jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:]))(keys)
        elif self.order == "sequential":
            score = jnp.broadcast_to(-jnp.arange(masked.shape[1], dtype=jnp.float32), masked.shape)
        else:
            score = order_score(belief, self.order)
        if self.order == "origin":
            return Action.unmask(masked & (score < step.share))
        chosen = select_highest(score, masked, self._quota(masked, step))
        if self.threshold is not None:
            confident = masked & (belief.confidence > self.threshold)
            chosen = quota_or_confident(chosen, confident, step.quota)
        return Action.unmask(chosen)

    def _quota(self, masked: Bool[Array, "B N"], step: Step) -> Int[Array, "*shape"]:
        """Returns the number of masks that the schedule writes."""
        if self.schedule == "even":
            return step.quota
        # In float32, as in the original code.
        count = jnp.sum(masked, axis=-1, keepdims=True).astype(jnp.float32)
        return jnp.floor(count * step.share).astype(jnp.int32)
