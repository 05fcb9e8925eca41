"""Tests of the pretraining step: the formula, learning and the curriculum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import TOY, random_prompts
from xflow_jax.models.factory import build, init_params
from xflow_jax.tokenizer import pad_left
from xflow_jax.training import losses
from xflow_jax.training.pretraining import make_pretrain_step, response_logits
from xflow_jax.training.state import TrainState

MODEL = build(TOY)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    prompt, mask = pad_left(random_prompts([3, 5, 4, 1]), TOY.pad_id)
    response = np.asarray(random_prompts([6] * 4, seed=1))
    return {
        "prompt": jnp.asarray(prompt),
        "prompt_mask": jnp.asarray(mask),
        "response": jnp.asarray(response),
    }


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_pretrain_step(MODEL, optax.adam(1e-2), optax.constant_schedule(1.0)))


def test_response_logits_are_the_models(params, batch):
    tokens = jnp.concatenate([batch["prompt"], batch["response"]], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(batch["response"], bool)], axis=1)
    ours = jax.jit(response_logits, static_argnums=(0, 4))(MODEL, params, tokens, mask, 5)
    np.testing.assert_allclose(
        ours, jax.jit(MODEL.apply)({"params": params}, tokens, mask)[:, 5:], atol=1e-5
    )


def test_the_step_is_the_formula(params, batch, step):
    """Computes Eq. 1 row by row in NumPy, with the draws of the step's key."""
    key, n = jax.random.fold_in(jax.random.key(9), 0), 6
    ratio_key, mask_key = jax.random.split(key)
    sigma = losses.mask_ratios(ratio_key, 4)
    masked = losses.draw_masks(mask_key, sigma, n)
    total, sum_nll = 0.0, 0.0
    for row in range(4):
        real = np.asarray(batch["prompt_mask"][row])
        prompt = np.asarray(batch["prompt"][row])[real]
        noisy = np.where(masked[row], TOY.mask_id, batch["response"][row])
        logits = jax.jit(MODEL.apply)({"params": params}, np.concatenate([prompt, noisy])[None])[
            0, -n:
        ]
        nll = -jax.nn.log_softmax(logits)[np.arange(n), batch["response"][row]]
        total += float((nll * masked[row]).sum() / sigma[row] / n / 4)
        sum_nll += float((nll * masked[row]).sum())
    state, metrics = step(TrainState.create(params, optax.adam(1e-2)), batch, jax.random.key(9))
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["masked_nll"], sum_nll / masked.sum(), rtol=1e-4)
    assert state.step == 1 and metrics["grad_norm"] > 0


def test_it_learns_and_compiles_once(params, batch, step):
    state, key = TrainState.create(params, optax.adam(1e-2)), jax.random.key(0)
    nll = []
    for _ in range(150):
        state, metrics = step(state, batch, key)
        nll.append(float(metrics["masked_nll"]))
    assert np.mean(nll[-20:]) < 0.5 * np.mean(nll[:20])
    assert step._cache_size() == 1 and state.step == 150


def test_one_key_serves_a_run(params, batch, step):
    """The step folds its number into the key, so only equal steps draw equal masks."""
    state = TrainState.create(params, optax.adam(1e-2))
    (_, first), (_, again) = (step(state, batch, jax.random.key(0)) for _ in range(2))
    _, later = step(state.replace(step=state.step + 1), batch, jax.random.key(0))
    assert first["loss"] == again["loss"] != later["loss"]


def test_the_curriculum_bounds_the_masking_ratio(params, batch):
    """largest_sigma receives the step. With a ratio near 0 nothing is masked."""
    schedule = optax.piecewise_constant_schedule(1e-6, {5: 1e6})
    curriculum = jax.jit(make_pretrain_step(MODEL, optax.sgd(0.0), schedule))
    state = TrainState.create(params, optax.sgd(0.0))
    _, metrics = curriculum(state, batch, jax.random.key(0))
    assert metrics["masked_nll"] == 0 and metrics["loss"] == 0
    _, metrics = curriculum(state.replace(step=state.step + 7), batch, jax.random.key(0))
    assert metrics["masked_nll"] > 0
