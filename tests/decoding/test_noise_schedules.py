"""Tests of noise schedules: limits, monotony, and equal parts of the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xflow_jax.decoding.noise_schedules import (
    NOISE_SCHEDULES,
    GumbelSchedule,
    NoiseSchedule,
    PlaidSchedule,
    SqrtSchedule,
)

U = jnp.linspace(0, 1, 101)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_noise_rises_from_little_to_almost_all(name):
    schedule = NOISE_SCHEDULES[name]
    assert isinstance(schedule, NoiseSchedule)
    gamma = np.asarray(schedule.gamma(schedule.init(), U))
    assert np.isfinite(gamma).all() and (np.diff(gamma) >= 0).all()
    assert (np.diff(gamma[2:-1]) > 0).all()
    signal = 1 / (1 + np.exp(gamma))  # alpha^2
    assert signal[0] > 0.25 and signal[-1] < 2e-4


def test_the_gumbel_schedule_is_the_quantile_function():
    schedule = GumbelSchedule(loc=2.0, width=0.5, height=3.0)
    fit = schedule.init()
    gamma = schedule.gamma(fit, U[1:-1])
    np.testing.assert_allclose(gamma, 2 - 0.5 * np.log(-np.log(U[1:-1])), rtol=1e-5)
    # Equal steps of u are equal steps of the expected loss.
    np.testing.assert_allclose(schedule.expected_loss(fit, gamma), 3 * U[1:-1], atol=1e-4)


def test_the_plaid_schedule_inverts_its_curve():
    schedule = PlaidSchedule(low=-1.0, high=3.0, pieces=4, height=2.0)
    fit = {**schedule.init(), "rises": jnp.log(jnp.asarray([1.0, 2.0, 4.0, 1.0]))}
    np.testing.assert_allclose(
        schedule.gamma(fit, jnp.asarray([0, 1 / 8, 3 / 8, 5 / 8, 1])), [-1, 0, 1, 1.5, 3], atol=1e-5
    )
    np.testing.assert_allclose(
        schedule.expected_loss(fit, jnp.asarray([-5, 0, 1.5, 9.0])), [0, 0.25, 1.25, 2], atol=1e-5
    )


def test_the_square_root_schedule_is_the_published_one():
    gamma = np.asarray(SqrtSchedule().gamma({}, U[:-1]))
    np.testing.assert_allclose(1 / (1 + np.exp(gamma)), 1 - np.sqrt(U[:-1] + 1e-4), atol=1e-4)


@pytest.mark.parametrize("name", ["gumbel", "plaid"])
def test_a_fit_finds_the_levels_at_which_the_loss_rises(name):
    """The loss of a made-up model rises between 5 and 6, and so should half of the levels."""
    schedule, optimizer = NOISE_SCHEDULES[name], optax.adam(0.05)

    @jax.jit
    def update(fit, state, u):
        gamma = schedule.gamma(fit, u)
        nll = 1.5 * jax.nn.sigmoid(4 * (gamma - 5.5))
        grads = jax.grad(lambda f: jnp.mean((schedule.expected_loss(f, gamma) - nll) ** 2))(fit)
        moves, state = optimizer.update(grads, state)
        return optax.apply_updates(fit, moves), state

    fit = schedule.init()
    state, rng = optimizer.init(fit), np.random.default_rng(0)
    for _ in range(400):
        fit, state = update(fit, state, rng.random(64, np.float32))
    assert 5 < schedule.gamma(fit, jnp.float32(0.5)) < 6
    assert abs(np.exp(fit["log_height"]) - 1.5) < 0.1
    levels = np.asarray(schedule.gamma(fit, U))
    assert ((levels > 4.5) & (levels < 6.5)).mean() > 0.6
