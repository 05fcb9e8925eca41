"""Step rules: how far each position moves after a forward pass. A decoder is one of these on the one flow of decode.py.

A rule sees the belief, the state before the step and what the schedule says, and answers with an `Action`. Mask
prediction, threshold decoding and their like are the rules that only ever take steps of 0 or 1.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief, BeliefOptions
from xflow_jax.errors import require

Rule = Any  # a frozen dataclass that is called with (belief, state, step) and answers with an Action; see Threshold


def static_field(default: Any, **more: Any) -> Any:
    return struct.field(pytree_node=False, default=default, **more)


def check_ranges(rule: Any, **largest: float) -> None:
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


def select_highest(score: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """bool [B, N]: the `count` (a scalar or [B, 1]) highest scores [B, N] of each row `among` those allowed.

    Lowest index first where scores are equal; all of them where fewer are allowed.
    """
    rank = jnp.sum(
        ranks_before(score, among), axis=-1
    )  # counted: sorting is slow in every compiler, and N is small
    return among & (rank < count)


def quota_or_confident(scheduled: jax.Array, sure: jax.Array, quota: jax.Array) -> jax.Array:
    """bool [B, N], LLaDA2.0's choice: a row's `sure` ones where they are at least `quota`, else the `scheduled`."""
    return jnp.where(jnp.sum(sure, axis=-1, keepdims=True) >= quota, sure, scheduled)


def order_score(belief: Belief, order: str) -> jax.Array:
    """float32 [B, N]: by what masks are ordered, highest first: "confidence", "entropy" or "margin" (p1 - p2)."""
    if order == "entropy":
        return -belief.entropy
    return belief.top[..., 0] - belief.top[..., 1] if order == "margin" else belief.confidence


def ranks_before(score: jax.Array, among: jax.Array) -> jax.Array:
    """bool [B, N, N]: at [b, i, j], whether j is one `among` those allowed and comes before i in descending `score`."""
    mine, other = score[:, :, None], score[:, None, :]
    index = jnp.arange(score.shape[1])
    earlier = index[None, None, :] < index[None, :, None]
    return among[:, None, :] & ((other > mine) | ((other == mine) & earlier))


@functools.partial(struct.dataclass, kw_only=True)
class TokenConstraints:
    """What a rule lets the model say: options that all rules share.

    suppress_mask: neither the mask token nor a row without a token is predicted. logits_eos_inf: EOS is never
    predicted. confidence_eos_eot_inf: EOS and EoT may be predicted, but with confidence 0.
    """

    suppress_mask: bool = static_field(False)
    logits_eos_inf: bool = static_field(False)
    confidence_eos_eot_inf: bool = static_field(False)

    def belief_options(self, config: Any, eot_id: int | None) -> BeliefOptions:
        """What the rule asks of the belief."""
        never = (config.eos_id,) if self.logits_eos_inf else ()
        doubted = (
            tuple(i for i in (config.eos_id, eot_id) if i is not None)
            if self.confidence_eos_eot_inf
            else ()
        )
        if not self.suppress_mask:
            return BeliefOptions(never, doubted)
        return BeliefOptions((*never, config.mask_id), doubted, config.vocab_size)
