"""`advance`: the effect of an action on the state."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import NO, YES, belief_of, state_of, step_of
from xflow_jax.decoding.decode import advance, move_positions
from xflow_jax.decoding.rules.base import Action
from xflow_jax.decoding.rules.flow import Flow


def after(t, x, c, tokens, standing, a, reset, commit, candidates, mask_id=99):
    """Runs `advance` in one dimension. Token k has the embedding 10 k, and m is -1."""
    belief, state = belief_of(c, tokens=tokens), state_of(t, x, standing)
    action = Action(*(jnp.asarray(v)[None] for v in (np.float32(a), reset, commit)))
    x_pred = belief.tokens[..., None] * 10.0
    m = jnp.full((1, 1, 1), -1.0)
    out = advance(state, belief, action, jnp.asarray(candidates)[None], x_pred, m, mask_id)
    return out.x[0, :, 0], out.t[0], out.tokens[0]


def test_advance_by_hand():
    x, t, tokens = after(
        t=[0.5, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0],
        x=[2.0, 2.0, 2.0, 30.0, 30.0, 2.0, -1.0],
        c=[0.6, 0.6, 0.2, 0.6, 0.2, 0.6, 0.6],
        tokens=[1, 2, 3, 4, 5, 6, 99],
        standing=[7, 7, 7, 3, 3, 7, 8],
        a=[0.25, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0],
        reset=[NO, NO, YES, NO, YES, NO, NO],
        commit=[NO] * 7,
        candidates=[YES, YES, YES, YES, YES, NO, YES],
    )
    # In order: moved by a quarter, arrived, reset to c x_pred + (1 - c) m, stays at t = 1,
    # re-edited there, not a candidate, and a predicted mask token that changes only the prediction.
    wanted = [4.0, 20.0, 0.2 * 30 - 0.8, 30.0, 0.2 * 50 - 0.8, 2.0, -1.0]
    np.testing.assert_allclose(x, wanted, rtol=1e-6)
    np.testing.assert_allclose(t, [0.625, 1.0, 0.2, 1.0, 0.2, 0.5, 0.0], rtol=1e-6)
    assert tokens.tolist() == [1, 2, 3, 3, 5, 7, 99]


def test_a_position_on_its_way_that_takes_no_step_keeps_its_token():
    x, t, tokens = after(
        t=[0.0, 0.5, 0.5, 0.5, 0.5],
        x=[-1.0, 2.0, 2.0, 2.0, 2.0],
        c=[0.6] * 5,
        tokens=[1, 2, 3, 4, 5],
        standing=[7] * 5,
        a=[0.0, 0.0, 0.5, 0.0, 0.0],
        reset=[NO, NO, NO, YES, NO],
        commit=[NO, NO, NO, NO, YES],
        candidates=[YES] * 5,
    )
    # A mask shows its prediction. The others in order: still, moved by half, reset and committed.
    assert tokens.tolist() == [1, 7, 3, 4, 5]
    np.testing.assert_allclose(x, [-1.0, 2.0, 16.0, 0.6 * 40 - 0.4, 50.0], rtol=1e-6)
    np.testing.assert_allclose(t, [0.0, 0.5, 0.75, 0.6, 1.0], rtol=1e-6)


def test_a_commitment_has_precedence_over_a_step_and_a_reset():
    x, t, tokens = after(
        t=[0.5, 0.5, 1.0],
        x=[2.0, 2.0, 30.0],
        c=[0.6, 0.2, 0.2],
        tokens=[1, 2, 5],
        standing=[7, 7, 3],
        a=[0.25, 0.5, 0.5],
        reset=[NO, YES, YES],
        commit=[YES, YES, YES],
        candidates=[YES, YES, YES],
    )
    assert x.tolist() == [10.0, 20.0, 50.0]
    assert t.tolist() == [1.0, 1.0, 1.0] and tokens.tolist() == [1, 2, 5]


def test_the_division_of_the_velocity_cancels():
    """The move equals (x_pred - x) / (1 - t) a (1 - t), for t close to 1 too."""
    t = np.array([0.0, 0.9, 1 - 2**-24])
    x, new, _ = after(
        t, [2.0] * 3, [0.9] * 3, [3] * 3, [9] * 3, [0.5] * 3, [NO] * 3, [NO] * 3, [YES] * 3
    )
    np.testing.assert_allclose(x, 2 + (30 - 2) / (1 - t) * 0.5 * (1 - t), rtol=1e-6)
    assert (new >= t).all() and (new <= 1).all()


def test_a_rescaled_mixture_has_the_mean_length():
    x_pred, m = jnp.asarray([[[3.0, 4.0]]]), jnp.asarray([[[0.0, -2.0]]])
    state = dataclasses.replace(state_of([0.0]), x=m)
    yes, no = jnp.ones((1, 1), bool), jnp.zeros((1, 1), bool)
    action = Action(jnp.zeros((1, 1)), yes, no)
    plain, scaled = (
        advance(state, belief_of([0.25]), a, yes, x_pred, m, 99).x[0, 0]
        for a in (action, action.replace(rescale=True))
    )
    np.testing.assert_allclose(plain, [0.75, -0.5])
    np.testing.assert_allclose(jnp.linalg.norm(scaled), 0.25 * 5 + 0.75 * 2, rtol=1e-5)
    np.testing.assert_allclose(scaled[0] * plain[1], scaled[1] * plain[0], rtol=1e-5)


def test_a_floor_replaces_lower_confidences_of_reedited_positions():
    m, x_pred = jnp.asarray([[[-2.0]]]), jnp.full((1, 3, 1), 8.0)
    state, yes = state_of([0.5] * 3, [3.0] * 3), jnp.ones((1, 3), bool)
    reset = jnp.asarray([[YES, YES, NO]])
    action = Action(jnp.zeros((1, 3)), reset, ~yes, floor=jnp.full((1, 3), 0.6))
    out = advance(state, belief_of([0.25, 0.75, 0.25]), action, yes, x_pred, m, 99)
    np.testing.assert_allclose(out.t[0], [0.6, 0.75, 0.5])
    np.testing.assert_allclose(out.x[0, :, 0], [0.6 * 8 - 0.4 * 2, 0.75 * 8 - 0.25 * 2, 3.0])


@pytest.mark.parametrize("expected, toward", [(False, 10.0), (True, 0.75 * 10 + 0.25 * 20)])
def test_the_mean_embedding_of_the_likely_tokens(expected, toward):
    """Token k has the embedding 10 k. A position at t = 1 has that of its token."""
    params = {"wte": {"embedding": 10.0 * jnp.arange(5.0)[:, None]}}
    top = jnp.tile(jnp.asarray([0.6, 0.2, 0.0, 0.0]), (1, 3, 1))
    top_tokens = jnp.tile(jnp.asarray([1, 2, 3, 4]), (1, 3, 1))
    belief = belief_of([0.6] * 3, tokens=[1] * 3).replace(top=top, top_tokens=top_tokens)
    state = state_of([0.0, 0.5, 0.0], [40.0, 20.0, 40.0], [4] * 3)
    action = Action(
        jnp.asarray([[0.25, 0.0, 1.0]]), jnp.asarray([[NO, YES, NO]]), jnp.zeros((1, 3), bool)
    ).replace(expected=expected)
    out = move_positions(params, 4, jnp.ones((1, 3), bool), state, belief, action)
    wanted = [40 + 0.25 * (toward - 40), 0.6 * toward + 0.4 * 40, 10.0]
    np.testing.assert_allclose(out.x[0, :, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(out.t[0], [0.25, 0.6, 1.0], rtol=1e-6)


@pytest.mark.parametrize("rule", [Flow(expected=True), Flow(expected=True, reedit="always")])
def test_a_flow_passes_the_mean_embedding_on(rule):
    state = dataclasses.replace(state_of([0.0, 0.5]), memory=rule.init_memory(1, 2))
    assert rule(belief_of([0.9, 0.9]), state, step_of(2)).expected
