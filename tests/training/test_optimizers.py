"""Tests of the optimisers, and of bfloat16 parameters that lose no updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xflow_jax.errors import UserError
from xflow_jax.training.optimizers import OptimizerConfig, compact, make_optimizer, stochastic_round


def test_stochastic_rounding_is_right_on_average():
    x = jnp.float32(1 + 1 / 1024)  # its bfloat16 neighbours are 1 and 1 + 1/128
    rounded = stochastic_round(jnp.full(40_000, x), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    values, counts = np.unique(np.asarray(rounded, np.float32), return_counts=True)
    np.testing.assert_array_equal(values, [1, 1 + 1 / 128])
    assert abs(counts[1] / 40_000 - 1 / 8) < 0.01


def test_stochastic_rounding_leaves_exact_numbers_infinities_and_nan():
    x = jnp.array(
        [0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf, jnp.nan, float(jnp.finfo(jnp.bfloat16).max)]
    )
    np.testing.assert_array_equal(stochastic_round(x, jax.random.key(0)).astype(jnp.float32), x)


def walk(optimizer: optax.GradientTransformation, steps: int, start: jax.Array) -> jax.Array:
    """Returns the parameters after `steps` updates with a constant gradient."""

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(
            {"w": jnp.full(start.shape, 1.0, start.dtype)}, state, params
        )
        return optax.apply_updates(params, updates), state

    params = {"w": start}
    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, (p, optimizer.init(p))))(params)[0][
        "w"
    ]


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_updates_too_small_for_bfloat16_add_up(rounding):
    start = jnp.full(1000, 1.0, jnp.bfloat16)
    small = optax.sgd(1e-4)  # bfloat16 has no number between 0.996 and 1
    np.testing.assert_array_equal(walk(small, 1000, start), start)
    end = walk(compact(small, rounding), 1000, start).astype(jnp.float32)
    assert abs(float(end.mean()) - 0.9) < 3e-3  # the distance of bfloat16 numbers there is 4e-3
    assert end.std() < (0.03 if rounding == "stochastic" else 1e-6)


def test_kahan_compensation_is_as_exact_as_float32():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=500), jnp.bfloat16)
    adam = optax.adam(1e-3)
    exact = walk(adam, 300, start.astype(jnp.float32))
    ours = walk(compact(adam, "kahan"), 300, start).astype(jnp.float32)
    assert float(jnp.abs(ours - exact).max()) < 2**-8 * float(jnp.abs(exact).max())


def test_dtypes_of_the_state_of_compact():
    params = {"w": jnp.zeros((4, 4), jnp.bfloat16), "bias": jnp.zeros(4, jnp.float32)}
    state = compact(optax.adam(1e-3), "kahan").init(params)
    assert {x.dtype for x in jax.tree.leaves(state.inner[0].nu)} == {jnp.dtype("float32")}
    assert state.compensation["w"].dtype == jnp.bfloat16
    assert compact(optax.adam(1e-3), "stochastic").init(params).compensation == ()


def test_parameters_in_float32_are_left_to_the_optimiser():
    start = jnp.linspace(0.0, 1.0, 7)
    for rounding in ("stochastic", "kahan"):
        np.testing.assert_array_equal(
            walk(compact(optax.sgd(1e-4), rounding), 10, start), walk(optax.sgd(1e-4), 10, start)
        )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates(schedule, warmup):
    config = OptimizerConfig(rate=0.5, schedule=schedule, warmup_steps=warmup, clip=0.0)
    optimizer = make_optimizer(config, steps=20)
    params = {"w": jnp.zeros(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        sizes.append(-float(updates["w"][0]))  # with a constant gradient, Adam's update is the rate
    np.testing.assert_allclose(sizes[warmup], 0.5, rtol=1e-3)
    np.testing.assert_allclose(sizes[:warmup], 0.5 * np.arange(warmup) / 4, rtol=1e-4)
    assert sizes[-1] == pytest.approx(0.5, rel=1e-3) if schedule == "constant" else sizes[-1] < 0.01


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_frozen_parameters_have_neither_updates_nor_state(name):
    params = {"wte": jnp.ones((256, 128)), "blocks": jnp.ones((256, 128))}
    optimizer = make_optimizer(OptimizerConfig(name, warmup_steps=0), 10, frozen=("wte",))
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params)
    assert not np.any(updates["wte"]) and np.all(updates["blocks"])
    numbers = sum(x.size for x in jax.tree.leaves(state))
    # Either two moments of one matrix, or its sums over rows and columns.
    assert numbers < (2 * 256 * 128 + 10 if name == "adamw" else 256 + 128 + 10)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rate": 0.0}, "optimizer.rate is 0.0"),
        ({"clip": -1.0}, "optimizer.clip is -1.0"),
        ({"b2": 1.0}, "b2 is 1.0"),
    ],
)
def test_mistakes(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        OptimizerConfig(**fields)
