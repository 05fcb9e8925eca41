"""Tests of rollouts: they record what happened, and the rest of the batch changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import eight, random_prompts, toy
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.generate import pad_prompts, row_keys
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.state import SETTLED, DecodeConfig
from xflow_jax.parallel.partitioning import batch_sharding
from xflow_jax.training.grpo import make_policy_step
from xflow_jax.training.rollout import (
    PROGRESS,
    Rollout,
    delay,
    rollout,
    rollout_metrics,
    token_rewards,
)
from xflow_jax.training.state import TrainState

CONFIG = DecodeConfig(gen_length=8, block_length=4, steps=3)
LENGTHS = [3, 5, 5, 2]
POLICY = init_policy(jax.random.key(0))


def sampled(
    lm=None, seed: int = 0, prompts=None, config: DecodeConfig = CONFIG, **switches
) -> Rollout:
    lm = lm or toy()
    prompts = prompts or [row for row in random_prompts(LENGTHS) for _ in range(2)]
    arrays = (*pad_prompts(lm, prompts), row_keys(jax.random.key(seed), prompts))
    if lm.mesh is not None:
        arrays = jax.device_put(arrays, batch_sharding(lm.mesh))
    with lm.scope():
        return rollout(lm.model, lm.params, Flow(policy=POLICY, **switches), config, *arrays)


@pytest.fixture(scope="module")
def made() -> Rollout:
    return sampled()


def test_shapes(made):
    assert (
        made.tokens.shape == made.progress.shape == (8, 8)
        and made.forward_passes.tolist() == [6] * 8
    )
    assert made.features.shape == (6, 8, 8, 8)
    assert made.y.shape == made.log_prob.shape == made.acted.shape == (6, 8, 8)


def test_seeds_draw_differently_and_repeat_exactly(made):
    again, other = sampled(), sampled(seed=1)
    for name in (f.name for f in dataclasses.fields(Rollout)):
        np.testing.assert_array_equal(getattr(made, name), getattr(again, name))
    assert (made.y != other.y).any()
    assert (made.y[:, 0] != made.y[:, 1]).any(), "two decodes of one prompt draw apart"


def test_neighbours_do_not_matter(made):
    prompts = [row for row in random_prompts(LENGTHS) for _ in range(2)]
    alone = sampled(prompts=prompts[2:4])
    np.testing.assert_array_equal(alone.tokens, made.tokens[2:4])
    np.testing.assert_allclose(alone.y, made.y[:, 2:4], atol=1e-5)


@eight
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1,8,1", "2,2,2"])
def test_the_mesh_does_not_matter(made, mesh):
    other = sampled(toy(mesh))
    np.testing.assert_array_equal(other.tokens, made.tokens)
    np.testing.assert_allclose(other.y, made.y, atol=1e-4)
    np.testing.assert_array_equal(other.acted, made.acted)


def test_what_is_kept_makes_the_progress(made):
    """The recorded steps lead to the progress of the next step, without resets and commits."""
    a = np.asarray(POLICY.step_of(jnp.asarray(made.y)))
    t = made.features[..., PROGRESS]
    ahead = np.where(made.acted, t + a * (1 - t), t)[:-1]
    active = made.acted[:-1] & made.acted[1:]  # neither committed nor in a new block
    np.testing.assert_allclose(t[1:][active], ahead[active], atol=1e-6)
    assert active.sum() > 20
    np.testing.assert_allclose(made.log_prob, POLICY.log_prob(made.features, made.y), atol=1e-4)


def test_only_actions_that_matter_count():
    """They are in the active block, below t = 1, not reset, and not after a settled EOS."""
    lm, prompts = toy(), random_prompts(LENGTHS)
    config = dataclasses.replace(CONFIG, trace=True, notes=True)
    ids, mask = map(jnp.asarray, pad_prompts(lm, prompts))
    keys = row_keys(jax.random.key(0), prompts)
    _, trace = decode(
        lm.model, lm.params, Flow(policy=POLICY, sample=True), config, ids, mask, keys
    )
    made = sampled(prompts=prompts)
    t = np.asarray(trace.notes["features"][..., PROGRESS])
    tokens, reset = np.asarray(trace.notes["tokens"]), np.asarray(trace.reedited)
    for (step, row, i), acted in np.ndenumerate(made.acted):
        end = [
            j
            for j in range(i + 1)
            if tokens[step, row, j] == lm.config.eos_id and t[step, row, j] >= SETTLED
        ]
        wanted = i // 4 == step // 3 and t[step, row, i] < 1 and not reset[step, row, i] and not end
        assert acted == wanted, (step, row, i)


def test_skipped_steps_have_no_actions():
    quick = dataclasses.replace(CONFIG, early_exit=True, steps=8)
    made = sampled(config=quick, settled=0.05)
    assert made.forward_passes.max() < 16
    assert not made.acted[~made.features.any(axis=(1, 2, 3))].any()
    assert made.acted.any(axis=(1, 2)).sum() < 16


def test_rewards_and_metrics_by_hand():
    tokens = jnp.array([[5, 9, 9], [5, 6, 7], [1, 2, 9], [1, 2, 3]])
    made = Rollout(
        tokens=tokens,
        progress=jnp.array([[1.0, 0.5, 0.0]] * 4),
        forward_passes=jnp.array([2, 4, 4, 2]),
        features=jnp.zeros((1, 4, 3, 8)).at[..., 0].set(0.95),
        y=jnp.full((1, 4, 3), 0.5),
        log_prob=jnp.zeros((1, 4, 3)),
        acted=jnp.ones((1, 4, 3), bool),
    )
    scores = jnp.array([1.0, 0.0, 1.0, 1.0])
    rewards = token_rewards(scores, made.progress, 0.1, 2)
    np.testing.assert_allclose(rewards[0], [[1.1, 1.05, 1.0], [0.1, 0.05, 0.0]], rtol=1e-6)
    metrics = rollout_metrics(made, scores, rewards, 9, lambda y: 2 * y)
    wanted = {
        "reward": 0.8,
        "frac_reward_zero_std": 0.5,
        "rewards/task/mean": 0.75,
        "completions/mean_length": 2.25,
    }
    wanted |= {
        "completions/clipped_ratio": 0.5,
        "forward_passes": 3,
        "step/c_0.9": 1,
        "step/c_0.99": 0,
        "step/t_0": 1,
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_delay_by_hand():
    # In three steps, position 0 settles at once, 1 in the third step, and 2 is never active.
    t = jnp.array([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.8, 0.0]])[:, None]
    acted = jnp.array([[True, True, False], [False, True, False], [False, True, False]])[:, None]
    features = jnp.zeros((3, 1, 3, 8)).at[..., PROGRESS].set(t)
    zero = jnp.zeros((3, 1, 3))
    made = Rollout(zero[0], zero[0], zero[0, :, 0], features, zero, zero, acted)
    np.testing.assert_allclose(delay(made)[0], [1 / 3, (1 + 0.5 + 0.2) / 3, 0.0], rtol=1e-6)


def test_a_step_makes_what_gained_likelier(made):
    """The first update makes the actions of the better decode of each pair likelier."""
    optimizer = optax.sgd(1e-2)
    step = jax.jit(make_policy_step(POLICY, optimizer))
    rewards = jnp.tile(jnp.array([1.0, 0.0])[None, :, None], (4, 1, 8))
    before = TrainState.create(POLICY.params, optimizer)
    after, metrics = step(before, made, rewards)
    assert int(after.step) == 1 and np.isclose(metrics["ratio"], 1, atol=1e-3)
    change = POLICY.replace(params=after.params).log_prob(made.features, made.y) - made.log_prob
    good = np.asarray(change)[:, 0::2][made.acted[:, 0::2]].sum() / made.acted[:, 0::2].sum()
    bad = np.asarray(change)[:, 1::2][made.acted[:, 1::2]].sum() / made.acted[:, 1::2].sum()
    assert good > bad
    twice, _ = jax.jit(make_policy_step(POLICY, optimizer, epochs=2))(before, made, rewards)
    assert int(twice.step) == 1
    gap = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), twice.params, after.params)
    assert max(jax.tree.leaves(gap)) > 0
