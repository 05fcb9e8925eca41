"""Losses computed by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.losses import MIN_SIGMA, cross_entropy, diffusion_loss, draw_masks, mask_ratios, masked_mean


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


def test_diffusion_loss():
    nll = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    masked = jnp.array([[True, False, True, False], [False, False, False, True]])
    loss = diffusion_loss(nll, masked, jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(loss, ((1 + 3) / 0.5 + 8 / 0.25) / 8, rtol=1e-6)


def test_diffusion_loss_is_unbiased():
    """With every position masked with probability sigma, its expectation is the mean of the nll, whatever sigma is."""
    nll = jnp.linspace(0.5, 3.0, 12).reshape(2, 6)
    sigma = jnp.array([0.2, 0.9])

    def one(key):
        return diffusion_loss(nll, draw_masks(key, sigma, 6), sigma)

    losses = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000))
    assert abs(losses.mean() - nll.mean()) < 5 * losses.std() / math.sqrt(losses.size)


@pytest.mark.parametrize("largest", [1.0, 0.3])
def test_mask_ratios(largest):
    """Each is uniform on (0, largest]; together they are spread evenly, one in each of B equal parts."""
    sigma = np.asarray(jax.vmap(lambda key: mask_ratios(key, 8, largest))(jax.random.split(jax.random.key(0), 4000)))
    assert sigma.shape == (4000, 8)
    assert sigma.min() >= MIN_SIGMA * largest * 0.999 and sigma.max() <= largest
    low = MIN_SIGMA * largest
    part = np.floor((sigma - low) / (largest - low) * 8 - 1e-4).astype(int)
    assert (np.sort(part, axis=1) == np.arange(8)).mean() > 0.99  # but where rounding puts one on the border of two
    np.testing.assert_allclose(sigma.mean(axis=0), largest / 2, rtol=0.05)
    np.testing.assert_allclose(np.quantile(sigma[:, 0], [0.1, 0.5, 0.9]) / largest, [0.1, 0.5, 0.9], atol=0.03)


def test_draw_masks():
    sigma = jnp.array([0.0, 0.25, 1.0])
    masks = draw_masks(jax.random.key(0), sigma, 10_000)
    assert masks.dtype == bool and masks.shape == (3, 10_000)
    np.testing.assert_allclose(masks.mean(axis=1), sigma, atol=0.02)
    assert not masks[0].any() and masks[2].all()
