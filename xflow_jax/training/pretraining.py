"""The step of masked diffusion pretraining."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from xflow_jax.models import shift_rows
from xflow_jax.training import losses
from xflow_jax.training.state import Batch, TrainState, TrainStep
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Metrics, Params


def response_logits(
    model: Backbone,
    params: Params,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    prompt_length: int,
) -> Float[Array, "B N V"]:
    """Computes the logits of the response positions only.

    Args:
        model: the model.
        params: its parameters.
        tokens: prompts and responses.
        mask: False at padding.
        prompt_length: P, positions before the response.

    Returns:
        Logits of the N = L - P response positions.
    """
    x = model.apply({"params": params}, tokens, method="embed")
    hidden = model.apply({"params": params}, x, mask, method="hidden")
    if model.config.logits_shift:
        hidden = shift_rows(hidden, mask)
    return model.apply({"params": params}, hidden[:, prompt_length:], method="head")


def make_pretrain_step(
    model: Backbone, optimizer: optax.GradientTransformation, largest_sigma: optax.Schedule
) -> TrainStep:
    """Builds the step of masked diffusion training (Eq. 1).

    Args:
        model: the model.
        optimizer: the optimiser of its parameters.
        largest_sigma: step -> largest masking ratio. It is 1 for Eq. 1 itself, and lower at first
            in a curriculum.

    Returns:
        step(state, batch, key) -> (state, metrics). The batch holds "prompt" int [B, P],
        "prompt_mask" bool [B, P], False at the padding on the left, and "response" int [B, N]. The
        step folds its number into the key, so one key serves a complete run.
    """

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, largest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        ratio_key, mask_key = jax.random.split(key)
        prompt, response = batch["prompt"], batch["response"]
        sigma = losses.mask_ratios(ratio_key, response.shape[0], largest)
        masked = losses.draw_masks(mask_key, sigma, response.shape[1])
        tokens = jnp.concatenate(
            [prompt, jnp.where(masked, model.config.mask_id, response)], axis=1
        )
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)
        nll = losses.cross_entropy(
            response_logits(model, params, tokens, mask, prompt.shape[1]), response
        )
        loss = losses.diffusion_loss(nll, masked, sigma)
        return loss, {"loss": loss, "masked_nll": losses.masked_mean(nll, masked)}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_sigma(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step
