"""Tests of the step of Gaussian diffusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import TOY, random_prompts
from xflow_jax.decoding.gaussian import (
    GaussianModel,
    add_noise,
    expected_embedding,
    sample_gaussian,
    token_embeddings,
)
from xflow_jax.decoding.noise_schedules import NOISE_SCHEDULES
from xflow_jax.models.factory import build
from xflow_jax.tokenizer import pad_left
from xflow_jax.training import losses
from xflow_jax.training.gaussian import gaussian_optimizer, make_gaussian_step
from xflow_jax.training.state import TrainState

MODEL = GaussianModel(build(TOY), NOISE_SCHEDULES["gumbel"])
OPTIMIZER = gaussian_optimizer(optax.adam(1e-2), 0.02)


@pytest.fixture(scope="module")
def batch():
    """Four prompts, each with a response of its own."""
    prompt, mask = pad_left(random_prompts([3, 5, 4, 1]), TOY.pad_id)
    response = np.asarray(random_prompts([6] * 4, seed=1))
    parts = {"prompt": prompt, "prompt_mask": mask, "response": response}
    return jax.tree.map(jnp.asarray, parts)


@pytest.fixture(scope="module")
def fresh():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    condition = jax.random.normal(jax.random.key(1), fresh["self_condition"].shape)
    return {**fresh, "self_condition": condition}


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_gaussian_step(MODEL, OPTIMIZER, optax.constant_schedule(1.0)))


@pytest.mark.slow
def test_the_step_is_the_formula(params, batch, step):
    """Computes the loss row by row, with the draws of the step's key."""
    level_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(9), 0))
    u = losses.mask_ratios(level_key, 4)
    gamma = MODEL.schedule.gamma(params["schedule"], u)
    table = token_embeddings(params)
    x = table[batch["response"]]
    z = add_noise(x, jax.random.normal(noise_key, x.shape), gamma)
    denoise = jax.jit(MODEL.denoise)
    inputs = (params, table[batch["prompt"]], batch["prompt_mask"], z, gamma)
    blind = denoise(*inputs, jnp.zeros_like(z))
    estimate = expected_embedding(params, blind) * jnp.asarray([1, 0, 1, 0])[:, None, None]
    logits = denoise(*inputs, estimate)
    assert not np.allclose(logits[0], blind[0], atol=1e-2)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["response"][..., None], axis=-1)
    state, metrics = step(TrainState.create(params, OPTIMIZER), batch, jax.random.key(9))
    np.testing.assert_allclose(metrics["loss"], nll.mean(), rtol=1e-4)
    fit = 3 * np.exp(-np.exp(-(gamma - 3.5)))
    misfit = ((fit - nll[..., 0].mean(axis=1)) ** 2).mean()
    np.testing.assert_allclose(metrics["misfit"], misfit, rtol=1e-4)
    assert state.step == 1 and metrics["grad_norm"] > 0
    # Adam's first step is its rate, which the schedule has to itself.
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
    np.testing.assert_allclose(list(moved["schedule"].values()), 0.02, rtol=1e-3)
    np.testing.assert_allclose(moved["self_condition"], 0.01, rtol=1e-3)
    # A bad fit changes no gradient of the model.
    bad = {**params, "schedule": {**params["schedule"], "log_height": jnp.float32(3)}}
    _, again = step(TrainState.create(bad, OPTIMIZER), batch, jax.random.key(9))
    assert again["misfit"] > metrics["misfit"] + 1
    np.testing.assert_allclose(again["grad_norm"], metrics["grad_norm"], rtol=1e-4)


def test_a_memorised_response_is_sampled(fresh, batch, step):
    """It is the same after every prompt, and arises from any noise."""
    batch = {**batch, "response": jnp.tile(batch["response"][:1], (4, 1))}
    state = TrainState.create(fresh, OPTIMIZER)
    for _ in range(400):
        state, metrics = step(state, batch, jax.random.key(0))
    assert metrics["loss"] < 0.3 and step._cache_size() == 1
    noise = jax.random.normal(jax.random.key(5), (4, 6, TOY.hidden_size))
    draw = jax.jit(sample_gaussian, static_argnums=(0, 5))
    tokens = draw(MODEL, state.params, batch["prompt"], batch["prompt_mask"], noise, 4)
    assert (tokens == batch["response"]).mean() > 0.9
