"""The flow's step fractions, resets and commitments on beliefs written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.decoding.helpers import NO, YES, act, belief_of, state_of, step_of
from xflow_jax.decoding.policy import features, init_policy
from xflow_jax.decoding.rules.flow import A_MIN, Flow


def test_flow_by_hand():
    a, reset, commit = act(Flow(), c=[0.5, 0.8, 0.2, 0.85, 0.95], t=[0.0, 0.5, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(a, [0.25, 0.64, 0.04, 0.7225, 0.9025], rtol=1e-6)  # c ** 2
    assert reset == [NO, NO, YES, YES, NO]  # c is more than 0.1 behind t
    # Below 0.99 after the step: 0.25, 0.82, and the two resets. The fourth has the highest c.
    assert commit == [NO, NO, NO, YES, NO]


def test_flow_without_revision_keeps_committed_positions():
    _, reset, commit = act(Flow(revise_committed=False), c=[0.5, 0.2, 0.3], t=[0.0, 1.0, 0.99])
    assert reset == [NO, NO, YES]
    assert commit == [YES, NO, NO]


def test_flow_switches():
    c, t = [0.5, 0.2], [0.2, 0.9]
    assert act(Flow(reedit_margin=None), c, t)[1] == [NO, NO]
    assert act(Flow(reedit_margin=0.75), c, t)[1] == [NO, NO]
    assert act(Flow(reedit_margin=0.65), c, t)[1] == [NO, YES]
    assert act(Flow(commit=False), c, t)[2] == [NO, NO]
    np.testing.assert_allclose(act(Flow(power=3.0), c, t)[0], [0.125, 0.008], rtol=1e-5)
    np.testing.assert_allclose(act(Flow(power=1.0), [1e-4, 1.0], t)[0], [A_MIN, 1.0])
    synchronous = act(Flow(synchronous=True), c, t, steps_left=5.0)[0]
    np.testing.assert_allclose(synchronous, [0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(act(Flow(jump=0.4, creep=0.125), c, t)[0], [1.0, 0.125])


def test_flow_commits_only_candidates_and_the_first_of_equals():
    c, t, candidates = [0.9, 0.4, 0.4, 0.1], [0.0, 0.1, 0.1, 1.0], [NO, YES, YES, NO]
    _, reset, commit = act(Flow(), c, t, candidates=candidates)
    assert commit == [NO, YES, NO, NO] and reset == [NO] * 4
    # Everything is settled after the step, so nothing is left to commit.
    assert act(Flow(), [0.999, 0.998], [0.5, 0.9])[2] == [NO, NO]
    assert act(Flow(), [0.995, 0.5], [0.0, 1.0], candidates=[YES, NO])[2] == [NO, NO]


def test_flow_with_a_policy_takes_the_expected_step():
    policy = init_policy(jax.random.key(0), width=8)
    heads = {"w_mu": jnp.ones((8, 1)), "w_kappa": -jnp.ones((8, 1))}
    policy = policy.replace(params={**policy.params, **heads})
    belief, state, step = belief_of([0.6, 0.3], 0.2), state_of([0.0, 0.4]), step_of(2, rho=0.25)
    action = Flow(policy=policy)(belief, state, step)
    wanted = policy.expected_step(features(belief.top, state.t, 0.25))
    np.testing.assert_allclose(action.a, wanted, rtol=1e-6)
    assert action.a[0, 0] != action.a[0, 1]
