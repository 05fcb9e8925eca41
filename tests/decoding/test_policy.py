"""The step-size policy against the reference, SciPy and its own samples."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers import GOLDENS
from xflow_jax.decoding.policy import Policy, features, init_policy, kummer
from xflow_jax.decoding.policy_io import BUNDLED, load_policy, save_policy
from xflow_jax.errors import UserError

FILE = GOLDENS / "flow" / "policy.safetensors"
RANGES = {"a_min": "0.00390625", "a_max": "1.0", "kappa_min": "2.0", "kappa_max": "50.0"}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDENS / "flow" / "flow_golden.npz"))


@pytest.fixture(scope="module")
def policy():
    return load_policy(FILE)


def test_golden(policy, golden):
    s = jnp.asarray(golden["policy_features"])
    mu, kappa = policy.beta(s)
    np.testing.assert_allclose(mu, golden["policy_mu"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(kappa, golden["policy_kappa"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        policy.expected_step(s), golden["policy_expected_step"], rtol=0, atol=1e-5
    )


def test_shapes_do_not_matter(policy, golden):
    s = jnp.asarray(golden["policy_features"])
    flat = policy.expected_step(s)
    np.testing.assert_allclose(policy.expected_step(s.reshape(4, 16, 8)).ravel(), flat, rtol=1e-5)
    np.testing.assert_allclose(policy.expected_step(s[5]), flat[5], rtol=1e-5)


@pytest.mark.parametrize("z", [math.log(256), math.log(2), 12.0, 0.0])
def test_kummer_is_scipys(z):
    """Over the whole range that a policy can have, and beyond it in kappa."""
    mu, kappa = np.meshgrid(np.linspace(0.05, 0.95, 61), np.geomspace(0.1, 500, 61))
    ours = kummer(jnp.asarray(mu * kappa, jnp.float32), jnp.asarray(kappa, jnp.float32), z)
    np.testing.assert_allclose(ours, scipy.special.hyp1f1(mu * kappa, kappa, z), rtol=1e-5)


def constant_policy(mu, kappa, **ranges):
    """The policy that gives mu and kappa everywhere."""
    policy = init_policy(jax.random.key(0), width=4, **ranges)
    share = (kappa - policy.kappa_min) / (policy.kappa_max - policy.kappa_min)
    biases = {"b_mu": scipy.special.logit((mu - 0.05) / 0.9), "b_kappa": scipy.special.logit(share)}
    return Policy(
        policy.params | {k: jnp.full(1, v, jnp.float32) for k, v in biases.items()}, **ranges
    )


@pytest.mark.parametrize("mu, kappa", [(0.5, 4.0), (0.1, 2.1), (0.9, 40.0)])
def test_samples_have_the_density_and_the_expectation(mu, kappa):
    policy = constant_policy(mu, kappa)
    s = jnp.zeros((40_000, 8))
    y, a, log_prob = policy.sample(jax.random.key(1), s)
    beta = scipy.stats.beta(mu * kappa, (1 - mu) * kappa)
    inside = np.asarray((y > 1e-3) & (y < 1 - 1e-3))  # samples are kept off the edges
    below, within = beta.cdf(1e-3), beta.cdf(1 - 1e-3) - beta.cdf(1e-3)
    assert (
        scipy.stats.kstest(np.asarray(y)[inside], lambda y: (beta.cdf(y) - below) / within).pvalue
        > 1e-3
    )
    assert abs(inside.mean() - within) < 0.01
    assert abs(a.mean() - policy.expected_step(s[:1])[0]) < 5 * a.std() / math.sqrt(a.size)
    assert a.min() >= 1 / 256 and a.max() <= 1
    np.testing.assert_allclose(
        log_prob[inside], beta.logpdf(np.asarray(y, np.float64)[inside]), atol=1e-3
    )
    np.testing.assert_allclose(policy.log_prob(s, y), log_prob, atol=1e-6)
    np.testing.assert_allclose(a, 2.0 ** (-8 + 8 * np.asarray(y, np.float64)), rtol=1e-5)


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
    assert np.abs(grads[0]["b_mu"]).max() > 0 or y == mu == 0.5  # where it has its maximum


def test_gradients_are_the_densitys():
    """Of log_prob and of the expected step, against finite differences in float64 SciPy."""
    mu, kappa, y = 0.3, 6.0, 0.7
    policy, s = constant_policy(mu, kappa), jnp.zeros((1, 8))
    grads = jax.grad(lambda p: Policy(p).log_prob(s, jnp.full(1, y)).sum())(policy.params)
    step = jax.grad(lambda p: Policy(p).expected_step(s).sum())(policy.params)
    by_bias, h = (mu - 0.05) * (0.95 - mu) / 0.9, 1e-5  # d mu / d b_mu

    def density(mu):
        return scipy.stats.beta(mu * kappa, (1 - mu) * kappa).logpdf(y)

    def expected(mu):
        return scipy.special.hyp1f1(mu * kappa, kappa, math.log(256)) / 256

    for ours, f in ((grads, density), (step, expected)):
        np.testing.assert_allclose(
            ours["b_mu"][0], (f(mu + h) - f(mu - h)) / (2 * h) * by_bias, rtol=1e-3
        )


def test_a_fresh_policy_is_the_same_everywhere():
    policy = init_policy(jax.random.key(0), width=16)
    mu, kappa = policy.beta(jax.random.uniform(jax.random.key(1), (7, 8)))
    np.testing.assert_allclose(mu, 0.5, rtol=1e-6)
    np.testing.assert_allclose(kappa, 26.0, rtol=1e-6)
    assert policy.params["w1"].shape == (8, 16)


def test_features_by_hand():
    top = jnp.array([[[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]])
    s = features(top, jnp.array([[0.25, 0.75]]), 0.5)
    entropy = (0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)) / math.log(4)
    np.testing.assert_allclose(
        s[0, 0], [0.5, 0.25, 0.125, 0.125, entropy, 0.25, 0.25, 0.5], rtol=1e-6
    )
    np.testing.assert_allclose(s[0, 1], [1, 0, 0, 0, 0, 1, 0.75, 0.5])
    # The four are renormalised for the entropy only, and rho may be of each position.
    s = features(top * 0.5, jnp.zeros((1, 2)), jnp.array([[0.1, 0.2]]))
    np.testing.assert_allclose(
        s[0, 0], [0.25, 0.125, 0.0625, 0.0625, entropy, 0.125, 0, 0.1], rtol=1e-6
    )
    np.testing.assert_allclose(
        features(jnp.full((1, 1, 4), 0.1), jnp.zeros((1, 1)), 0.0)[0, 0, 4], 1.0, rtol=1e-6
    )


def test_file_round_trip(policy, tmp_path):
    policy = Policy(policy.params, a_min=1 / 64, a_max=0.5, kappa_min=3.0, kappa_max=9.0)
    save_policy(tmp_path / "deep" / "p.safetensors", policy, made_by="a test")
    again = load_policy(tmp_path / "deep" / "p.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(policy)  # the ranges are a part of it
    jax.tree.map(np.testing.assert_array_equal, again, policy)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.safetensors"]


def test_bfloat16_files_are_read(policy, tmp_path):
    from safetensors.flax import save_file as save_flax

    save_flax(
        {k: v.astype(jnp.bfloat16) for k, v in policy.params.items()},
        tmp_path / "p.safetensors",
        RANGES,
    )
    again = load_policy(tmp_path / "p.safetensors")
    assert again.params["w1"].dtype == jnp.float32
    np.testing.assert_allclose(again.params["w1"], policy.params["w1"], rtol=1e-2)


BAD = {
    "lacks the tensors b1, w2": (lambda t: t.pop("b1") is t.pop("w2"), {}),
    "w_mu has shape [63, 1], not [64, 1]": (lambda t: t.update(w_mu=t["w_mu"][:-1]), {}),
    "w1 has shape [64, 7], not [8, 64]": (lambda t: t.update(w1=np.zeros((64, 7), np.float32)), {}),
    "b_mu has shape [0], not [1]": (lambda t: t.update(b_mu=np.zeros((0,), np.float32)), {}),
    "b2 holds numbers that are not finite": (lambda t: t["b2"].__setitem__(3, np.nan), {}),
    "its metadata lack a_max, kappa_min": (lambda t: None, {"a_max": None, "kappa_min": None}),
    "in the metadata must be numbers": (lambda t: None, {"a_min": "small"}),
    "must be 0 < a_min < a_max <= 4, a_min < 1": (lambda t: None, {"a_min": "2"}),
}


@pytest.mark.parametrize("message", list(BAD))
def test_a_bad_file_is_told(message, tmp_path):
    change, metadata = BAD[message]
    tensors = load_file(FILE)
    change(tensors)
    metadata = {k: v for k, v in (RANGES | metadata).items() if v is not None}
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path / "p.safetensors")
    assert message in str(error.value) and "p.safetensors" in str(error.value)


def test_what_is_no_file_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_policy(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(FILE.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_policy(tmp_path / "cut.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_policy(tmp_path / "empty.safetensors")


def test_steps_are_cut_off_at_one():
    """An a_max above 1 makes 1 reachable; where everything stays below, nothing changes."""
    policy = init_policy(jax.random.key(0), a_min=1 / 2, a_max=4.0)
    s = jnp.zeros((3, 8)).at[:, 0].set(1.0)
    low = policy.replace(params=policy.params | {"b_mu": jnp.full(1, -20.0)})
    np.testing.assert_allclose(
        policy.step_of(jnp.array([0.0, 1 / 3, 0.5, 1.0])), [0.5, 1, 1, 1], rtol=1e-6
    )
    assert (policy.expected_step(s) == 1).all() and (low.expected_step(s) < 0.7).all()
    _, a, _ = policy.sample(jax.random.key(1), s)
    assert (a <= 1).all()


def test_the_bundled_policy():
    """It is surer to move where the model is surer, and says how it was made, without a word of where."""
    policy = load_policy("tiny")
    c = jnp.array([0.5, 0.9, 0.95, 0.99])
    top = jnp.stack([c, (1 - c) / 2, (1 - c) / 4, (1 - c) / 8], axis=-1)
    a = policy.expected_step(features(top, jnp.zeros(4), 0.5))
    assert a[0] < 0.2 and a[3] > 0.9
    metadata = safe_open(BUNDLED, "numpy").metadata()
    assert json.loads(metadata["made_by"])["config"]["model"] == "tiny" and str(
        BUNDLED.parents[2]
    ) not in str(metadata)
