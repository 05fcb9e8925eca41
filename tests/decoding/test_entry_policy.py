"""The entry policy: a twin in NumPy, its draws, and the flows that use it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import belief_of_four, state_of, step_of
from tests.helpers import random_prompts, toy
from xflow_jax.decoding.entry_policy import HEADS, REACH, EntryPolicy, init_entry_policy
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.errors import UserError

WIDTH, N = 8, 5
log_odds = jax.jit(lambda policy, s: policy.log_odds(s))


@pytest.fixture(scope="module")
def policy() -> EntryPolicy:
    """A policy whose weights are all random."""
    fresh = init_entry_policy(jax.random.key(0), WIDTH, above=0.6, temperature=0.5)
    rng = np.random.default_rng(1)
    params = {
        name: jnp.asarray(rng.normal(0, 0.7, x.shape), jnp.float32)
        for name, x in fresh.params.items()
    }
    return dataclasses.replace(fresh, params=params)


@pytest.fixture(scope="module")
def s() -> jax.Array:
    """Features of two rows. In the second the last two positions may not enter."""
    rng = np.random.default_rng(2)
    own = rng.uniform(0.05, 0.9, (2, N, 8))
    ids = rng.integers(0, 6, (2, N, 4))
    enters = np.ones((2, N, 1))
    enters[1, 3:] = 0
    return jnp.asarray(np.concatenate([own, ids, enters], -1), jnp.float32)


def twin(p: dict[str, np.ndarray], s: np.ndarray) -> np.ndarray:
    """Computes the log-odds of one row [N, 13] in plain loops."""

    def silu(x):
        return x / (1 + np.exp(-x))

    n, d = len(s), p["b_in"].size
    odds = np.log(s[:, 0] / (1 - s[:, 0]))
    h = silu(np.concatenate([s[:, :8], s[:, 12:], odds[:, None] / 4], 1) @ p["w_in"] + p["b_in"])
    mixed = np.zeros((n, d))
    for head in range(HEADS):
        part = slice(head * d // HEADS, (head + 1) * d // HEADS)
        q, k, v = ((h @ p[name])[:, part] for name in ("w_q", "w_k", "w_v"))
        for i in range(n):
            weights, total = {}, np.exp(p["sink"][head])
            for j in range(n):
                if j == i or not s[j, 12]:
                    continue
                alike = sum(
                    s[i, a] * s[j, b]
                    for a in range(4)
                    for b in range(4)
                    if s[i, 8 + a] == s[j, 8 + b]
                )
                score = q[i] @ k[j] / np.sqrt(d // HEADS) + p["distance"][head, j - i + REACH]
                weights[j] = np.exp(score + p["alike"][head] * alike)
                total += weights[j]
            for j, weight in weights.items():
                mixed[i, part] += weight / total * v[j]
    h = silu(np.concatenate([h, mixed @ p["w_o"]], 1) @ p["w_1"] + p["b_1"])
    return odds + (h @ p["w_out"])[:, 0] + p["b_out"]


def test_the_log_odds_equal_those_of_plain_loops(policy, s):
    p = {name: np.asarray(x, np.float64) for name, x in policy.params.items()}
    wanted = np.stack([twin(p, row) for row in np.asarray(s, np.float64)])
    np.testing.assert_allclose(log_odds(policy, s), wanted, rtol=2e-5, atol=2e-5)
    # The steps of a rollout are computed one after the other.
    steps = jnp.stack([s, s[::-1]])
    np.testing.assert_allclose(log_odds(policy, steps)[1, 0], wanted[1], rtol=2e-5, atol=2e-5)


def test_only_rivals_that_may_enter_matter(policy, s):
    before = log_odds(policy, s)
    other = s.at[1, 3, :8].set(0.2)
    np.testing.assert_allclose(log_odds(policy, other)[1, :3], before[1, :3], rtol=1e-6)
    rival = s.at[1, 2, :8].set(0.2)
    assert (jnp.abs(log_odds(policy, rival)[1, :2] - before[1, :2]) > 1e-4).all()
    np.testing.assert_array_equal(log_odds(policy, rival)[0], before[0])


def test_a_new_policy_has_the_confidence_itself(s):
    new = init_entry_policy(jax.random.key(3), WIDTH)
    np.testing.assert_allclose(new.expected_step(s), s[..., 0], rtol=1e-5)
    sure = s.at[..., 0].set(1.0)
    assert np.isfinite(log_odds(new, sure)).all() and (log_odds(new, sure) > 10).all()


def test_draws_have_their_probability(policy, s):
    many = jnp.broadcast_to(s[:1], (1500, N, 13))
    y = policy.draw(jax.random.split(jax.random.key(0), 1500), many).astype(jnp.float32)
    z = (np.asarray(log_odds(policy, s)[0]) - np.log(0.6 / 0.4)) / 0.5
    chance = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(y.mean(0), chance, atol=0.05)
    wanted = np.log(np.where(np.asarray(y[:9]) > 0, chance, 1 - chance))
    np.testing.assert_allclose(policy.log_prob(many[:9], y[:9]), wanted, rtol=1e-3, atol=1e-4)


def test_rows_that_imitate_a_threshold_do_not_draw(policy, s):
    imitating = dataclasses.replace(policy, imitate=jnp.array([[1.0], [0.5]]))
    keys = jax.random.split(jax.random.key(0), 2)
    y = imitating.draw(keys, s)
    np.testing.assert_array_equal(y[0], policy.draw(keys, s)[0])
    np.testing.assert_array_equal(y[1], s[1, :, 0] > 0.5)


def test_the_gradient_equals_finite_differences(policy, s):
    y = jnp.asarray([[1.0, 0, 1, 0, 1], [0, 1, 0, 0, 0]])

    @jax.jit
    def loss(params):
        return dataclasses.replace(policy, params=params).log_prob(s, y).sum()

    grads = jax.jit(jax.grad(loss))(policy.params)
    for name in ("alike", "sink", "w_q", "w_in"):
        step = 1e-2 * jax.random.normal(jax.random.key(4), policy.params[name].shape)
        ahead, behind = (
            float(loss(policy.params | {name: policy.params[name] + sign * step}))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(
            (ahead - behind) / 2, (grads[name] * step).sum(), rtol=0.03, atol=2e-4, err_msg=name
        )


@pytest.mark.parametrize("reedit", ["always", "confidence"])
def test_a_new_policy_decodes_as_its_threshold(reedit):
    """Any threshold may be set with `jump`, and the policy has one of its own."""
    lm, prompts = toy(), random_prompts([3, 5])
    new = init_entry_policy(jax.random.key(0), WIDTH, above=0.3)
    flow = Flow(policy=new, reedit=reedit, reedit_margin=None, early_exit=True)
    plain = Flow(reedit="always", jump=0.3, early_exit=True)
    if reedit == "confidence":
        plain = Threshold(tau=0.3)
    made, wanted = (generate(lm, prompts, rule, gen_length=8, steps=6) for rule in (flow, plain))
    np.testing.assert_array_equal(made.tokens, wanted.tokens)
    np.testing.assert_array_equal(made.forward_passes, wanted.forward_passes)


def test_the_least_number_of_passes_ends_a_decode_in_time():
    new = init_entry_policy(jax.random.key(0), WIDTH)
    flow = Flow(policy=new, reedit_margin=None, jump=0.01, least_passes=3, early_exit=True)
    made = generate(toy(), random_prompts([3, 5]), flow, gen_length=8, steps=6)
    # All masks enter in the first pass, and no later one changes a token.
    assert made.forward_passes.tolist() == [3, 3]


def test_at_least_the_surest_mask_enters():
    new = init_entry_policy(jax.random.key(0), WIDTH)
    belief = belief_of_four([[0.4, 0, 0, 0], [0.5, 0, 0, 0], [0.6, 0, 0, 0]], np.ones((3, 4), int))
    state, step = state_of([0.0, 0.0, 1.0]), step_of(3)
    flow = Flow(policy=new, reedit_margin=None)
    assert flow(belief, state, step).a[0].tolist() == [0, 1, 0]
    lower = dataclasses.replace(flow, jump=0.3)
    assert lower(belief, state, step).a[0].tolist() == [1, 1, 0]


def test_an_entry_policy_does_not_mix_with_other_re_editing():
    new = init_entry_policy(jax.random.key(0), WIDTH)
    for options in ({}, {"reedit": "disagreement"}):
        with pytest.raises(UserError, match="an entry policy needs reedit=always, or"):
            Flow(policy=new, **options)
