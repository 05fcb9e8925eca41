"""Gaussian diffusion in embedding space: a continuous relative of masked diffusion.

The transformer is that of a masked model, with the noisy embeddings of the response as inputs in
the place of mask tokens. It predicts the tokens, and so the clean embeddings (x-prediction of Plaid
and CDCD). The prompt stays clean, as in DiffuSeq. Noise levels and the skip of the logits are those
of LangFlow, and the self-conditioning is that of Analog Bits (arXiv:2208.04202).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xflow_jax.decoding.noise_schedules import NoiseSchedule
from xflow_jax.models import init_params
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, Params

FREQUENCIES = 16  # of the embedding of a noise level
LONGEST_WAVE = 64.0  # in units of gamma, and the shortest is 2


@dataclasses.dataclass(frozen=True)
class GaussianModel:
    """A backbone that denoises embeddings.

    Its parameters are a tree of "backbone", "self_condition" [2E, E], "noise_level" (two matrices)
    and "schedule" (fitted numbers, not weights).

    Attributes:
        backbone: the transformer, without `logits_shift`.
        schedule: the noise schedule.
    """

    backbone: Backbone
    schedule: NoiseSchedule

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns fresh parameters, which ignore noise level and estimate at first."""
        backbone_key, level_key = jax.random.split(key)
        width = self.backbone.config.hidden_size
        first = jax.random.normal(level_key, (2 * FREQUENCIES, width), jnp.float32)
        return {
            "backbone": init_params(self.backbone, backbone_key),
            "self_condition": jnp.zeros((2 * width, width), jnp.float32),
            "noise_level": {
                "first": first / (2 * FREQUENCIES) ** 0.5,
                "second": jnp.zeros((width, width), jnp.float32),
            },
            "schedule": self.schedule.init(),
        }

    def denoise(
        self,
        params: Params,
        prompt_x: Float[Array, "B P E"],
        prompt_mask: Bool[Array, "B P"],
        z: Float[Array, "B N E"],
        gamma: Float[Array, " B"],
        estimate: Float[Array, "B N E"],
    ) -> Float[Array, "B N V"]:
        """Predicts the tokens of noisy responses.

        Args:
            params: the parameters.
            prompt_x: clean embeddings of the prompts.
            prompt_mask: False at padding.
            z: noisy embeddings of the responses.
            gamma: noise level of each row.
            estimate: an earlier prediction of the clean embeddings, or zeros.

        Returns:
            Logits, float32. They contain the log-likelihood of z under each token, so the
            transformer has to learn the rest only.
        """
        config = self.backbone.config
        level = jax.nn.silu(level_features(gamma) @ params["noise_level"]["first"])
        x = z + jnp.concatenate([z, estimate], axis=-1) @ params["self_condition"]
        x = x + (level @ params["noise_level"]["second"])[:, None]
        mask = jnp.concatenate([prompt_mask, jnp.ones(z.shape[:2], bool)], axis=1)
        variables = {"params": params["backbone"]}
        both = jnp.concatenate([prompt_x, x], axis=1)
        hidden = self.backbone.apply(variables, both, mask, method="hidden")
        logits = self.backbone.apply(variables, hidden[:, prompt_x.shape[1] :], method="head")
        skip = jnp.exp((jax.nn.softplus(-gamma) - gamma) / 2)  # alpha / sigma^2
        evidence = skip[:, None, None] * (z @ token_embeddings(params).T)
        is_token = jnp.arange(config.vocab_rows) < config.vocab_size
        return jnp.where(is_token, logits.astype(jnp.float32) + evidence, -jnp.inf)


def level_features(gamma: Float[Array, " B"]) -> Float[Array, "B F"]:
    """Computes sines and cosines of noise levels."""
    waves = jnp.geomspace(2.0, LONGEST_WAVE, FREQUENCIES)
    angles = gamma[:, None] * (2 * jnp.pi / waves)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def token_embeddings(params: Params) -> Float[Array, "V E"]:
    """Scales rows of the embedding table to mean square 1.

    The noise has this variance too. Without a fixed length, rows could grow and escape the noise.

    Args:
        params: parameters of a GaussianModel.
    """
    table = params["backbone"]["wte"]["embedding"].astype(jnp.float32)
    return table * jax.lax.rsqrt(jnp.mean(table**2, axis=-1, keepdims=True) + 1e-12)


def expected_embedding(params: Params, logits: Float[Array, "B N V"]) -> Float[Array, "B N E"]:
    """Computes x_pred, the mean clean embedding under the predicted tokens."""
    return jax.nn.softmax(logits) @ token_embeddings(params)


def add_noise(
    x: Float[Array, "B N E"], noise: Float[Array, "B N E"], gamma: Float[Array, " B"]
) -> Float[Array, "B N E"]:
    """Computes alpha x + sigma noise."""
    level = gamma[:, None, None]
    return jnp.sqrt(jax.nn.sigmoid(-level)) * x + jnp.sqrt(jax.nn.sigmoid(level)) * noise


def euler_step(
    z: Float[Array, "B N E"],
    x_pred: Float[Array, "B N E"],
    gamma: Float[Array, ""],
    next_gamma: Float[Array, ""],
) -> Float[Array, "B N E"]:
    """Moves along the probability-flow ODE to a lower noise level.

    It is an Euler step of z / alpha over sigma / alpha, as in EDM (arXiv:2206.00364), and so a step
    of DDIM without new noise (arXiv:2010.02502). This form has no division by alpha, which is
    almost 0 at the first pass.

    Args:
        z: the state.
        x_pred: prediction of the clean embeddings.
        gamma: noise level of z.
        next_gamma: noise level after the step.

    Returns:
        The state after the step.
    """
    alpha, next_alpha = (jnp.sqrt(jax.nn.sigmoid(-level)) for level in (gamma, next_gamma))
    shrink = jnp.sqrt(jax.nn.sigmoid(next_gamma) / jax.nn.sigmoid(gamma))
    return next_alpha * x_pred + shrink * (z - alpha * x_pred)


def sample_gaussian(
    model: GaussianModel,
    params: Params,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    noise: Float[Array, "B N E"],
    passes: int,
) -> Int[Array, "B N"]:
    """Decodes responses from noise, all positions together.

    Each pass conditions on the prediction of the one before. The last prediction is rounded to its
    likeliest tokens.

    Args:
        model: the model.
        params: its parameters.
        prompt: token ids of the prompts.
        prompt_mask: False at padding.
        noise: standard normal, the state at the first pass.
        passes: number of forward passes, at equal steps of u from 1 down.

    Returns:
        Token ids of the responses.
    """
    table = token_embeddings(params)
    denoise = partial(model.denoise, params, table[prompt], prompt_mask)
    levels = model.schedule.gamma(params["schedule"], jnp.linspace(1.0, 0.0, passes + 1))

    def step(carry: tuple[Array, Array, Array], pair: tuple[Array, Array]) -> Any:
        z, estimate, _ = carry
        logits = denoise(z, jnp.broadcast_to(pair[0], z.shape[:1]), estimate)
        x_pred = expected_embedding(params, logits)
        tokens = jnp.argmax(logits, axis=-1)
        return (euler_step(z, x_pred, *pair), x_pred, tokens), None

    start = noise, jnp.zeros_like(noise), jnp.zeros(noise.shape[:2], int)
    (_, _, tokens), _ = jax.lax.scan(step, start, (levels[:-1], levels[1:]))
    return tokens
