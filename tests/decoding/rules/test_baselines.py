"""The field's decoders on beliefs written by hand, and on a model of ten tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import (
    NO,
    YES,
    act,
    belief_of,
    belief_of_four,
    committed,
    state_of,
    step_of,
)
from tests.helpers import random_prompts, stub
from tests.llada2_helpers import TINY2, random_params
from xflow_jax.decoding.decode import advance, decode
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.baselines import (
    Editing,
    EntropyBounded,
    Factor,
    Klass,
    SoftMask,
    Threshold,
    top_divergence,
)
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError
from xflow_jax.lm import LM
from xflow_jax.models.factory import build

BASELINES = {
    "factor": Factor(1.5),
    "eb": EntropyBounded(0.8),
    "klass": Klass(tau=0.4, epsilon=0.2, history=1),
    "soft": SoftMask(),
    "edit": Editing(tau=0.5, tau_edit=0.2),
}


def test_threshold():
    assert act(Threshold(0.5), [0.5, 0.75, 0.25, 0.9], [0, 0, 0, 1])[0] == [1, 1, 0, 0]  # c >= tau
    # At least one.
    assert act(Threshold(0.95), [0.5, 0.75, 0.75, 0.9], [0, 0, 0, 1])[0] == [0, 1, 0, 0]
    c, t, candidates = [0.9, 0.2, 0.3], [0, 0, 0], [NO, YES, YES]
    assert act(Threshold(0.5), c, t, candidates=candidates)[0] == [0, 0, 1]
    assert act(Threshold(0.5), [0.9, 0.9], [1, 1])[0] == [0, 0]
    assert act(Threshold(0.0), [0.1, 0.0], [0, 0])[0] == [1, 1]


def test_factor_by_hand():
    # In order of c, (n + 1)(1 - c(n)) is 2 * 0.1 = 0.2, 3 * 0.2 = 0.6, 4 * 0.25 = 1, 5 * 0.5 = 2.5.
    c, t = [0.5, 0.9, 0.75, 0.8, 0.99], [0, 0, 0, 0, 1]
    assert committed(Factor(1.0), c, t) == [1, 3]  # below the factor, not at it
    assert committed(Factor(1.01), c, t) == [1, 2, 3]
    assert committed(Factor(0.1), c, t) == [1]  # at least one
    assert committed(Factor(9.0), c, t) == [0, 1, 2, 3]
    assert committed(Factor(9.0), c, [1] * 5) == []
    # The largest n counts: 2 * 0.4 = 0.8, 3 * 0.4 = 1.2, 4 * 0.4 = 1.6.
    assert committed(Factor(1.3), [0.6, 0.6, 0.6], [0, 0, 0]) == [0, 1]
    # Without the first candidate: 2 * 0.2, 3 * 0.25, 4 * 0.5.
    assert committed(Factor(1.0), c, t, candidates=[YES, NO, YES, YES, YES]) == [2, 3]


def test_entropy_bounded_by_hand():
    # In order of H: 0.1, 0.2, 0.4, 0.9. The sums without the largest: 0, 0.1, 0.3, 0.7.
    c, t, entropy = [0.5] * 5, [0, 0, 0, 0, 1], [0.4, 0.1, 0.9, 0.2, 0.0]
    for gamma, places in (
        (0.0, [1]),
        (0.11, [1, 3]),
        (0.31, [0, 1, 3]),
        (0.69, [0, 1, 3]),
        (0.71, [0, 1, 2, 3]),
    ):
        assert committed(EntropyBounded(gamma), c, t, entropy=entropy) == places
    assert committed(EntropyBounded(0.0), [0.5] * 3, [0] * 3, entropy=[0.0, 0.0, 0.3]) == [0, 1, 2]
    assert committed(EntropyBounded(1.0), c, [1] * 5, entropy=entropy) == []


def test_divergence_by_hand():
    p = [0.5, 0.25, 0.125, 0.125]
    before = belief_of_four([p, p, p, [0.4, 0.3, 0.1, 0.1]], [[3, 1, 2, 0]] * 4)
    now = belief_of_four(
        [p, p, [0.7, 0.2, 0.1, 0.0], [0.4, 0.3, 0.1, 0.1]],
        [[3, 1, 2, 0], [1, 3, 2, 0], [3, 7, 1, 9], [3, 1, 2, 5]],
    )
    kl = top_divergence(now, before.top, before.top_tokens)[0]
    assert kl[0] == 0
    np.testing.assert_allclose(kl[1], 0.5 * math.log(2) - 0.25 * math.log(2), rtol=1e-5)
    # 7 was not among the four, so it counts with the fourth's 0.125, its upper bound.
    third = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.125) + 0.1 * math.log(0.1 / 0.25)
    np.testing.assert_allclose(kl[2], third, rtol=1e-5)
    # 5 counts with the probability that 0 had, and the rest is the same as before.
    np.testing.assert_allclose(kl[3], 0.0, atol=1e-6)
    certain = belief_of_four([[1, 0, 0, 0]], [[4, 5, 6, 7]])
    assert top_divergence(certain, jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4), int)) > 20


def test_klass_waits_for_a_stable_belief():
    rule = Klass(tau=0.6, epsilon=0.05, history=2)
    confident, other = [0.9, 0.1, 0, 0], [0.7, 0.3, 0, 0]
    state = state_of([0, 0, 0, 1]).replace(memory=rule.init_memory(1, 4))
    chosen = []
    for turn in range(4):
        # The first position is confident and stable. The second is confident, but predicts another
        # token in the third step. The third is never confident.
        second = [2, 1, 0, 3] if turn == 2 else [1, 2, 0, 3]
        belief = belief_of_four(
            [confident, other, [0.5, 0.5, 0, 0], confident],
            [[1, 2, 0, 3], second, [1, 2, 0, 3], [1, 2, 0, 3]],
        )
        action = rule(belief, state, step_of(4, quota=1))
        state = state.replace(memory=action.memory)
        chosen.append(np.flatnonzero(action.a[0]).tolist())
    # The first two steps write the scheduled number, the others the stable one.
    assert chosen == [[0], [0], [0], [0]]
    np.testing.assert_array_equal(state.memory["stable"][0], [3, 0, 3, 3])
    # With the first one written, no mask is both confident and stable: the scheduled number.
    action = rule(belief, state.replace(t=jnp.asarray([[1.0, 0, 0, 1]])), step_of(4, quota=2))
    assert np.flatnonzero(action.a[0]).tolist() == [1, 2]
    lower = Klass(tau=0.4, epsilon=0.05, history=2)
    action = lower(belief, state, step_of(4, quota=1))
    assert np.flatnonzero(action.a[0]).tolist() == [0, 2]


@pytest.mark.parametrize("history", [1, 2, 3])
def test_klass_writes_all_masks_once_their_belief_is_old_enough(history):
    rule = Klass(tau=0.6, epsilon=0.05, history=history)
    state = state_of([0, 0]).replace(memory=rule.init_memory(1, 2))
    belief = belief_of_four([[0.9, 0.1, 0, 0]] * 2, [[1, 2, 0, 3]] * 2)
    for turn in range(5):  # no belief changes, so it is stable in all turns but the first
        action = rule(belief, state, step_of(2, quota=1))
        state = state.replace(memory=action.memory)
        assert action.a[0].sum() == (2 if turn >= history else 1), turn


def test_klass_remembers_nothing_of_other_blocks():
    rule = Klass(history=1)
    state = state_of([0, 0]).replace(memory=rule.init_memory(1, 2))
    belief = belief_of_four([[0.9, 0.1, 0, 0]] * 2, [[1, 2, 0, 3]] * 2)
    memory = rule(belief, state, step_of(2, candidates=[YES, NO])).memory
    np.testing.assert_allclose(memory["top"][0], [[0.9, 0.1, 0, 0], [0, 0, 0, 0]])
    assert memory["stable"].tolist() == [[0, 0]]  # there was no belief before


def test_soft_masks_by_hand():
    rule = SoftMask(likeliest=2, scale=0.8, steepness=2.0, offset=-0.5)
    p = [[0.6, 0.2, 0.1, 0.1], [0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]]
    belief = belief_of_four(p, [[1, 2, 3, 4]] * 3)
    belief = belief.replace(entropy=jnp.asarray([[1.0, 0.5, 0.2]]))
    action = rule(belief, state_of([0, 0, 0]), step_of(3, quota=1))
    assert action.a[0].tolist() == [0, 0, 1]
    # The sigmoid is of 2 (-1 + 0.5) = -1 and of 2 (-0.5 + 0.5) = 0.
    share = 0.8 / (1 + math.exp(1.0))
    np.testing.assert_allclose(action.mixture[0, 0], [share * 0.75, share * 0.25, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(action.mixture[0, 1], [0.2, 0.2, 0, 0], rtol=1e-6)


def test_masks_that_stay_get_mixed_inputs():
    """After one step, x of a mask is (1 - l) m + l (p1 W1 + p2 W2 + p3 W3), and t is 0."""
    lm, rule = stub(), SoftMask(scale=0.9)
    prompt, keys = jnp.asarray([[3, 1, 4]]), jax.random.split(jax.random.key(0), 1)
    config = DecodeConfig(4, 4, 4, trace=True)

    def scan_first(f, start, xs):
        return jax.lax.scan(f, start, jax.tree.map(lambda x: x[:1], xs))

    mask = jnp.ones_like(prompt, bool)
    state, trace = decode(lm.model, lm.params, rule, config, prompt, mask, keys, scan=scan_first)
    table = np.asarray(lm.params["wte"]["embedding"])
    written = np.asarray(state.t[0]) == 1
    assert written.sum() == 1 and (state.t[0][~written] == 0).all()
    place = np.flatnonzero(~written)[0]
    p, ids = np.asarray(trace.top[0, 0, place])[:3], np.asarray(trace.top_tokens[0, 0, place])[:3]
    mean, m = (p / p.sum()) @ table[ids], table[lm.config.mask_id]
    share = (np.asarray(state.x[0, place]) - m) / (mean - m)
    np.testing.assert_allclose(share, share[0], rtol=1e-3)
    assert 0 < share[0] < 0.9
    np.testing.assert_allclose(state.x[0, written], table[np.asarray(state.tokens[0])[written]])


def test_editing_by_hand():
    rule = Editing(tau=0.6, tau_edit=0.5)
    # Two masks, of which one is confident. A written 5 that should be 2, a written 3 that stays,
    # and a prediction for the 7 that is not confident.
    belief = belief_of([0.9, 0.55, 0.6, 0.99, 0.4], tokens=[0, 1, 2, 3, 4])
    state = state_of([0, 0, 1, 1, 1], tokens=[9, 9, 5, 3, 7]).replace(memory=rule.init_memory(1, 5))
    action = rule(belief, state, step_of(5, quota=1))
    assert action.a[0].tolist() == [1, 0, 0, 0, 0]
    assert np.flatnonzero(action.reset[0] & action.commit[0]).tolist() == [2]
    assert action.memory.tolist() == [16]  # steps that may follow once there is no mask
    # Fewer confident masks than scheduled: the scheduled number.
    assert rule(belief, state, step_of(5, quota=2)).a[0].tolist() == [1, 1, 0, 0, 0]


def test_an_edit_replaces_the_token():
    rule = Editing(tau=0.6, tau_edit=0.5)
    belief = belief_of([0.9, 0.55, 0.6, 0.99, 0.4], tokens=[0, 1, 2, 3, 4])
    state = state_of([0, 0, 1, 1, 1], tokens=[9, 9, 5, 3, 7]).replace(memory=rule.init_memory(1, 5))
    action = rule(belief, state, step_of(5, quota=1))
    x_pred, m = belief.tokens[..., None] * 10.0, jnp.full((1, 1, 1), -1.0)
    run = functools.partial(advance, state, belief, action, jnp.ones((1, 5), bool), x_pred, m)
    after = run(99)
    assert after.tokens[0].tolist() == [0, 1, 2, 3, 7] and after.t[0].tolist() == [1, 0, 1, 1, 1]
    assert after.x[0, [0, 2], 0].tolist() == [0.0, 20.0]
    # The mask token is no replacement.
    assert run(2).tokens[0].tolist() == [0, 1, 5, 3, 7]


def test_editing_is_done_if_nothing_changes():
    rule = Editing(tau=0.6, tau_edit=0.5)
    belief = belief_of([0.9, 0.55, 0.6, 0.99, 0.4], tokens=[0, 1, 2, 3, 4])
    written = state_of([1] * 5, tokens=[0, 1, 2, 3, 7]).replace(memory=jnp.array([16]))
    action = rule(belief, written, step_of(5))
    assert action.memory.tolist() == [0]
    assert not rule.is_open(written.replace(memory=action.memory)).any()
    assert rule.is_open(written.replace(memory=jnp.array([1]))).all()


def test_editing_stops_at_its_cap():
    """A token that flips for ever is edited in each step that is left, and not once more."""
    rule = Editing(tau=0.6, tau_edit=0.5)
    belief = belief_of([0.9] * 3, tokens=[0, 1, 2])
    for left, edits, after in ((2, [2], [1]), (1, [2], [0]), (0, [], [0])):
        written = state_of([1] * 3, tokens=[0, 1, 7]).replace(memory=jnp.array([left]))
        action = rule(belief, written, step_of(3))
        assert np.flatnonzero(action.reset[0]).tolist() == edits
        assert action.memory.tolist() == after


def test_the_modes_of_editing_have_names():
    assert Editing().thresholds == (0.7, 0.5)
    assert Editing(mode="speed").thresholds == (0.5, 0.0)
    assert Editing(mode="default", tau=0.8).thresholds == (0.8, 0.9)
    for options in (
        {"mode": "fast"},
        {"num_to_transfer": 0},
        {"tau_edit": 2.0},
        {"max_post_steps": -1},
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            Editing(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_rows_do_not_depend_on_their_batch(name):
    """With memory, blocks and early exits too."""
    lm, prompts = stub(sharpness=2.0), random_prompts([3, 5, 5, 2], top=8)
    run = functools.partial(
        generate, lm, rule=BASELINES[name], gen_length=8, steps=8, block_length=4
    )
    together = run(prompts)
    assert (together.forward_passes <= 8).all() and (together.progress == 1).any()
    for i in range(4):
        alone = run(prompts[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        assert alone.forward_passes[0] == together.forward_passes[i]


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_a_cache_changes_no_token(name):
    model = build(TINY2)
    lm = LM(model, TINY2, random_params(model), None)
    prompts = random_prompts([3, 9, 6], top=38)
    cached, plain = (
        generate(lm, prompts, BASELINES[name], 12, 12, block_length=4, cache=on)
        for on in (True, False)
    )
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_array_equal(cached.forward_passes, plain.forward_passes)


def test_early_exit_of_editing_changes_no_token():
    lm, prompts = stub(sharpness=1.0), random_prompts([3, 5, 5, 2, 4, 6], top=8)
    rule = Editing(tau=0.3, tau_edit=0.5)
    early, late = (
        generate(lm, prompts, rule, 8, 16, early_exit=on, trace=True) for on in (True, False)
    )
    np.testing.assert_array_equal(early.tokens, late.tokens)
    most = 16 + rule.max_post_steps
    assert early.forward_passes.mean() < 16 and (late.forward_passes == most).all()
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
def test_impossible_options(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message
