"""Training steps: pure functions of a state, a batch and a key, to be jitted once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xflow_jax.training import losses
from xflow_jax.training.state import Metrics, Params, TrainState
from xflow_jax.types import Backbone


def response_logits(
    model: Backbone, params: Params, tokens: jax.Array, mask: jax.Array, prompt: int
) -> jax.Array:
    """tokens int [B, L], mask bool [B, L] (False = padding) -> logits [B, N, V]; the head skips the prompt."""
    x = model.apply({"params": params}, tokens, method="embed")
    hidden = model.apply({"params": params}, x, mask, method="hidden")
    return model.apply({"params": params}, hidden[:, prompt:], method="head")


def make_pretrain_step(
    model: Backbone, optimizer: optax.GradientTransformation, largest_sigma: optax.Schedule
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """The step of masked diffusion training (Eq. 1).

    batch: "prompt" int [B, P] and "prompt_mask" bool [B, P] (left padding False), "response" int [B, N]. The key is
    folded with the state's step, so one key serves a whole run. largest_sigma: step -> the upper end of the masking
    ratio, 1 for Eq. 1 as it stands, less at first as a curriculum.
    """

    def loss_fn(params: Params, batch: dict[str, jax.Array], key: jax.Array, largest: jax.Array):
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

    def step(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_sigma(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step
