"""Training steps: pure functions of a state, a batch and a key, to be jitted once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xflow_jax.decoding import Policy
from xflow_jax.training import losses
from xflow_jax.training.rollout import Rollout
from xflow_jax.training.state import Metrics, Params, TrainState


def make_policy_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    epsilon: float = 0.2,
    epochs: int = 1,
    per_position: bool = False,
    scale_rewards: str = "group",
) -> Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, Metrics]]:
    """The step of GRPO on the step-size policy (Eq. 18): step(state, rollout, rewards) -> (state, metrics).

    policy: for its ranges; the parameters are the state's. rollout: of B prompts x G, the G of a prompt one after the
    other. rewards float32 [B, G, N]. epochs: updates made on the one batch. per_position, scale_rewards: as in
    losses.group_advantages.
    """

    def step(state: TrainState, rollout: Rollout, rewards: jax.Array) -> tuple[TrainState, Metrics]:
        advantages = losses.group_advantages(rewards, per_position, scale_rewards).reshape(
            -1, rewards.shape[-1]
        )

        def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
            log_prob = policy.replace(params=params).log_prob(rollout.features, rollout.y)
            loss, metrics = losses.clipped_surrogate(
                log_prob, rollout.log_prob, advantages, rollout.acted, epsilon
            )
            # Of the behaviour, not of the update: an estimate from the actions themselves.
            entropy = -losses.masked_mean(log_prob, rollout.acted)
            return loss, metrics | {"loss": loss, "entropy": entropy}

        def update(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
            return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

        after, metrics = jax.lax.scan(update, state, None, length=epochs)
        return after.replace(step=state.step + 1), jax.tree.map(jnp.mean, metrics)

    return step
