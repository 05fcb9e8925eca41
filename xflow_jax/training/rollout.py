"""Rollouts of the step-size policy, their rewards and their metrics.

Training needs only a few numbers per step and position of a decode. Nothing of the vocabulary's
size is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding import SETTLED, DecodeConfig, Flow, decode, is_stop, read_out
from xflow_jax.training.losses import masked_mean
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, Metrics, Params

PROGRESS = 6  # index of t among the features (Eq. 13)
# Lower bounds of the ranges of confidence and progress, each of which has a metric of its own.
BOUNDS = (0.0, 0.5, 0.9, 0.99)


@struct.dataclass
class Rollout:
    """Sampled decodes with the actions of the policy.

    R is prompts times G, and T counts the steps of all blocks.

    Attributes:
        tokens: responses, int [R, N].
        progress: final t, float32 [R, N].
        forward_passes: passes that each sequence took part in, int [R].
        features: features that the policy received, float32 [T, R, N, 8].
        y: actions in (0, 1), float32 [T, R, N].
        log_prob: log-density of each action when it was sampled, float32 [T, R, N].
        acted: True if the action had an effect, bool [T, R, N]: t < 1 before the step, not
            re-edited in it, and before the first settled EOS.
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
    model: Backbone,
    params: Params,
    flow: Flow,
    decode_config: DecodeConfig,
    prompt: Int[Array, "R P"],
    prompt_mask: Bool[Array, "R P"],
    keys: Key[Array, " R"],
) -> Rollout:
    """Decodes prompts with sampled steps.

    Args:
        model: the model.
        params: its parameters.
        flow: the rule, with a policy. Its steps are sampled even if `flow.sample` is False.
        decode_config: lengths and steps.
        prompt: token ids, padded on the left.
        prompt_mask: False at padding.
        keys: one random key per row. Equal keys draw equal actions, whatever the rest of the batch
            and the mesh.

    Returns:
        The responses and actions.
    """
    decode_config = dataclasses.replace(decode_config, trace=True, notes=True)
    sampling = dataclasses.replace(flow, sample=True)
    state, trace = decode(model, params, sampling, decode_config, prompt, prompt_mask, keys)
    assert trace is not None
    tokens, progress = read_out(decode_config, state, model.config.stop_ids)
    notes = jax.tree.map(lambda x: x[:, :, : decode_config.gen_length], trace.notes)
    settled = notes["features"][..., PROGRESS] >= SETTLED
    ended = jnp.cumsum(settled & is_stop(notes["tokens"], model.config.stop_ids), axis=-1) > 0
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
    scores: Float[Array, " R"], progress: Float[Array, "R N"], weight: float, group_size: int
) -> Float[Array, "B G N"]:
    """Computes the reward of each position (Eq. 18).

    Args:
        scores: task reward of each response, 0 to 1.
        progress: final t.
        weight: weight of the progress.
        group_size: G, responses to each prompt.

    Returns:
        R_task + weight t_final, float32.
    """
    rewards = scores[:, None] + weight * progress
    return rewards.reshape(-1, group_size, progress.shape[-1])


def delay(rollouts: Rollout) -> Float[Array, "R N"]:
    """Computes how long each position took to settle.

    Unlike forward passes, which belong to a complete row, the delay depends on the steps of the
    position itself.

    Args:
        rollouts: the decodes.

    Returns:
        The mean over all T steps of 1 - t where the position could move, float32 in [0, 1].
    """
    return jnp.mean(jnp.where(rollouts.acted, 1 - rollouts.features[..., PROGRESS], 0.0), axis=0)


def rollout_metrics(
    rollouts: Rollout,
    scores: Float[Array, " R"],
    rewards: Float[Array, "B G N"],
    eos_id: int,
    step_of: Callable[[jax.Array], jax.Array],
) -> Metrics:
    """Computes the metrics of a batch: rewards, lengths, passes and mean steps.

    Args:
        rollouts: the decodes.
        scores: task reward of each response.
        rewards: reward of each position.
        eos_id: id of EOS.
        step_of: y -> a, `Policy.step_of`.

    Returns:
        Scalars under TRL's names. step/c_0.9 is the mean a over confidences of at least 0.9 and
        below the next of BOUNDS. step/t_0.9 is the same by progress.
    """
    response_reward, groups = rewards.mean(axis=-1), scores.reshape(rewards.shape[:2])
    is_eos = rollouts.tokens == eos_id
    length = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, axis=-1), is_eos.shape[-1])
    metrics = {
        "reward": response_reward.mean(),
        "reward_std": response_reward.std(axis=-1).mean(),
        "frac_reward_zero_std": jnp.mean(groups.std(axis=-1) == 0),
        "rewards/task/mean": scores.mean(),
        "rewards/progress/mean": rollouts.progress.mean(),
        "rewards/delay/mean": delay(rollouts).mean(),
        "completions/mean_length": length.mean(),
        "completions/clipped_ratio": 1 - is_eos.any(-1).mean(),
        "forward_passes": rollouts.forward_passes.mean(),
        "step/mean": masked_mean(step_of(rollouts.y), rollouts.acted),
    }
    for name, index in (("c", 0), ("t", PROGRESS)):
        x = rollouts.features[..., index]
        for low, high in zip(BOUNDS, (*BOUNDS[1:], jnp.inf), strict=True):
            in_range = rollouts.acted & (x >= low) & (x < high)
            metrics[f"step/{name}_{low:g}"] = masked_mean(step_of(rollouts.y), in_range)
    return metrics
