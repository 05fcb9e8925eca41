"""The step-size policy against the reference, SciPy and its own samples."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests.helpers import GOLDENS, read_arrays
from xflow_jax.decoding.policy import (
    _EDGE,
    Policy,
    _log_density,
    features,
    fit_policy,
    init_policy,
    kummer,
)
from xflow_jax.decoding.policy_io import load_policy


@pytest.fixture(scope="module")
def golden():
    return read_arrays(GOLDENS / "flow" / "flow_golden.npz")


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDENS / "flow" / "policy.safetensors")


def test_golden(policy, golden):
    s = jnp.asarray(golden["policy_features"])
    mu, kappa = policy.beta(s)
    np.testing.assert_allclose(mu, golden["policy_mu"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(kappa, golden["policy_kappa"], rtol=0, atol=1e-5)
    a = policy.expected_step(s)
    np.testing.assert_allclose(a, golden["policy_expected_step"], rtol=0, atol=1e-5)


def test_shapes_do_not_matter(policy, golden):
    s = jnp.asarray(golden["policy_features"])
    flat = policy.expected_step(s)
    np.testing.assert_allclose(policy.expected_step(s.reshape(4, 16, 8)).ravel(), flat, rtol=1e-5)
    np.testing.assert_allclose(policy.expected_step(s[5]), flat[5], rtol=1e-5)


# --- the library's functions and ours, over the whole range of a policy


def float32_grid(*axes):
    """Returns the grid of the axes, once as float32 and once as the same numbers in float64."""
    grid = [x.astype(np.float32) for x in np.meshgrid(*axes, indexing="ij")]
    return grid, [x.astype(np.float64) for x in grid]


def kummer_reference(a, b, z, terms=400):
    """Computes 1F1 by its series in the precision of the arguments, complex ones too."""
    term = total = np.ones_like(a * b)
    for n in range(terms):
        term = term * (a + n) / (b + n) * (z / (n + 1))
        total = total + term
    return total


# ln(a_max / a_min) of the paper's range, of the largest a_max, of a small a_min, and of a = 1.
@pytest.mark.parametrize("z", [math.log(256), math.log(1024), math.log(4e6), math.log(2), 0.0])
def test_kummer_and_its_gradients_equal_scipy(z):
    """The derivatives are those of the series in float64, by complex steps."""
    axes = np.linspace(0.05, 0.95, 61), np.geomspace(0.1, 500, 61)
    (mu, b), _ = float32_grid(*axes)
    a = mu * b
    a64, b64, tiny = a.astype(np.float64), b.astype(np.float64), 1e-30
    ours, wanted = jax.jit(kummer, static_argnums=2)(a, b, z), scipy.special.hyp1f1(a64, b64, z)
    np.testing.assert_allclose(ours, wanted, rtol=2e-6)
    np.testing.assert_allclose(kummer_reference(a64, b64, z), wanted, rtol=1e-11)
    grads = jax.grad(lambda a, b: kummer(a, b, z).sum(), (0, 1))(a, b)
    by_a = kummer_reference(a64 + 1j * tiny, b64, z).imag / tiny
    by_b = kummer_reference(a64, b64 + 1j * tiny, z).imag / tiny
    np.testing.assert_allclose(grads[0], by_a, rtol=3e-6)
    np.testing.assert_allclose(grads[1], by_b, rtol=3e-6)


def test_log_density_and_its_gradients_equal_scipy():
    """For y from one clipped edge to the other, by mu and by kappa."""
    inner = np.linspace(0.01, 0.99, 31)
    ys = np.concatenate([[_EDGE, 1e-5, 1e-3], inner, [1 - 1e-3, 1 - 1e-5, 1 - _EDGE]])
    axes = ys, np.linspace(0.05, 0.95, 31), np.geomspace(2, 50, 31)
    grid, (y, mu, kappa) = float32_grid(*axes)
    a, b = mu * kappa, (1 - mu) * kappa
    wanted = scipy.stats.beta.logpdf(y, a, b)
    ours = jax.jit(_log_density)(*grid)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=3e-5)
    grads = jax.grad(lambda *args: _log_density(*args).sum(), (0, 1, 2))(*grid)
    digamma = scipy.special.digamma
    by_a = digamma(kappa) - digamma(a) + np.log(y)
    by_b = digamma(kappa) - digamma(b) + np.log1p(-y)
    np.testing.assert_allclose(grads[0], (a - 1) / y - (b - 1) / (1 - y), rtol=3e-5, atol=3e-4)
    np.testing.assert_allclose(grads[1], kappa * (by_a - by_b), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(grads[2], mu * by_a + (1 - mu) * by_b, rtol=1e-6, atol=3e-6)


# --- the distribution


def constant_policy(mu, kappa, **ranges):
    """Builds a policy that gives mu and kappa at all features."""
    policy = init_policy(jax.random.key(0), width=4, **ranges)
    share = (kappa - policy.kappa_min) / (policy.kappa_max - policy.kappa_min)
    biases = {"b_mu": scipy.special.logit((mu - 0.05) / 0.9), "b_kappa": scipy.special.logit(share)}
    arrays = {name: jnp.full(1, value, jnp.float32) for name, value in biases.items()}
    return Policy({**policy.params, **arrays}, **ranges)


@pytest.mark.parametrize("mu, kappa", [(0.5, 4.0), (0.1, 2.1), (0.9, 40.0)])
def test_samples_have_the_density_and_the_expectation(mu, kappa):
    policy = constant_policy(mu, kappa)
    s = jnp.zeros((40_000, 8))
    y, a, log_prob = policy.sample(jax.random.key(1), s)
    beta = scipy.stats.beta(mu * kappa, (1 - mu) * kappa)
    inside = np.asarray((y > 1e-3) & (y < 1 - 1e-3))  # samples are kept off the edges
    below, within = beta.cdf(1e-3), beta.cdf(1 - 1e-3) - beta.cdf(1e-3)
    y64 = np.asarray(y, np.float64)
    test = scipy.stats.kstest(y64[inside], lambda y: (beta.cdf(y) - below) / within)
    assert test.pvalue > 1e-3
    assert abs(inside.mean() - within) < 0.01
    assert abs(a.mean() - policy.expected_step(s[:1])[0]) < 5 * a.std() / math.sqrt(a.size)
    assert a.min() >= 1 / 256 and a.max() <= 1
    np.testing.assert_allclose(log_prob[inside], beta.logpdf(y64[inside]), atol=1e-3)
    np.testing.assert_allclose(policy.log_prob(s, y), log_prob, atol=1e-6)
    np.testing.assert_allclose(a, 2.0 ** (-8 + 8 * y64), rtol=1e-5)


def test_the_expectation_is_not_the_step_at_the_mean():
    policy, s = constant_policy(0.5, 2.5), jnp.zeros((1, 8))
    assert policy.expected_step(s)[0] > 2 * policy.step_of(jnp.float32(0.5))


@pytest.mark.parametrize("mu, kappa", [(0.05001, 2.001), (0.5, 10.0), (0.94999, 49.99)])
@pytest.mark.parametrize("y", [0.0, 1e-7, 0.5, 1.0])
def test_log_prob_and_its_gradients_are_finite(y, mu, kappa):
    policy, s = constant_policy(mu, kappa), jnp.full((1, 8), 0.3)

    def total(params, y):
        return Policy(params).log_prob(s, y).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(policy.params, jnp.full(1, y))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))
    # The gradient is 0 at the maximum alone.
    assert np.abs(grads[0]["b_mu"]).max() > 0 or y == mu == 0.5


def test_gradients_by_the_parameters():
    """Those of log_prob and of the expected step, against finite differences of SciPy."""
    mu, kappa, y = 0.3, 6.0, 0.7
    policy, s = constant_policy(mu, kappa), jnp.zeros((1, 8))
    density_grads = jax.grad(lambda p: Policy(p).log_prob(s, jnp.full(1, y)).sum())(policy.params)
    step_grads = jax.grad(lambda p: Policy(p).expected_step(s).sum())(policy.params)
    by_bias, h = (mu - 0.05) * (0.95 - mu) / 0.9, 1e-5  # d mu / d b_mu

    def density(mu):
        return scipy.stats.beta(mu * kappa, (1 - mu) * kappa).logpdf(y)

    def expected(mu):
        return scipy.special.hyp1f1(mu * kappa, kappa, math.log(256)) / 256

    for grads, f in ((density_grads, density), (step_grads, expected)):
        wanted = (f(mu + h) - f(mu - h)) / (2 * h) * by_bias
        np.testing.assert_allclose(grads["b_mu"][0], wanted, rtol=1e-3)


def test_a_new_policy_is_the_same_everywhere():
    policy = init_policy(jax.random.key(0), width=16)
    mu, kappa = policy.beta(jax.random.uniform(jax.random.key(1), (7, 8)))
    np.testing.assert_allclose(mu, 0.5, rtol=1e-6)
    np.testing.assert_allclose(kappa, 26.0, rtol=1e-6)
    assert policy.params["w1"].shape == (8, 16)


@pytest.mark.slow
def test_a_fitted_policy_follows_a_fixed_rule():
    policy = init_policy(jax.random.key(0), width=16)
    fitted = fit_policy(policy, lambda c: jnp.clip(c**4, 1 / 256, 1.0), jax.random.key(1), 300)
    c = jnp.array([0.3, 0.9, 0.99])
    top = jnp.stack([c, (1 - c) / 2, (1 - c) / 4, (1 - c) / 8], axis=-1)
    mu, kappa = fitted.beta(features(top, jnp.zeros(3), 0.5))
    assert mu[0] < mu[1] < mu[2] and mu[2] > 0.8
    np.testing.assert_allclose(kappa, 26.0, rtol=1e-6)  # it explores as much as before


def test_features_by_hand():
    top = jnp.array([[[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]])
    s = features(top, jnp.array([[0.25, 0.75]]), 0.5)
    entropy = (0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)) / math.log(4)
    wanted = [0.5, 0.25, 0.125, 0.125, entropy, 0.25, 0.25, 0.5]
    np.testing.assert_allclose(s[0, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(s[0, 1], [1, 0, 0, 0, 0, 1, 0.75, 0.5])
    # Only the entropy is of renormalised probabilities. rho may differ between positions.
    s = features(top * 0.5, jnp.zeros((1, 2)), jnp.array([[0.1, 0.2]]))
    wanted = [0.25, 0.125, 0.0625, 0.0625, entropy, 0.125, 0, 0.1]
    np.testing.assert_allclose(s[0, 0], wanted, rtol=1e-6)
    uniform = features(jnp.full((1, 1, 4), 0.1), jnp.zeros((1, 1)), 0.0)
    np.testing.assert_allclose(uniform[0, 0, 4], 1.0, rtol=1e-6)


def test_steps_are_cut_off_at_one():
    """With an a_max above 1 a step can be 1. Without one, nothing changes."""
    policy = init_policy(jax.random.key(0), a_min=1 / 2, a_max=4.0)
    s = jnp.zeros((3, 8)).at[:, 0].set(1.0)
    low = policy.replace(params={**policy.params, "b_mu": jnp.full(1, -20.0)})
    a = policy.step_of(jnp.array([0.0, 1 / 3, 0.5, 1.0]))
    np.testing.assert_allclose(a, [0.5, 1, 1, 1], rtol=1e-6)
    assert (policy.expected_step(s) == 1).all() and (low.expected_step(s) < 0.7).all()
    _, a, _ = policy.sample(jax.random.key(1), s)
    assert (a <= 1).all()


def test_a_policy_is_described_in_one_line():
    text = repr(init_policy(jax.random.key(0), width=8, a_max=2.0))
    assert text == "Policy(width=8, a_min=0.00390625, a_max=2, kappa_min=2, kappa_max=50)"
