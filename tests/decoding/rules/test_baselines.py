"""The field's decoders on beliefs written out by hand, and on a model of ten tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.rules.test_rules import NO, YES, act, belief_of, state_of, step_of
from tests.helpers import random_prompts, stub
from tests.llada2_helpers import TINY2, random_params
from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.decode import advance, decode
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.baselines import (
    Editing,
    EntropyBounded,
    Factor,
    Klass,
    SoftMask,
    top_divergence,
)
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError
from xflow_jax.lm import LM
from xflow_jax.models.factory import build

RIVALS = {
    "factor": Factor(1.5),
    "eb": EntropyBounded(0.8),
    "klass": Klass(tau=0.4, epsilon=0.2, history=1),
    "soft": SoftMask(),
    "edit": Editing(tau=0.5, tau_edit=0.2),
}


def chosen(rule, c, t, **more):
    return np.flatnonzero(act(rule, c, t, **more)[0]).tolist()


def test_factor_by_hand():
    # In order of c: (n + 1)(1 - c(n)) is 2 * 0.1 = 0.2, 3 * 0.2 = 0.6, 4 * 0.25 = 1.0, 5 * 0.5 = 2.5.
    c, t = [0.5, 0.9, 0.75, 0.8, 0.99], [0, 0, 0, 0, 1]
    assert chosen(Factor(1.0), c, t) == [1, 3]  # below the factor, not at it
    assert chosen(Factor(1.01), c, t) == [1, 2, 3]
    assert chosen(Factor(0.1), c, t) == [1]  # at least one
    assert chosen(Factor(9.0), c, t) == [0, 1, 2, 3]
    assert chosen(Factor(9.0), c, [1] * 5) == []
    # The largest n counts, though a smaller one may fail: 2 * 0.4 = 0.8, 3 * 0.4 = 1.2, 4 * 0.4 = 1.6.
    assert chosen(Factor(1.3), [0.6, 0.6, 0.6], [0, 0, 0]) == [0, 1]
    assert chosen(Factor(1.0), c, t, candidates=[YES, NO, YES, YES, YES]) == [
        2,
        3,
    ]  # 2 * 0.2, 3 * 0.25, 4 * 0.5


def test_entropy_bounded_by_hand():
    # In order of H: 0.1, 0.2, 0.4, 0.9; the sums without the largest: 0, 0.1, 0.3, 0.7.
    c, t, entropy = [0.5] * 5, [0, 0, 0, 0, 1], [0.4, 0.1, 0.9, 0.2, 0.0]
    for gamma, places in (
        (0.0, [1]),
        (0.11, [1, 3]),
        (0.31, [0, 1, 3]),
        (0.69, [0, 1, 3]),
        (0.71, [0, 1, 2, 3]),
    ):
        assert chosen(EntropyBounded(gamma), c, t, entropy=entropy) == places
    assert chosen(EntropyBounded(0.0), [0.5] * 3, [0] * 3, entropy=[0.0, 0.0, 0.3]) == [0, 1, 2]
    assert chosen(EntropyBounded(1.0), c, [1] * 5, entropy=entropy) == []


def belief4(p, ids):
    """A belief whose four likeliest tokens are given for each position, [N, 4] each."""
    p, ids = jnp.asarray(p, jnp.float32)[None], jnp.asarray(ids)[None]
    return Belief(ids[..., 0], p[..., 0], p, ids, jnp.zeros(p.shape[:2]))


def test_divergence_by_hand():
    before = belief4([[0.5, 0.25, 0.125, 0.125]] * 3 + [[0.4, 0.3, 0.1, 0.1]], [[3, 1, 2, 0]] * 4)
    now = belief4(
        [
            [0.5, 0.25, 0.125, 0.125],
            [0.5, 0.25, 0.125, 0.125],
            [0.7, 0.2, 0.1, 0.0],
            [0.4, 0.3, 0.1, 0.1],
        ],
        [[3, 1, 2, 0], [1, 3, 2, 0], [3, 7, 1, 9], [3, 1, 2, 5]],
    )
    kl = top_divergence(now, before.top, before.top_tokens)[0]
    assert kl[0] == 0
    np.testing.assert_allclose(kl[1], 0.5 * math.log(2) - 0.25 * math.log(2), rtol=1e-5)
    # 7 was not among the four: at most 0.125, like the fourth.
    third = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.125) + 0.1 * math.log(0.1 / 0.25)
    np.testing.assert_allclose(kl[2], third, rtol=1e-5)
    # Of the fourth, 5 may have been as likely as 0 was, and what is left over has stayed the same.
    np.testing.assert_allclose(kl[3], 0.0, atol=1e-6)
    assert (
        top_divergence(
            belief4([[1, 0, 0, 0]], [[4, 5, 6, 7]]), jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4), int)
        )
        > 20
    )


def test_klass_waits_for_a_stable_belief():
    rule, steady, other = (
        Klass(tau=0.6, epsilon=0.05, history=2),
        [0.9, 0.1, 0, 0],
        [0.7, 0.3, 0, 0],
    )
    state = state_of([0, 0, 0, 1]).replace(memory=rule.init_memory(1, 4))
    seen = []
    for turn in range(4):
        # The first is sure and steady; the second sure, but of another token in the third step; the third never sure.
        second = [2, 1, 0, 3] if turn == 2 else [1, 2, 0, 3]
        belief = belief4(
            [steady, other, [0.5, 0.5, 0, 0], steady],
            [[1, 2, 0, 3], second, [1, 2, 0, 3], [1, 2, 0, 3]],
        )
        action = rule(belief, state, step_of(4, quota=1))
        state = state.replace(memory=action.memory)
        seen.append(np.flatnonzero(action.a[0]).tolist())
    assert seen == [
        [0],
        [0],
        [0],
        [0],
    ]  # at first the surest one by the schedule, from the third step the stable one
    np.testing.assert_array_equal(state.memory["stable"][0], [3, 0, 3, 3])
    # Now all three of them are stable but for the second, and the third is not sure.
    action = rule(belief, state.replace(t=jnp.asarray([[1.0, 0, 0, 1]])), step_of(4, quota=2))
    assert np.flatnonzero(action.a[0]).tolist() == [1, 2]  # none is ready: the scheduled number
    lower = Klass(tau=0.4, epsilon=0.05, history=2)
    action = lower(belief, state, step_of(4, quota=1))
    assert np.flatnonzero(action.a[0]).tolist() == [0, 2]


def test_klass_remembers_nothing_of_other_blocks():
    rule = Klass(history=1)
    state = state_of([0, 0]).replace(memory=rule.init_memory(1, 2))
    belief = belief4([[0.9, 0.1, 0, 0]] * 2, [[1, 2, 0, 3]] * 2)
    memory = rule(belief, state, step_of(2, candidates=[YES, NO])).memory
    np.testing.assert_allclose(memory["top"][0], [[0.9, 0.1, 0, 0], [0, 0, 0, 0]])
    assert memory["stable"].tolist() == [[0, 0]]  # there was no belief before


def test_soft_masks_by_hand():
    rule = SoftMask(likeliest=2, scale=0.8, steepness=2.0, offset=-0.5)
    belief = belief4([[0.6, 0.2, 0.1, 0.1], [0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]], [[1, 2, 3, 4]] * 3)
    belief = belief.replace(entropy=jnp.asarray([[1.0, 0.5, 0.2]]))
    action = rule(belief, state_of([0, 0, 0]), step_of(3, quota=1))
    assert action.a[0].tolist() == [0, 0, 1]
    share = [0.8 / (1 + math.exp(1.0)), 0.4]  # 2 (-1 + 0.5) = -1; 2 (-0.5 + 0.5) = 0
    np.testing.assert_allclose(
        action.mixture[0, 0], [share[0] * 0.75, share[0] * 0.25, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(action.mixture[0, 1], [0.2, 0.2, 0, 0], rtol=1e-6)


def test_masks_that_stay_are_fed_in_as_mixtures():
    """One step of the real loop: where no token was written, x is (1 - l) m + l (p~1 W1 + p~2 W2 + p~3 W3), t is 0."""
    lm, rule = stub(), SoftMask(scale=0.9)
    prompt, keys = jnp.asarray([[3, 1, 4]]), jax.random.split(jax.random.key(0), 1)
    settings = DecodeConfig(4, 4, 4, trace=True)
    once = lambda f, start, xs: jax.lax.scan(f, start, jax.tree.map(lambda x: x[:1], xs))  # noqa: E731
    state, trace = decode(
        lm.model, lm.params, rule, settings, prompt, jnp.ones_like(prompt, bool), keys, scan=once
    )
    table = np.asarray(lm.params["wte"]["embedding"])
    written = np.asarray(state.t[0]) == 1
    assert written.sum() == 1 and (state.t[0][~written] == 0).all()
    place = np.flatnonzero(~written)[0]
    p, ids = np.asarray(trace.top[0, 0, place])[:3], np.asarray(trace.top_tokens[0, 0, place])[:3]
    mean, mask = (p / p.sum()) @ table[ids], table[lm.config.mask_id]
    share = (np.asarray(state.x[0, place]) - mask) / (mean - mask)
    np.testing.assert_allclose(share, share[0], rtol=1e-3)
    assert 0 < share[0] < 0.9
    np.testing.assert_allclose(state.x[0, written], table[np.asarray(state.tokens[0])[written]])


def test_editing_by_hand():
    rule = Editing(tau=0.6, tau_edit=0.5)
    # Two masks of which one is sure; a written 5 that should be 2, a written 3 that stays, a doubt too weak to count.
    belief = belief_of([0.9, 0.55, 0.6, 0.99, 0.4], tokens=[0, 1, 2, 3, 4])
    state = state_of([0, 0, 1, 1, 1], tokens=[9, 9, 5, 3, 7]).replace(memory=rule.init_memory(1, 5))
    action = rule(belief, state, step_of(5, quota=1))
    assert action.a[0].tolist() == [1, 0, 0, 0, 0]
    assert np.flatnonzero(action.reset[0] & action.commit[0]).tolist() == [
        2
    ] and action.memory.tolist() == [True]
    x_pred = belief.tokens[..., None] * 10.0
    after = advance(
        state, belief, action, jnp.ones((1, 5), bool), x_pred, jnp.full((1, 1, 1), -1.0), 99
    )
    assert after.tokens[0].tolist() == [0, 1, 2, 3, 7] and after.t[0].tolist() == [1, 0, 1, 1, 1]
    assert after.x[0, [0, 2], 0].tolist() == [0.0, 20.0]
    # A replacement by the mask token would be none.
    masked = advance(
        state, belief, action, jnp.ones((1, 5), bool), x_pred, jnp.full((1, 1, 1), -1.0), 2
    )
    assert masked.tokens[0].tolist() == [0, 1, 5, 3, 7]
    # Fewer sure ones than scheduled: the scheduled number. Nothing to change: the row is done.
    assert rule(belief, state, step_of(5, quota=2)).a[0].tolist() == [1, 1, 0, 0, 0]
    done = rule(belief, state_of([1] * 5, tokens=[0, 1, 2, 3, 7]), step_of(5))
    assert (
        done.memory.tolist() == [False]
        and not rule.is_open(state_of([1] * 5).replace(memory=done.memory)).any()
    )
    assert rule.is_open(state_of([1] * 5).replace(memory=action.memory)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_decode_rows_by_themselves(name):
    """Whatever a rule remembers, a row's answer is that of the row alone, blocks and early exits included."""
    lm, prompts = stub(sharpness=2.0), random_prompts([3, 5, 5, 2], top=8)
    run = lambda rows: generate(lm, rows, RIVALS[name], 8, 8, block_length=4)  # noqa: E731
    together = run(prompts)
    assert (together.forward_passes <= 8).all() and (together.progress == 1).any()
    for i in range(4):
        alone = run(prompts[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        assert alone.forward_passes[0] == together.forward_passes[i]


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_decode_from_a_cache_as_without_one(name):
    model = build(TINY2)
    lm = LM(model, TINY2, random_params(model), None)
    prompts = random_prompts([3, 9, 6], top=38)
    cached, plain = (
        generate(lm, prompts, RIVALS[name], 12, 12, block_length=4, cache=on)
        for on in (True, False)
    )
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_array_equal(cached.forward_passes, plain.forward_passes)


def test_editing_stops_when_nothing_changes_and_never_differs_for_it():
    lm, prompts = stub(sharpness=1.0), random_prompts([3, 5, 5, 2, 4, 6], top=8)
    rule = Editing(tau=0.3, tau_edit=0.5)
    early, late = (
        generate(lm, prompts, rule, 8, 16, early_exit=on, trace=True) for on in (True, False)
    )
    np.testing.assert_array_equal(early.tokens, late.tokens)
    assert early.forward_passes.mean() < 16 and (late.forward_passes == 16).all()
    assert late.trace.reedited.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factor(-1.0), "factor must be at least 0, not -1.0"),
        (lambda: EntropyBounded(-0.5), "gamma must be at least 0, not -0.5"),
        (lambda: Klass(tau=1.2), "tau must be between 0 and 1, not 1.2"),
        (
            lambda: SoftMask(order="random"),
            "order must be confidence, entropy or margin, not 'random'",
        ),
        (lambda: SoftMask(likeliest=5), "likeliest must be between 1 and 4, not 5"),
        (lambda: Editing(tau_edit=2.0), "tau_edit must be between 0 and 1, not 2.0"),
    ],
)
def test_impossible_rivals(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message
