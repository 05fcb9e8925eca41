"""Rollouts of the step-size policy: prompts in, answers and every (feature, action) of the policy out.

What training needs of a decode is small, nine numbers per step and position; nothing of the vocabulary's size is kept.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding import SETTLED, DecodeConfig, Flow, decode, read_out
from xflow_jax.training.losses import masked_mean

PROGRESS = 6  # the place of t among the features (Eq. 13)


BOUNDS = (0.0, 0.5, 0.9, 0.99)  # of confidence and progress, where the metrics tell steps apart


@struct.dataclass
class Rollout:
    """R = prompts x G sampled decodes of T steps in all blocks.

    tokens int [R, N]; progress float32 [R, N]: the final t; forward_passes int [R]. Of each action: features float32
    [T, R, N, 8], y float32 [T, R, N] in (0, 1), its log-density then, log_prob [T, R, N], and acted bool [T, R, N]:
    whether it mattered (t < 1 before the step, not re-edited in it, before the first settled EOS).
    """

    tokens: jax.Array
    progress: jax.Array
    forward_passes: jax.Array
    features: jax.Array
    y: jax.Array
    log_prob: jax.Array
    acted: jax.Array


@partial(jax.jit, static_argnames=("model", "decode_config"))
def rollout(
    model: Any,
    params: Any,
    flow: Flow,
    decode_config: DecodeConfig,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
) -> Rollout:
    """Decodes prompts int [R, P], padded on the left where prompt_mask bool [R, P] is False, with sampled steps.

    flow: with a policy; whether it samples or not, here it does. keys [R]: one random key per row. The same key draws
    the same actions, whatever else is in the batch and whatever the mesh.
    """
    decode_config = dataclasses.replace(decode_config, trace=True, notes=True)
    state, trace = decode(
        model, params, flow.replace(sample=True), decode_config, prompt, prompt_mask, keys
    )
    tokens, progress = read_out(decode_config, state, model.config.eos_id)
    notes = jax.tree.map(lambda x: x[:, :, : decode_config.gen_length], trace.notes)
    settled = notes["features"][..., PROGRESS] >= SETTLED
    ended = jnp.cumsum(settled & (notes["tokens"] == model.config.eos_id), axis=-1) > 0
    return Rollout(
        tokens=tokens,
        progress=progress,
        forward_passes=state.forward_passes,
        features=notes["features"],
        y=notes["y"],
        log_prob=notes["log_prob"],
        acted=notes["acted"] & ~ended,
    )


def token_rewards(
    scores: jax.Array, progress: jax.Array, weight: float, group_size: int
) -> jax.Array:
    """R_task + weight t_final, float32 [B, G, N], of scores [R] in 0 ... 1 and the final progress [R, N] (Eq. 18)."""
    rewards = scores[:, None] + weight * progress
    return rewards.reshape(-1, group_size, progress.shape[-1])


def delay(made: Rollout) -> jax.Array:
    """How long each position was on its way, float32 [R, N] in 0 ... 1: over all T steps, the mean of 1 - t where it
    could move. What a step gains or loses in time is its own position's, while forward passes are the whole row's."""
    return jnp.mean(jnp.where(made.acted, 1 - made.features[..., PROGRESS], 0.0), axis=0)


def rollout_metrics(
    made: Rollout, scores: jax.Array, rewards: jax.Array, eos_id: int, a_of: Any
) -> dict[str, jax.Array]:
    """Metrics of a batch under TRL's names, scalars: rewards, lengths, passes, and mean steps.

    scores float32 [R], rewards float32 [B, G, N]; a_of: y -> a. step/c_0.9: the mean a where the confidence was at
    least 0.9 and below the next of the bounds; step/t_0.9 the same by progress.
    """
    whole, groups = rewards.mean(axis=-1), scores.reshape(rewards.shape[:2])
    is_eos = made.tokens == eos_id
    length = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, axis=-1), is_eos.shape[-1])
    metrics = {
        "reward": whole.mean(),
        "reward_std": whole.std(axis=-1).mean(),
        "frac_reward_zero_std": jnp.mean(groups.std(axis=-1) == 0),
        "rewards/task/mean": scores.mean(),
        "rewards/progress/mean": made.progress.mean(),
        "rewards/delay/mean": delay(made).mean(),
        "completions/mean_length": length.mean(),
        "completions/clipped_ratio": 1 - is_eos.any(-1).mean(),
        "forward_passes": made.forward_passes.mean(),
        "step/mean": masked_mean(a_of(made.y), made.acted),
    }
    for name, place in (("c", 0), ("t", PROGRESS)):
        x = made.features[..., place]
        for low, high in zip(BOUNDS, (*BOUNDS[1:], jnp.inf), strict=True):
            metrics[f"step/{name}_{low:g}"] = masked_mean(
                a_of(made.y), made.acted & (x >= low) & (x < high)
            )
    return metrics
