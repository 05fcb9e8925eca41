"""Mixture of experts by hand: routing, ties, and products of uneven groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.llada2_helpers import TINY2
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.moe import KERNELS, apply_experts, route

SLOW = pytest.mark.slow

compiled_route = jax.jit(route, static_argnums=2)


def routed(z, bias, n_group, topk_group, k):
    config = dataclasses.replace(
        TINY2, num_experts=len(bias), n_group=n_group, topk_group=topk_group, num_experts_per_tok=k
    )
    experts, weights = compiled_route(
        jnp.asarray(z, jnp.float32)[None], jnp.asarray(bias, jnp.float32), config
    )
    return experts[0].tolist(), weights[0]


def test_routing_by_hand():
    # Group 1 has the two best together, though group 0 has the best one.
    z = [5.0, -5, 2, 2, 0, 0, 1, -1]
    experts, weights = routed(z, [0.0] * 8, 4, 1, 2)
    assert experts == [2, 3]
    np.testing.assert_allclose(weights, [1.25, 1.25], rtol=1e-6)
    # The bias affects the choice, not the weights. The order is by biased score.
    experts, weights = routed(z, [0, 0, 0, 0.1, 0, 0, 0, 0], 4, 1, 2)
    assert experts == [3, 2]
    np.testing.assert_allclose(weights, [1.25, 1.25], rtol=1e-6)
    # One alone is not normalised.
    experts, weights = routed(z, [0.0] * 8, 4, 4, 1)
    assert experts == [0]
    np.testing.assert_allclose(weights, [2.5 * jax.nn.sigmoid(5.0)], rtol=1e-6)


def test_the_bias_of_an_expert_chooses_and_weighs_nothing():
    """A large bias brings an expert in. Its weight is still its unbiased share."""
    z = np.linspace(-1, 1, 8)
    score = 1 / (1 + np.exp(-z))
    for bias, wanted in (([0.0] * 8, [7, 6]), ([0.9, 0, 0, 0.5, 0, 0, 0, 0], [0, 3])):
        experts, weights = routed(z, bias, 1, 1, 2)
        assert experts == wanted
        np.testing.assert_allclose(weights, 2.5 * score[wanted] / score[wanted].sum(), rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    assert routed([0.0] * 8, [0.0] * 8, 4, 2, 3)[0] == [0, 1, 2]
    # Group 2 wins, and group 0 is the first of the rest. Inside, equal scores go by index.
    z = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    assert routed(z, [0.0] * 8, 4, 2, 3)[0] == [1, 4, 5]
    assert routed([0.0] * 4, [0.0] * 4, 4, 2, 2)[0] == [0, 1], "groups of one"


def brute_force(x, experts, weights, m):
    y = np.zeros(x.shape, np.float64)
    for at in np.ndindex(experts.shape):
        e, row = experts[at], x[at[:-1]].astype(np.float64)
        gate, up, down = (np.asarray(m[name][e], np.float64) for name in ("gate", "up", "down"))
        h = row @ gate
        y[at[:-1]] += weights[at] * ((h / (1 + np.exp(-h)) * (row @ up)) @ down)
    return y


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "tokens, k, skew",
    [
        (3, 2, False),
        *(pytest.param(*case, marks=SLOW) for case in [(1, 1, False), (70, 3, False)]),
        pytest.param(70, 1, True, marks=SLOW),
    ],
)
def test_experts_by_brute_force(kernel, tokens, k, skew):
    """No token is dropped, even if an expert gets none or all of them."""
    rng = np.random.default_rng(tokens)
    shapes = {"gate": (6, 8, 5), "up": (6, 8, 5), "down": (6, 5, 8)}
    m = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(1, tokens, 8)).astype(np.float32)
    experts = np.stack([rng.permutation(6)[:k] for _ in range(tokens)])[None].astype(np.int32)
    experts = np.full_like(experts, 4) if skew else experts
    weights = rng.uniform(size=experts.shape).astype(np.float32)

    @jax.jit
    def total(m, first=0):
        return apply_experts(
            *jax.tree.map(jnp.asarray, (x, experts, weights, m)), {}, first, KERNELS[kernel]
        )

    np.testing.assert_allclose(total(m), brute_force(x, experts, weights, m), atol=1e-4)
    # Two halves of the experts, as on two devices, add up to the whole.
    halves = [total({n: a[i : i + 3] for n, a in m.items()}, i) for i in (0, 3)]
    np.testing.assert_allclose(sum(halves), total(m), atol=1e-4)


@pytest.mark.slow
def test_a_layer_of_a_stack():
    """A stack of three layers: the second one's experts, all of them and a half."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (3, 6, 8, 5), "up": (3, 6, 8, 5), "down": (3, 6, 5, 8)}
    m = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(1, 9, 8)), jnp.float32)
    experts = jnp.asarray([[rng.permutation(6)[:2] for _ in range(9)]], jnp.int32)
    weights = jnp.asarray(rng.uniform(size=experts.shape), jnp.float32)
    for kernel in KERNELS.values():
        for part in (slice(0, 6), slice(2, 5)):
            held = {name: a[:, part] for name, a in m.items()}
            ours = apply_experts(
                x, experts, weights, held, {}, part.start, kernel, layer=jnp.int32(1)
            )
            wanted = apply_experts(
                x, experts, weights, {n: a[1] for n, a in held.items()}, {}, part.start, kernel
            )
            np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_both_kernels_have_the_same_gradients():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((60, 8), (5, 8, 6)))
    sizes = jnp.array([0, 31, 1, 20, 0])
    target = rng.normal(size=(60, 6)).astype(np.float32)
    real = (np.arange(60) < 52)[:, None]

    def grads(kernel):
        return jax.jit(
            jax.grad(lambda x, w: jnp.sum(jnp.where(real, kernel(x, w, sizes), 0) * target), (0, 1))
        )(x, w)

    (dx, dw), (wanted_x, wanted_w) = grads(KERNELS["tiles"]), grads(KERNELS["ragged"])
    np.testing.assert_allclose(dw, wanted_w, atol=1e-5)
    np.testing.assert_allclose(dx[:52], wanted_x[:52], atol=1e-5)


def test_the_default_kernel_makes_no_array_of_all_tokens_by_all_experts():
    model = build(dataclasses.replace(TINY2, num_experts=64, moe_intermediate_size=20))
    tokens = jax.ShapeDtypeStruct((2, 50), jnp.int32)
    text = (
        jax.jit(lambda p, t: model.apply({"params": p}, t))
        .lower(abstract_params(model), tokens)
        .as_text()
    )
    rows = 2 * 50 * TINY2.num_experts_per_tok
    assert f"64x{rows}x" not in text and f"x{rows}x64x" not in text
