"""Supervised training of entry policies: labels, losses and a step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import random_prompts, toy
from xflow_jax.decoding.entry_policy import init_entry_policy
from xflow_jax.decoding.generate import pad_prompts, row_keys
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.training.entry import (
    Explorer,
    Teacher,
    make_entry_step,
    target_loss,
    target_states,
    verdict_loss,
    verdict_states,
)
from xflow_jax.training.rollout import Rollout, rollout
from xflow_jax.training.state import TrainState

CONFIG = DecodeConfig(gen_length=6, block_length=6, steps=6, early_exit=True)
PROMPTS = random_prompts([3, 5, 2])
POLICY = init_entry_policy(jax.random.key(0), width=8)


def sampled(policy) -> Rollout:
    lm = toy()
    flow = Flow(policy=policy, reedit_margin=None, early_exit=True)
    arrays = (*pad_prompts(lm, PROMPTS), row_keys(jax.random.key(0), PROMPTS))
    return rollout(lm.model, lm.params, flow, CONFIG, *arrays)


@pytest.fixture(scope="module")
def explored() -> Rollout:
    least = jnp.array([[0.9], [0.5], [0.02]])
    return sampled(Explorer(POLICY.params, temperature=0.01, least=least))


def test_explorers_have_a_threshold_for_each_row(explored):
    entered, s = np.asarray(explored.y) > 0, np.asarray(explored.features)
    c, may_enter = s[..., 0], s[..., -1] > 0
    for row, least in enumerate((0.9, 0.5, 0.02)):
        wanted = may_enter[:, row] & (c[:, row] > least)
        best = np.where(may_enter[:, row], c[:, row], -1).argmax(-1)  # the first of equals
        wanted |= may_enter[:, row] & (np.arange(CONFIG.gen_length) == best[:, None])
        close = np.abs(c[:, row] - least) < 0.02
        np.testing.assert_array_equal(entered[:, row][~close], wanted[~close])
    assert explored.forward_passes[0] > explored.forward_passes[2]


def test_the_states_of_judged_decodes_hold_their_entries(explored):
    """Each mask enters once. Those behind a settled EOS do not count."""
    states = verdict_states(explored, np.array([1.0, 0.0, 1.0], np.float32))
    for row in range(3):
        counts = states["counts"][states["decode"] == row]
        assert counts.sum() > 0 and counts.sum(0).max() == 1
        eos = np.flatnonzero(np.asarray(explored.tokens[row]) == toy().config.eos_id)
        before = eos[0] if eos.size else CONFIG.gen_length
        assert counts[:, :before].sum() == before
    assert (states["right"] == (states["decode"] != 1)[:, None]).all()
    assert len(states["decode"]) <= int(explored.forward_passes.sum())


def test_a_teacher_reaches_its_target_or_drops_the_decode(explored):
    target = np.array(explored.tokens)
    target[2] = (target[2] + 1) % 20
    made = sampled(Teacher(POLICY.params, least=jnp.full((3, 1), 0.5), target=jnp.asarray(target)))
    states = target_states(made, target)
    followed = np.all(np.asarray(made.tokens) == target, axis=1)
    assert followed[:2].any() and not followed[2]
    assert set(states["decode"]) == set(np.flatnonzero(followed))
    predicted = states["features"][..., 8].astype(int)
    wanted = predicted == target[states["decode"]]
    np.testing.assert_array_equal(states["right"][states["counts"]], wanted[states["counts"]])
    assert states["features"].shape[-1] == 13


def test_losses_by_hand():
    p = np.array([[0.9, 0.5, 0.8], [0.6, 0.7, 0.5], [0.3, 0.9, 0.9], [0.5, 0.5, 0.5]])
    z = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    counts = jnp.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    right = jnp.array([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]], bool)
    batch = {"counts": counts, "right": right, "decode": jnp.array([0, 0, 1, 0])}
    wanted = [-np.log(0.9 * 0.8 * 0.7), -np.log(1 - 0.3 * 0.9)]
    np.testing.assert_allclose(verdict_loss(z, batch), np.mean(wanted), rtol=1e-5)
    wanted = [-np.log(x) for x in (0.9, 0.8, 0.7, 0.7, 0.1)]
    np.testing.assert_allclose(target_loss(z, batch), np.mean(wanted), rtol=1e-5)
    sure = {**batch, "right": jnp.zeros_like(right)}
    grad = jax.grad(verdict_loss)(jnp.full_like(z, 30.0), sure)
    assert np.isfinite(grad).all(), "a sure decode that fails"


@pytest.mark.parametrize("labels", ["verdict", "target"])
def test_a_step_learns_and_begins_at_the_confidence(explored, labels):
    states = verdict_states(explored, np.array([1.0, 0.0, 1.0], np.float32))
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_entry_step(POLICY, optimizer, labels))
    state = TrainState.create(POLICY.params, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, states)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], metrics["confidence_loss"], rtol=1e-3)
    assert losses[-1] < 0.9 * losses[0] and int(state.step) == 20
    learned = dataclasses.replace(POLICY, params=state.params)
    shift = learned.expected_step(jnp.asarray(states["features"])) - states["features"][..., 0]
    assert jnp.abs(shift).max() > 1e-2
