"""Mask prediction, the standard decoder of masked diffusion, as a rule."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief, BeliefOptions
from xflow_jax.decoding.filters import Filters
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
from xflow_jax.types import Array, Bool, Float, Int, ModelConfig


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
        temperature: of the draw of tokens. 0 takes the likeliest one.
        top_k: draw from this many likeliest tokens. 0 for all.
        top_p: draw from the likeliest tokens up to this probability. SDAR counts it among those of
            top_k, and Dream (schedule "eps") among all.
        confidence_of: distribution from which confidence, margin and entropy are read: "model"
            (LLaDA), "temperature" after it and before top_k and top_p (Fast-dLLM v2), or "sampler"
            after all three (Dream, SDAR). None: "sampler" with schedule "eps", top_k or top_p,
            otherwise "model".
        order_temperature: T for positions that are drawn, by softmax(score / T), in the place of
            the highest scores. It is Dream's alg_temp.
        cfg_scale: classifier-free guidance w.
        threshold: write all positions above it if they are at least the scheduled number, else the
            scheduled number. A block then ends as soon as it holds no mask.
        sub_block: positions of a part of a block. A step writes only in the first part that has a
            mask. With a threshold this is the decoder of Fast-dLLM v2.

    Raises:
        UserError: for an unknown order, or a number out of range.
    """

    order: str = static_field("confidence")
    temperature: float = static_field(0.0)
    cfg_scale: float = static_field(0.0)
    threshold: float | None = static_field(None)
    schedule: str = static_field("even")
    eps: float = static_field(1e-3)
    top_k: int = static_field(0)
    top_p: float = static_field(1.0)
    confidence_of: str | None = static_field(None)
    order_temperature: float = static_field(0.0)
    sub_block: int | None = static_field(None)

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
        require(
            self.sub_block is None or self.sub_block >= 1,
            f"sub_block must be at least 1, not {self.sub_block}",
        )
        require(self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(
            self.confidence_of in (None, "model", "temperature", "sampler"),
            f"confidence_of must be model, temperature or sampler, not {self.confidence_of!r}",
        )
        require(
            self.confidence_of != "model" or not self.filters_tokens,
            "confidence_of model needs top_k 0 and top_p 1",
        )
        require(
            not self.order_temperature or self.order in ("confidence", "entropy", "margin"),
            f"order_temperature needs order confidence, entropy or margin, not {self.order}",
        )
        check_ranges(self, order_temperature=math.inf)
        check_ranges(self, temperature=math.inf, cfg_scale=math.inf, threshold=1.0)

    @property
    def early_exit(self) -> bool:
        """True with a threshold, as in LLaDA2.0's loop."""
        return self.threshold is not None

    @property
    def needs_keys(self) -> bool:
        """True if the order or the tokens are drawn."""
        drawn = self.order in ("random", "origin") or self.order_temperature > 0
        return drawn or self.temperature > 0

    @property
    def filters_tokens(self) -> bool:
        """True if some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1

    def adapt(self, config: DecodeConfig) -> DecodeConfig:
        """Checks the parts of a block, and adds the times."""
        if self.sub_block is not None:
            most = -(-config.block_length // config.steps)
            require(
                config.block_length % self.sub_block == 0 and self.sub_block % most == 0,
                f"sub_block {self.sub_block} must divide the block of {config.block_length} "
                f"tokens, and be a multiple of the {most} that a step writes",
            )
        return dataclasses.replace(config, eps=self.eps) if self.schedule == "eps" else config

    def belief_options(self, config: ModelConfig, eot_id: int | None) -> BeliefOptions:
        """Returns the constraints of the belief, with noise and guidance."""
        # struct.dataclass replaces the class, so zero-argument super() fails.
        options = TokenConstraints.belief_options(self, config, eot_id)
        options = dataclasses.replace(options, guidance=self.cfg_scale)
        implied = self.schedule == "eps" or self.filters_tokens
        if (self.confidence_of or ("sampler" if implied else "model")) == "model":
            return dataclasses.replace(options, temperature=self.temperature)
        # The logits are scaled already, so the noise is not.
        noise = 1.0 if self.temperature > 0 else 0.0
        if not self.filters_tokens and self.temperature in (0.0, 1.0):
            return dataclasses.replace(options, temperature=noise)
        filters = Filters(
            self.temperature or 1.0,
            self.top_k,
            self.top_p,
            top_p_first=self.schedule == "eps",
            draws_only=self.confidence_of == "temperature",
        )
        return dataclasses.replace(options, temperature=noise, filters=filters)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Commits the scheduled number of masked positions."""
        masked = step.candidates & (state.t < 1)
        if self.sub_block is not None:
            masked = _first_part(masked, step.candidates, self.sub_block)
        if self.order in ("random", "origin"):
            score = self.draw_scores(masked, step)
        elif self.order == "sequential":
            score = jnp.broadcast_to(-jnp.arange(masked.shape[1], dtype=jnp.float32), masked.shape)
        else:
            score = order_score(belief, self.order)
        if self.order_temperature > 0:
            # The largest of score / T plus Gumbel noise are drawn without replacement.
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(step.keys)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, masked.shape[1:]))(keys)
            score = score / self.order_temperature + noise
        if self.order == "origin":
            return Action.unmask(masked & (score < step.share))
        chosen = select_highest(score, masked, self._quota(masked, step))
        if self.threshold is not None:
            confident = masked & (belief.confidence > self.threshold)
            chosen = quota_or_confident(chosen, confident, step.quota)
        return Action.unmask(chosen)

    def draw_scores(self, masked: Bool[Array, "B N"], step: Step) -> Float[Array, "B N"]:
        """Draws the numbers in [0, 1) of the orders random and origin."""
        # A folded key, since the noise on the logits uses the step's key itself.
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(step.keys)
        return jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:]))(keys)

    def _quota(self, masked: Bool[Array, "B N"], step: Step) -> Int[Array, "*shape"]:
        """Returns the number of masks that the schedule writes."""
        if self.schedule == "even":
            return step.quota
        # In float32, as in the original code.
        count = jnp.sum(masked, axis=-1, keepdims=True).astype(jnp.float32)
        return jnp.floor(count * step.share).astype(jnp.int32)


def _first_part(
    masked: Bool[Array, "B N"], block: Bool[Array, "B N"], size: int
) -> Bool[Array, "B N"]:
    """Selects the masks of a block's first part that has any.

    Parts are counted from the end of the block, since it may begin inside the prompt.
    """
    index = jnp.arange(masked.shape[1])[None, :]
    end = jnp.max(jnp.where(block, index, -1), axis=-1, keepdims=True)
    part = (end - index) // size
    first = jnp.max(jnp.where(masked, part, -1), axis=-1, keepdims=True)
    return masked & (part == first)
