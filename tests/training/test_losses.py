"""Tests of the losses against values computed by hand and against plain formulas."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.training.losses import (
    MIN_SIGMA,
    clipped_surrogate,
    cross_entropy,
    diffusion_loss,
    draw_masks,
    group_advantages,
    mask_ratios,
    masked_mean,
)


def test_masked_mean():
    x = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 6.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(masked_mean(x, mask), 7 / 3, rtol=1e-6)
    assert masked_mean(x, jnp.zeros_like(mask)) == 0
    assert masked_mean(x.astype(jnp.bfloat16), mask).dtype == jnp.float32
    grads = jax.grad(lambda y: masked_mean(y, mask))(x)
    np.testing.assert_allclose(grads, np.where(mask, 1 / 3, 0), rtol=1e-6)


def test_cross_entropy():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])) + 7
    nll = cross_entropy(logits, jnp.array([[1, 2]]))
    np.testing.assert_allclose(nll, [[math.log(4), -math.log(0.7)]], rtol=1e-5)
    assert cross_entropy(logits.astype(jnp.bfloat16), jnp.array([[1, 2]])).dtype == jnp.float32
    assert np.isfinite(cross_entropy(logits * 1e4, jnp.array([[1, 2]]))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_equals_the_plain_formula_to_the_last_bit(dtype):
    logits = (8 * jax.random.normal(jax.random.key(0), (3, 5, 1000))).astype(dtype)
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 1000)
    weight = jax.random.uniform(jax.random.key(2), (3, 5))

    def plain(logits):
        logits = logits.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def weighted(loss):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(x) * weight)))(logits)

    ours, wanted = weighted(lambda x: cross_entropy(x, tokens)), weighted(plain)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_diffusion_loss():
    nll = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    masked = jnp.array([[True, False, True, False], [False, False, False, True]])
    loss = diffusion_loss(nll, masked, jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(loss, ((1 + 3) / 0.5 + 8 / 0.25) / 8, rtol=1e-6)


def test_diffusion_loss_is_unbiased():
    """With masks drawn at the ratio sigma, the expectation is the mean nll for any sigma."""
    nll = jnp.linspace(0.5, 3.0, 12).reshape(2, 6)
    sigma = jnp.array([0.2, 0.9])

    def one(key):
        return diffusion_loss(nll, draw_masks(key, sigma, 6), sigma)

    losses = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000))
    assert abs(losses.mean() - nll.mean()) < 5 * losses.std() / math.sqrt(losses.size)


@pytest.mark.parametrize("largest", [1.0, 0.3])
def test_mask_ratios(largest):
    """Each ratio is uniform on (0, largest]. Each of B equal parts of the range holds one."""
    sigma = np.asarray(
        jax.vmap(lambda key: mask_ratios(key, 8, largest))(
            jax.random.split(jax.random.key(0), 4000)
        )
    )
    assert sigma.shape == (4000, 8)
    assert sigma.min() >= MIN_SIGMA * largest * 0.999 and sigma.max() <= largest
    low = MIN_SIGMA * largest
    part = np.floor((sigma - low) / (largest - low) * 8 - 1e-4).astype(int)
    assert (np.sort(part, axis=1) == np.arange(8)).mean() > 0.99  # rounding may put one on a border
    np.testing.assert_allclose(sigma.mean(axis=0), largest / 2, rtol=0.05)
    np.testing.assert_allclose(
        np.quantile(sigma[:, 0], [0.1, 0.5, 0.9]) / largest, [0.1, 0.5, 0.9], atol=0.03
    )


def test_draw_masks():
    sigma = jnp.array([0.0, 0.25, 1.0])
    masks = draw_masks(jax.random.key(0), sigma, 10_000)
    assert masks.dtype == bool and masks.shape == (3, 10_000)
    np.testing.assert_allclose(masks.mean(axis=1), sigma, atol=0.02)
    assert not masks[0].any() and masks[2].all()


def test_group_advantages_by_hand():
    rewards = jnp.array([[[1.0, 1.0], [0.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]])
    # The first group has the mean 1/2 and the standard deviation 1/2. In the second all are equal.
    np.testing.assert_allclose(
        group_advantages(rewards, floor=0.5), [[[0.5] * 2, [-0.5] * 2], [[0, 0], [0, 0]]]
    )
    mixed = jnp.array([[[1.0, 5.0], [3.0, 5.0]]])
    np.testing.assert_allclose(
        group_advantages(mixed, per_position=True, floor=0.0)[..., 0], [[-1, 1]]
    )
    np.testing.assert_allclose(
        group_advantages(mixed, per_position=True, floor=1.0)[..., 1], [[0, 0]]
    )
    # The centred rewards 1/2, -1/2, 0, 0 have the standard deviation 1 / sqrt(8).
    batch = group_advantages(rewards, scale="batch", floor=0.0)
    np.testing.assert_allclose(batch[..., 0], [[math.sqrt(2), -math.sqrt(2)], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, scale="none")[0, :, 0], [0.5, -0.5])


def test_clipped_surrogate_by_hand():
    """A ratio of 2 is clipped only for a positive advantage, one of 1/2 for a negative one."""
    log_prob = jnp.log(jnp.array([[[2.0, 2.0, 0.5, 0.5, 9.0]]]))
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]])
    acted = jnp.array([[[True, True, True, True, False]]])
    loss, metrics = clipped_surrogate(log_prob, jnp.zeros_like(log_prob), advantages, acted, 0.2)
    np.testing.assert_allclose(loss, -(1.2 - 2.0 + 0.5 - 0.8) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio"], 5 / 4, rtol=1e-6)
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/low_mean"] == 1 / 4
    assert metrics["clip_ratio/region_mean"] == 1 / 2


def grpo_in_numpy(log_prob, old, rewards, acted, epsilon):
    """Computes the loss of Eq. 18 action by action."""
    gains = []
    for (step, row, i), counts in np.ndenumerate(acted):
        if not counts:
            continue
        b, g = divmod(row, rewards.shape[1])
        group = rewards[b].astype(np.float64)
        advantage = (group[g, i] - group.mean()) / (group.std() + 1e-4)
        ratio = np.exp(np.float64(log_prob[step, row, i]) - old[step, row, i])
        gains.append(min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage))
    return -np.mean(gains)


def test_grpo_against_its_numpy_twin_and_finite_differences():
    rng = np.random.default_rng(0)
    shape, rewards = (3, 4, 5), rng.random((2, 2, 5), np.float32)
    old, log_prob = rng.normal(size=(2, *shape)).astype(np.float32) * 0.3
    acted = rng.random(shape) < 0.7

    def loss(log_prob):
        advantages = group_advantages(jnp.asarray(rewards)).reshape(4, 5)
        return clipped_surrogate(log_prob, jnp.asarray(old), advantages, jnp.asarray(acted), 0.2)[0]

    np.testing.assert_allclose(
        loss(jnp.asarray(log_prob)), grpo_in_numpy(log_prob, old, rewards, acted, 0.2), rtol=1e-5
    )
    gradient = jax.grad(loss)(jnp.asarray(log_prob))
    for at in rng.integers(0, shape, (20, 3)):
        nudge = np.zeros(shape)
        nudge[tuple(at)] = 1e-4
        ends = [
            grpo_in_numpy(log_prob + sign * nudge, old, rewards, acted, 0.2) for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            gradient[tuple(at)], (ends[0] - ends[1]) / 2e-4, rtol=2e-3, atol=1e-6
        )


def test_a_ratio_out_of_all_bounds_has_a_finite_gradient():
    shape = (1, 1, 2)
    acted = jnp.ones(shape, bool)

    def loss(log_prob):
        return clipped_surrogate(log_prob, jnp.zeros(shape), jnp.array([[-1.0, 1.0]]), acted, 0.2)[
            0
        ]

    value, gradient = jax.value_and_grad(loss)(jnp.full(shape, 300.0))
    assert np.isfinite(value) and np.isfinite(gradient).all()
