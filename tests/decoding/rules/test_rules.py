"""Every step rule on beliefs written out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOY
from xflow_jax.decoding.belief import Belief, BeliefOptions
from xflow_jax.decoding.decode import advance
from xflow_jax.decoding.policy import features, init_policy
from xflow_jax.decoding.rules.base import select_highest
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import A_MIN, Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.errors import UserError

YES, NO = True, False


def belief_of(c, second=0.0, entropy=0.0, tokens=None):
    c = jnp.asarray(c, jnp.float32)[None]
    rest = jnp.broadcast_to(jnp.asarray(second, jnp.float32), c.shape)
    top = jnp.stack([c, rest, jnp.zeros_like(c), jnp.zeros_like(c)], axis=-1)
    tokens = jnp.arange(c.shape[1]) if tokens is None else jnp.asarray(tokens)
    ids = jnp.broadcast_to(jnp.arange(4), top.shape)
    return Belief(
        tokens[None], c, top, ids, jnp.broadcast_to(jnp.asarray(entropy, jnp.float32), c.shape)
    )


def state_of(t, x=None, tokens=None):
    t = jnp.asarray(t, jnp.float32)[None]
    x = jnp.zeros((*t.shape, 1)) if x is None else jnp.asarray(x, jnp.float32)[None, :, None]
    tokens = jnp.full(t.shape, 9) if tokens is None else jnp.asarray(tokens)[None]
    return DecodeState(x, t, tokens, jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))


def step_of(n, quota=1, candidates=None, steps_left=4.0, rho=0.0, key=0):
    candidates = jnp.ones((1, n), bool) if candidates is None else jnp.asarray(candidates)[None]
    keys = jax.random.split(jax.random.key(key), 1)
    zero, rho, quota, left = (
        jnp.int32(0),
        jnp.float32(rho),
        jnp.int32(quota),
        jnp.float32(steps_left),
    )
    return Step(zero, zero, rho, quota, left, candidates, keys)


def act(rule, c, t, **more):
    belief = {k: more.pop(k) for k in ("second", "entropy") if k in more}
    action = rule(belief_of(c, **belief), state_of(t), step_of(len(c), **more))
    return tuple(np.asarray(part[0]).tolist() for part in (action.a, action.reset, action.commit))


@pytest.mark.parametrize(
    "score, among, count, chosen",
    [
        ([3, 1, 2, 5], [1, 1, 1, 1], 2, [0, 3]),
        ([1, 1, 1, 1], [1, 1, 1, 1], 2, [0, 1]),  # ties: lowest index first
        ([1, 2, 2, 2], [1, 0, 1, 1], 1, [2]),
        ([3, 1, 2, 5], [1, 1, 0, 0], 3, [0, 1]),  # fewer than asked for
        ([3, 1, 2, 5], [0, 0, 0, 0], 3, []),
        ([3, 1, 2, 5], [1, 1, 1, 1], 0, []),
        ([-math.inf, -math.inf, 0, -1], [0, 1, 0, 0], 1, [1]),  # the worst score is still a score
        ([0.0, -0.0, 0.0], [1, 1, 1], 1, [0]),
    ],
)
def test_highest(score, among, count, chosen):
    out = select_highest(jnp.asarray([score], jnp.float32), jnp.asarray([among], bool), count)
    assert np.flatnonzero(out[0]).tolist() == chosen


def test_highest_is_a_stable_sort():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 5, (40, 17)).astype(np.float32)
    among, count = rng.random((40, 17)) < 0.6, rng.integers(0, 18, (40, 1))
    out = np.asarray(select_highest(jnp.asarray(score), jnp.asarray(among), jnp.asarray(count)))
    for row in range(40):
        order = [i for i in np.argsort(-score[row], kind="stable") if among[row, i]]
        assert set(np.flatnonzero(out[row])) == set(order[: count[row, 0]])


def test_flow_by_hand():
    """a = c ** 2; re-editing where c is more than 0.1 behind t; one commitment among what is then below 0.99."""
    a, reset, commit = act(Flow(), c=[0.5, 0.8, 0.2, 0.85, 0.95], t=[0.0, 0.5, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(a, [0.25, 0.64, 0.04, 0.7225, 0.9025], rtol=1e-6)
    assert reset == [NO, NO, YES, YES, NO]
    # Below 0.99 after the step: 0.25, 0.82, the two that went back; of those the fourth is surest.
    assert commit == [NO, NO, NO, YES, NO]


def test_flow_leaves_committed_ones_alone_where_told():
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
    np.testing.assert_allclose(
        act(Flow(synchronous=True), c, t, steps_left=5.0)[0], [0.2, 0.2], rtol=1e-6
    )
    np.testing.assert_allclose(act(Flow(jump=0.4, creep=0.125), c, t)[0], [1.0, 0.125])


def test_flow_commits_only_candidates_and_the_first_of_equals():
    candidates = [NO, YES, YES, NO]
    _, reset, commit = act(
        Flow(), [0.9, 0.4, 0.4, 0.1], [0.0, 0.1, 0.1, 1.0], candidates=candidates
    )
    assert commit == [NO, YES, NO, NO] and reset == [NO] * 4
    # Everything settled after the step: nothing left to commit.
    assert act(Flow(), [0.999, 0.998], [0.5, 0.9])[2] == [NO, NO]
    assert act(Flow(), [0.995, 0.5], [0.0, 1.0], candidates=[YES, NO])[2] == [NO, NO]


def test_flow_with_a_policy_takes_the_expected_step():
    policy = init_policy(jax.random.key(0), width=8)
    policy = policy.replace(
        params=policy.params | {"w_mu": jnp.ones((8, 1)), "w_kappa": -jnp.ones((8, 1))}
    )
    belief, state, step = belief_of([0.6, 0.3], 0.2), state_of([0.0, 0.4]), step_of(2, rho=0.25)
    action = Flow(policy=policy)(belief, state, step)
    wanted = policy.expected_step(features(belief.top, state.t, 0.25))
    np.testing.assert_allclose(action.a, wanted, rtol=1e-6)
    assert action.a[0, 0] != action.a[0, 1]


@pytest.mark.parametrize(
    "order, chosen",
    [("confidence", [0, 4]), ("entropy", [1, 4]), ("margin", [2, 4])],
)
def test_mask_prediction_orders(order, chosen):
    belief = belief_of(
        [0.9, 0.5, 0.6, 0.99, 0.7], [0.8, 0.4, 0.1, 0.0, 0.3], [2.0, 0.1, 1.5, 0.0, 0.5]
    )
    state = state_of([0, 0, 0, 1, 0])
    action = MaskPrediction(order=order)(belief, state, step_of(5, quota=2))
    assert np.flatnonzero(action.a[0]).tolist() == chosen
    assert not action.reset.any() and not action.commit.any()


def test_random_order_draws_among_the_masked():
    counts = np.zeros(4, int)
    for key in range(60):
        a, _, _ = act(
            MaskPrediction(order="random"), [0.1, 0.9, 0.9, 0.1], [0, 0, 1, 0], quota=1, key=key
        )
        assert sum(a) == 1
        counts += np.asarray(a, int)
    assert counts[2] == 0 and (counts[[0, 1, 3]] > 8).all()


def test_mask_prediction_writes_the_scheduled_number():
    c, t = [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0]
    assert act(MaskPrediction(), c, t, quota=0)[0] == [0, 0, 0, 0]
    assert act(MaskPrediction(), c, t, quota=2)[0] == [0, 1, 1, 0]
    assert act(MaskPrediction(), c, t, quota=9)[0] == [0, 1, 1, 1]
    assert act(MaskPrediction(), c, t, quota=2, candidates=[NO, NO, YES, NO])[0] == [0, 0, 1, 0]


def test_mask_prediction_with_a_threshold():
    """All above it where they are at least the scheduled number, else the scheduled number of the surest."""
    rule, t = MaskPrediction(threshold=0.65), [0, 0, 0, 1]
    assert act(rule, [0.9, 0.8, 0.7, 0.99], t, quota=2)[0] == [1, 1, 1, 0]
    assert act(rule, [0.9, 0.6, 0.5, 0.99], t, quota=2)[0] == [1, 1, 0, 0]
    assert act(rule, [0.6, 0.6, 0.5, 0.99], t, quota=0)[0] == [0, 0, 0, 0]
    # Above is above: LLaDA2.0 keeps c > tau.
    assert act(MaskPrediction(threshold=0.5), [0.5, 0.75, 0.5], [0, 0, 0], quota=1)[0] == [0, 1, 0]


def test_threshold():
    assert act(Threshold(0.5), [0.5, 0.75, 0.25, 0.9], [0, 0, 0, 1])[0] == [
        1,
        1,
        0,
        0,
    ]  # at least: c >= tau
    assert act(Threshold(0.95), [0.5, 0.75, 0.75, 0.9], [0, 0, 0, 1])[0] == [
        0,
        1,
        0,
        0,
    ]  # at least one
    assert act(Threshold(0.5), [0.9, 0.2, 0.3], [0, 0, 0], candidates=[NO, YES, YES])[0] == [
        0,
        0,
        1,
    ]
    assert act(Threshold(0.5), [0.9, 0.9], [1, 1])[0] == [0, 0]
    assert act(Threshold(0.0), [0.1, 0.0], [0, 0])[0] == [1, 1]


def test_what_rules_ask_of_the_belief():
    eos, mask, vocab = TOY.eos_id, TOY.mask_id, TOY.vocab_size
    suppressed = BeliefOptions(never=(mask,), vocab_size=vocab)
    assert Flow().belief_options(TOY, 5) == suppressed
    assert Flow(suppress_mask=False).belief_options(TOY, 5) == BeliefOptions()
    assert (
        Threshold().belief_options(TOY, 5)
        == MaskPrediction().belief_options(TOY, 5)
        == BeliefOptions()
    )
    assert Threshold(suppress_mask=True).belief_options(TOY, 5) == suppressed
    assert MaskPrediction(suppress_mask=True).belief_options(TOY, 5) == suppressed
    assert MaskPrediction(logits_eos_inf=True).belief_options(TOY, 5).never == (eos,)
    doubts = MaskPrediction(confidence_eos_eot_inf=True)
    assert doubts.belief_options(TOY, 5).doubted == (eos, 5)
    assert doubts.belief_options(TOY, None).doubted == (eos,)
    noisy = MaskPrediction(temperature=0.5, cfg_scale=2.0)
    assert noisy.belief_options(TOY, None) == BeliefOptions(temperature=0.5, guidance=2.0)
    assert noisy.needs_keys and MaskPrediction(order="random").needs_keys
    assert not (MaskPrediction().needs_keys or Flow().needs_keys or Threshold().needs_keys)


def test_rules_compare_by_their_options():
    assert Threshold(0.5) == Threshold(0.5) != Threshold(0.6)
    assert jax.tree.structure(MaskPrediction()) != jax.tree.structure(
        MaskPrediction(order="entropy")
    )
    assert jax.tree.leaves(Flow()) == []


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: MaskPrediction(order="best"),
            "order must be confidence, random, entropy or margin, not 'best'",
        ),
        (lambda: MaskPrediction(temperature=-1.0), "temperature must be at least 0, not -1.0"),
        (lambda: MaskPrediction(cfg_scale=-0.5), "cfg_scale must be at least 0, not -0.5"),
        (lambda: MaskPrediction(threshold=1.5), "threshold must be between 0 and 1, not 1.5"),
        (lambda: Threshold(-0.1), "tau must be between 0 and 1, not -0.1"),
        (lambda: Threshold(math.nan), "tau must be between 0 and 1, not nan"),
        (lambda: Flow(power=-2.0), "power must be at least 0, not -2.0"),
        (lambda: Flow(reedit_margin=-0.1), "reedit_margin must be at least 0, not -0.1"),
        (lambda: Flow(jump=2.0), "jump must be between 0 and 1, not 2.0"),
    ],
)
def test_impossible_rules(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


# --- what an action does


def after(t, x, c, tokens, standing, a, reset, commit, candidates, mask_id=99):
    """`advance` in one dimension: token k has the embedding 10 k, the mask embedding is -1."""
    from xflow_jax.decoding.rules.base import Action

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
    # moved by a quarter; arrived; reset to c x_pred + (1 - c) m; stays at t = 1; re-edited there; not a candidate; and
    # a predicted mask token changes nothing but the prediction.
    np.testing.assert_allclose(
        x, [4.0, 20.0, 0.2 * 30 - 0.8, 30.0, 0.2 * 50 - 0.8, 2.0, -1.0], rtol=1e-6
    )
    np.testing.assert_allclose(t, [0.625, 1.0, 0.2, 1.0, 0.2, 0.5, 0.0], rtol=1e-6)
    assert tokens.tolist() == [1, 2, 3, 3, 5, 7, 99]


def test_a_commitment_wins_over_a_step_and_over_a_reset():
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
    assert (
        x.tolist() == [10.0, 20.0, 50.0]
        and t.tolist() == [1.0, 1.0, 1.0]
        and tokens.tolist() == [1, 2, 5]
    )


def test_the_velocitys_division_cancels():
    """x + (x_pred - x) / (1 - t) * a (1 - t), right up to t = 1."""
    t = np.array([0.0, 0.9, 1 - 2**-24])
    x, new, _ = after(
        t, [2.0] * 3, [0.9] * 3, [3] * 3, [9] * 3, [0.5] * 3, [NO] * 3, [NO] * 3, [YES] * 3
    )
    np.testing.assert_allclose(x, 2 + (30 - 2) / (1 - t) * 0.5 * (1 - t), rtol=1e-6)
    assert (new >= t).all() and (new <= 1).all()
