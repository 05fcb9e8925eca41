"""The step of Gaussian diffusion in embedding space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from xflow_jax.decoding import GaussianModel, add_noise, expected_embedding, token_embeddings
from xflow_jax.training import losses
from xflow_jax.training.state import Batch, TrainState, TrainStep
from xflow_jax.types import Metrics, Params


def make_gaussian_step(
    model: GaussianModel,
    optimizer: optax.GradientTransformation,
    largest_share: optax.Schedule,
    self_conditioning: bool = True,
) -> TrainStep:
    """Builds the step of Gaussian diffusion training.

    The loss is the cross-entropy of all response positions at noise levels that the schedule
    spreads. Every second row has an estimate of its clean embeddings, by a forward pass without
    gradient (Analog Bits, arXiv:2208.04202). The numbers of the schedule follow the losses of rows
    by least squares, which do not change the model.

    Args:
        model: the model.
        optimizer: the optimiser of its parameters (`gaussian_optimizer`).
        largest_share: step -> largest u, as `largest_sigma` of `make_pretrain_step`.
        self_conditioning: False for no estimates.

    Returns:
        step(state, batch, key) -> (state, metrics), as `make_pretrain_step` returns it.
    """

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, largest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        level_key, noise_key = jax.random.split(key)
        response, fit = batch["response"], params["schedule"]
        u = losses.mask_ratios(level_key, response.shape[0], largest)
        gamma = jax.lax.stop_gradient(model.schedule.gamma(fit, u))
        table = token_embeddings(params)
        x = table[response]
        z = add_noise(x, jax.random.normal(noise_key, x.shape), gamma)
        prompt_x, real = table[batch["prompt"]], batch["prompt_mask"]
        estimate = jnp.zeros_like(z)
        if self_conditioning:  # u is in order, so every second row covers all levels
            half = (prompt_x[::2], real[::2], z[::2], gamma[::2], estimate[::2])
            fixed, half = jax.lax.stop_gradient((params, half))
            logits = model.denoise(fixed, *half)
            estimate = estimate.at[::2].set(expected_embedding(fixed, logits))
        logits = model.denoise(params, prompt_x, real, z, gamma, estimate)
        nll = losses.cross_entropy(logits, response)
        loss = jnp.mean(nll)
        by_row = jax.lax.stop_gradient(nll.mean(axis=1))
        misfit = jnp.mean((model.schedule.expected_loss(fit, gamma) - by_row) ** 2)
        middle = model.schedule.gamma(fit, jnp.float32(0.5))
        return loss + misfit, {"loss": loss, "misfit": misfit, "middle_gamma": middle}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_share(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        norm = optax.tree.norm({name: x for name, x in grads.items() if name != "schedule"})
        return state.update(grads, optimizer), metrics | {"grad_norm": norm}

    return step


def gaussian_optimizer(
    weights: optax.GradientTransformation, schedule_rate: float
) -> optax.GradientTransformation:
    """Builds the optimiser of a GaussianModel.

    Args:
        weights: optimiser of everything but the schedule.
        schedule_rate: rate of Adam for the numbers of the schedule.
    """

    def label(params: Params) -> dict[str, str]:
        return {name: "schedule" if name == "schedule" else "weights" for name in params}

    return optax.partition({"weights": weights, "schedule": optax.adam(schedule_rate)}, label)
