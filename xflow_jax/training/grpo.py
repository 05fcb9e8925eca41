"""The step of GRPO on a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xflow_jax.decoding import EntryPolicy, Policy
from xflow_jax.training import losses
from xflow_jax.training.rollout import Rollout
from xflow_jax.training.state import TrainState
from xflow_jax.types import Array, Float, Metrics, Params


def make_policy_step(
    policy: Policy | EntryPolicy,
    optimizer: optax.GradientTransformation,
    epsilon: float = 0.2,
    epochs: int = 1,
    per_position: bool = False,
    scale_rewards: losses.RewardScale = "group",
) -> Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, Metrics]]:
    """Builds the step of GRPO on a policy (Eq. 18).

    Args:
        policy: supplies the kind and ranges of the policy. Its parameters are those of the state.
        optimizer: the optimiser of the policy's parameters.
        epsilon: half width of the clipping range.
        epochs: updates on each batch.
        per_position: as in `losses.group_advantages`.
        scale_rewards: its `scale`.

    Returns:
        step(state, rollouts, rewards) -> (state, metrics). The rollouts are B G rows, the G of a
        prompt one after the other. The rewards are float32 [B, G, N]. Metrics are means over the
        epochs.
    """

    def step(
        state: TrainState, rollouts: Rollout, rewards: jax.Array
    ) -> tuple[TrainState, Metrics]:
        advantages = losses.group_advantages(rewards, per_position, scale_rewards).reshape(
            -1, rewards.shape[-1]
        )

        def update(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            grads, metrics = jax.grad(_policy_loss, has_aux=True)(
                state.params, policy, rollouts, advantages, epsilon
            )
            return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

        after, metrics = jax.lax.scan(update, state, None, length=epochs)
        # A step counts once, whatever its number of epochs.
        return dataclasses.replace(after, step=state.step + 1), jax.tree.map(jnp.mean, metrics)

    return step


def _policy_loss(
    params: Params,
    policy: Policy | EntryPolicy,
    rollouts: Rollout,
    advantages: Float[Array, "R N"],
    epsilon: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the clipped loss and its metrics."""
    current = dataclasses.replace(policy, params=params)
    log_prob = current.log_prob(rollouts.features, rollouts.y)
    loss, metrics = losses.clipped_surrogate(
        log_prob, rollouts.log_prob, advantages, rollouts.acted, epsilon
    )
    # An estimate from the sampled actions, so it is the entropy of the policy that sampled them.
    entropy = -losses.masked_mean(log_prob, rollouts.acted)
    return loss, metrics | {"loss": loss, "entropy": entropy}
