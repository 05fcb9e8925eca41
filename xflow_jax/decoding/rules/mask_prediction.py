"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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


@struct.dataclass
class MaskPrediction(TokenConstraints):
    """The standard decoder of LLaDA (ML-GSAI/LLaDA, generate.py) and, with `threshold`, of LLaDA2.0.

    order: which masked positions are written first: "confidence", "random", "entropy" (lowest first) or "margin"
    (largest p1 - p2). temperature: of the Gumbel noise when choosing tokens; the confidence stays the one without it.
    cfg_scale: classifier-free guidance w. threshold: all positions above it are written when they are at least the
    scheduled number, else the scheduled number; blocks then end as soon as they hold no mask. The mask token and unused
    rows are left alone unless told, as in the official code. UserError for an unknown order and where a number is out
    of range.
    """

    order: str = static_field("confidence")
    temperature: float = static_field(0.0)
    cfg_scale: float = static_field(0.0)
    threshold: float | None = static_field(None)

    def __post_init__(self) -> None:
        orders = ("confidence", "random", "entropy", "margin")
        require(
            self.order in orders,
            f"order must be {', '.join(orders[:-1])} or {orders[-1]}, not {self.order!r}",
        )
        check_ranges(self, temperature=math.inf, cfg_scale=math.inf, threshold=1.0)

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
        asked = TokenConstraints.belief_options(
            self, config, eot_id
        )  # flax makes the class anew, and super() the old one
        return dataclasses.replace(asked, temperature=self.temperature, guidance=self.cfg_scale)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """A step of 1 on the scheduled number of masked positions."""
        masked = step.candidates & (state.t < 1)
        if self.order == "random":
            # A key of its own: the noise on the logits uses the step's key itself.
            score = jax.vmap(
                lambda key: jax.random.uniform(jax.random.fold_in(key, 1), masked.shape[1:])
            )(step.keys)
        else:
            score = order_score(belief, self.order)
        chosen = select_highest(score, masked, step.quota)
        if self.threshold is not None:
            chosen = quota_or_confident(
                chosen, masked & (belief.confidence > self.threshold), step.quota
            )
        return Action.unmask(chosen)
