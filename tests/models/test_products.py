"""Tests of products of bfloat16: their values, their slopes, and where they are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_prompts, toy
from xflow_jax.models.products import (
    batched_product,
    linear_product,
    rounded_product,
    rounds_factors,
)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def test_a_product_rounds_its_factors_and_not_its_result():
    a, b = draw(2, 3, 5), draw(2, 5, 4, seed=1)
    ours = rounded_product(a, b)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, rounded(a) @ rounded(b), rtol=1e-5, atol=1e-6)
    assert np.abs(ours - np.asarray(a) @ np.asarray(b)).max() > 1e-3


def test_slopes_are_products_of_rounded_factors():
    a, b, slope = draw(2, 3, 5), draw(2, 5, 4, seed=1), draw(2, 3, 4, seed=2)
    _, pull = jax.vjp(rounded_product, a, b.astype(jnp.bfloat16))
    to_a, to_b = pull(slope)
    assert (to_a.dtype, to_b.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(
        to_a, rounded(slope) @ rounded(b).swapaxes(1, 2), rtol=1e-5, atol=1e-6
    )
    want = rounded(a).swapaxes(1, 2) @ rounded(slope)
    np.testing.assert_allclose(to_b.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_they_are_for_bfloat16_and_for_the_precision_of_the_caller():
    assert rounds_factors(jnp.bfloat16) and not rounds_factors(jnp.float32)  # "highest" in tests
    for precision in ("bfloat16", "BF16_BF16_F32"):
        with jax.default_matmul_precision(precision):
            assert rounds_factors(jnp.float32) and not rounds_factors(jnp.float16)
    with jax.default_matmul_precision("high"):
        assert not rounds_factors(jnp.float32)


def test_other_platforms_have_products_of_their_own(monkeypatch):
    monkeypatch.setattr("xflow_jax.models.products.platform", lambda: "tpu")
    assert not rounds_factors(jnp.bfloat16)
    x, kernel = draw(3, 5).astype(jnp.bfloat16), draw(5, 4, seed=1)
    traced = str(jax.make_jaxpr(linear_product)(x, kernel))
    assert "custom_vjp" not in traced and "preferred_element_type=bfloat16" in traced


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_linear_product_has_the_dtype_and_axes_of_its_input(dtype):
    x, kernel = draw(2, 3, 5).astype(dtype), draw(5, 4, seed=1)
    ours = linear_product(x, kernel)
    assert ours.dtype == dtype and ours.shape == (2, 3, 4)
    want = np.asarray(x, np.float64) @ np.asarray(kernel.astype(dtype), np.float64)
    np.testing.assert_allclose(ours.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_batches_have_float32_results():
    a, b = draw(2, 3, 5).astype(jnp.bfloat16), draw(2, 5, 4, seed=1).astype(jnp.bfloat16)
    assert batched_product(a, b).dtype == jnp.float32
    np.testing.assert_allclose(batched_product(a, b), rounded(a) @ rounded(b), rtol=1e-5, atol=1e-6)


def test_a_model_takes_the_precision_of_the_caller_in_all_its_products():
    lm, tokens = toy(), np.asarray(random_prompts([7, 7]))

    def loss(params):
        x = lm.model.apply({"params": params}, tokens, method="embed")
        hidden = lm.model.apply({"params": params}, x, method="hidden")
        # A sum of squares would hardly have slopes after the norm.
        return jnp.sum(hidden * draw(*hidden.shape)), hidden

    step = jax.value_and_grad(loss, has_aux=True)
    (_, exact), exact_slopes = jax.jit(step)(lm.params)
    with jax.default_matmul_precision("bfloat16"):
        traced = str(jax.make_jaxpr(loss)(lm.params))
        (_, near), slopes = jax.jit(step)(lm.params)
    assert "HIGHEST" not in traced and traced.count("dot_general[") == 9
    np.testing.assert_allclose(near, exact, atol=0.06 * np.abs(exact).max())
    assert (near != exact).any()
    for ours, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact_slopes), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(ours, want, atol=0.1 * scale)
