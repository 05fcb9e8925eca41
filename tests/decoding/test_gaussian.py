"""Tests of Gaussian diffusion in embedding space: the denoiser, and the sampler against NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOY, random_prompts, toy
from xflow_jax.decoding.gaussian import (
    FREQUENCIES,
    GaussianModel,
    add_noise,
    euler_step,
    expected_embedding,
    sample_gaussian,
    token_embeddings,
)
from xflow_jax.decoding.noise_schedules import GumbelSchedule
from xflow_jax.models.factory import build
from xflow_jax.tokenizer import pad_left

MODEL = GaussianModel(build(TOY), GumbelSchedule(loc=2.0))
ROWS, LENGTH, WIDTH = 3, 5, TOY.hidden_size


@pytest.fixture(scope="module")
def params():
    """Random parameters whose noise level and estimate count."""
    first, second, condition = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(1), 3),
            [(2 * FREQUENCIES, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH)],
            strict=True,
        )
    )
    return {
        "backbone": toy().params,
        "self_condition": 0.3 * condition,
        "noise_level": {"first": first, "second": second},
        "schedule": MODEL.schedule.init(),
    }


@pytest.fixture(scope="module")
def prompts():
    return tuple(map(jnp.asarray, pad_left(random_prompts([3, 4, 1]), TOY.pad_id)))


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(2), (ROWS, LENGTH, WIDTH))


@pytest.fixture(scope="module")
def program():
    """One compilation for all tests of the denoiser."""
    return jax.jit(MODEL.denoise)


@pytest.fixture(scope="module")
def denoise(params, prompts, program):
    prompt, mask = prompts
    return partial(program, params, token_embeddings(params)[prompt], mask)


def test_embeddings_have_unit_mean_square(params):
    table = np.asarray(token_embeddings(params))
    np.testing.assert_allclose((table**2).mean(axis=1), 1, rtol=1e-4)
    raw = np.asarray(params["backbone"]["wte"]["embedding"])
    np.testing.assert_allclose(table[3] / table[3, 0], raw[3] / raw[3, 0], rtol=1e-4)


def test_noise_keeps_the_variance(params, noise):
    x = jnp.ones((ROWS, LENGTH, WIDTH))
    z = add_noise(x, noise, jnp.asarray([-30.0, 0.0, 30.0]))
    np.testing.assert_allclose(z[0], x[0], atol=1e-5)
    np.testing.assert_allclose(z[1], (x[1] + noise[1]) / 2**0.5, atol=1e-5)
    np.testing.assert_allclose(z[2], noise[2], atol=1e-5)


def test_almost_clean_inputs_are_read_off(params, denoise, noise):
    """The evidence of z itself decides, without any training."""
    tokens = jnp.asarray(random_prompts([LENGTH] * ROWS, seed=3))
    z = add_noise(token_embeddings(params)[tokens], noise, jnp.full(ROWS, -6.0))
    logits = denoise(z, jnp.full(ROWS, -6.0), jnp.zeros_like(z))
    np.testing.assert_array_equal(logits.argmax(-1), tokens)
    x_pred = expected_embedding(params, logits)
    np.testing.assert_allclose(x_pred, token_embeddings(params)[tokens], atol=1e-3)
    assert np.isneginf(logits[..., TOY.vocab_size :]).all()


def test_the_evidence_is_the_likelihood_of_the_noise(params, prompts, program, noise):
    """Without the transformer, the prediction is the posterior under equal priors."""
    silent = {**params, "backbone": jax.tree.map(jnp.zeros_like, params["backbone"])}
    silent["backbone"] = {**silent["backbone"], "wte": params["backbone"]["wte"]}
    gamma, table = jnp.full(ROWS, 1.5), np.asarray(token_embeddings(params))
    prompt_x = jnp.zeros((*prompts[0].shape, WIDTH))
    logits = program(silent, prompt_x, prompts[1], noise, gamma, jnp.zeros_like(noise))
    alpha, variance = (1 / (1 + np.exp(1.5))) ** 0.5, 1 / (1 + np.exp(-1.5))
    away = np.asarray(noise)[:, :, None] - alpha * table[None, None]
    density = -(away**2).sum(-1) / (2 * variance)
    ours = jax.nn.log_softmax(logits)[..., : TOY.vocab_size]
    theirs = jax.nn.log_softmax(density[..., : TOY.vocab_size])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_noise_level_estimate_and_prompt_count_but_padding_does_not(
    params, prompts, program, denoise, noise
):
    gamma, none = jnp.full(ROWS, 2.0), jnp.zeros_like(noise)
    first = denoise(noise, gamma, none)
    assert not np.allclose(first, denoise(noise, gamma + 1, none), atol=1e-2)
    assert not np.allclose(first, denoise(noise, gamma, noise), atol=1e-2)
    x = token_embeddings(params)[prompts[0]]
    real = prompts[1].at[:, 0].set(False)
    run = partial(program, params)
    clean = run(x, real, noise, gamma, none)
    np.testing.assert_allclose(clean, run(x.at[:, 0].set(9.0), real, noise, gamma, none), atol=1e-4)
    assert not np.allclose(clean, run(x.at[:, 3].set(x[:, 2]), real, noise, gamma, none), atol=1e-2)


def test_a_step_is_an_euler_step_of_the_ode(noise):
    """In z / alpha over sigma / alpha, the state moves along (z / alpha - x_pred) / s."""
    x_pred = np.asarray(jnp.roll(noise, 1, axis=0))
    before, after = 3.0, 1.0
    alpha, later = ((1 / (1 + np.exp(level))) ** 0.5 for level in (before, after))
    s, s_later = np.exp(before / 2), np.exp(after / 2)
    y = np.asarray(noise) / alpha
    wanted = later * (y + (s_later - s) * (y - x_pred) / s)
    ours = euler_step(noise, jnp.asarray(x_pred), jnp.float32(before), jnp.float32(after))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_the_sampler_is_its_loop_in_numpy(params, prompts, denoise, noise):
    passes = 4
    z, estimate = np.asarray(noise), np.zeros_like(noise)
    u = np.clip(1 - np.arange(passes + 1) / passes, 1e-5, 1 - 1e-5)
    gamma = 2.0 - np.log(-np.log(u))
    table = np.asarray(token_embeddings(params))
    for now, after in zip(gamma[:-1], gamma[1:], strict=True):
        logits = np.asarray(denoise(z, jnp.full(ROWS, now, jnp.float32), estimate), np.float64)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        estimate = (weights / weights.sum(-1, keepdims=True)) @ table
        estimate = estimate.astype(np.float32)
        noise_part = (z - estimate / (1 + np.exp(now)) ** 0.5) * (1 + np.exp(-now)) ** 0.5
        signal, variance = 1 / (1 + np.exp(after)), 1 / (1 + np.exp(-after))
        z = (signal**0.5 * estimate + variance**0.5 * noise_part).astype(np.float32)  # DDIM
    tokens = jax.jit(sample_gaussian, static_argnums=(0, 5))(MODEL, params, *prompts, noise, passes)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens.shape == (ROWS, LENGTH) and len(np.unique(tokens)) > 1
