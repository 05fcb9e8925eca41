"""Re-editing at disagreement and in every step, and DMax, on beliefs written by hand."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import NO, YES, act, belief_of, state_of, step_of
from xflow_jax.decoding.decode import move_positions
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.revision import DMax, Revision
from xflow_jax.errors import UserError


def state_with(rule, t, tokens=None, memory=None):
    """A state of one row with the rule's first memory, or another."""
    first = rule.init_memory(1, len(t)) if memory is None else memory
    return dataclasses.replace(state_of(t, tokens=tokens), memory=first)


def memory_of(over, passes):
    return Revision(jnp.asarray([over]), jnp.asarray([passes], jnp.int32))


def call(rule, c, t, tokens=None, memory=None, **options):
    action = rule(belief_of(c), state_with(rule, t, tokens, memory), step_of(len(c), **options))
    return action, np.flatnonzero(action.reset[0]).tolist()


def test_a_token_that_the_model_surely_contradicts_is_reedited_at_disagreement_alone():
    # Position i predicts token i. The tokens that stand are 0, 7 and 7.
    c, t, tokens = [0.97, 0.97, 0.4], [1.0, 1.0, 1.0], [0, 7, 7]
    assert call(Flow(), c, t, tokens)[1] == [2]  # c is far behind t, whatever stands there
    assert call(Flow(reedit="disagreement"), c, t, tokens)[1] == [1]
    assert call(Flow(reedit="disagreement", reedit_above=0.3), c, t, tokens)[1] == [1, 2]
    assert call(Flow(reedit="disagreement", reedit_above=0.98), c, t, tokens)[1] == []
    fixed = Flow(reedit="disagreement", revise_committed=False)
    assert call(fixed, c, t, tokens)[1] == [] and not fixed.revises


def test_no_token_stands_where_little_progress_was_made():
    rule, c, tokens = Flow(reedit="disagreement"), [0.9, 0.9], [7, 7]
    assert call(rule, c, [0.4, 0.6], tokens)[1] == [1]
    assert call(rule, c, [1.0, 1.0], tokens, candidates=[NO, YES])[1] == [1]


def test_everything_that_has_entered_is_reedited_in_every_step():
    rule = Flow(reedit="always", jump=0.7)
    action, reset = call(rule, c=[0.8, 0.6, 0.3, 0.2], t=[0.0, 0.0, 0.5, 0.9])
    assert reset == [0, 2, 3]  # a mask above 0.7, and the two that have entered
    assert not np.any(action.a) and not np.any(action.commit)
    assert call(rule, c=[0.2, 0.6, 0.3], t=[0.0, 0.0, 0.5])[1] == [1, 2]  # at least the surest mask
    assert call(rule, c=[0.9, 0.9], t=[0.0, 0.5], candidates=[NO, YES])[1] == [1]
    assert call(Flow(reedit="always"), c=[0.91, 0.9, 0.95], t=[0.0] * 3)[1] == [0, 2]


def test_a_factor_bounds_the_entries_together():
    c, t = [0.8, 0.75, 0.9, 0.3, 0.99], [0.0, 0.0, 0.0, 0.0, 0.5]
    # (n + 1)(1 - c(n)) of the masks in order: 0.2, 0.6, 1, 3.5. The last position has entered.
    assert call(Flow(reedit="always", factor=0.7), c, t)[1] == [0, 2, 4]
    assert call(Flow(reedit="always", factor=0.5), c, t)[1] == [2, 4]
    assert call(Flow(reedit="always", factor=0.0), c, t)[1] == [2, 4]  # at least the surest mask
    here = [NO, YES, YES, YES, YES]
    assert call(Flow(reedit="always", factor=4.0), c, t, candidates=here)[1] == [1, 2, 3, 4]


def test_doubts_to_the_left_delay_a_mask():
    c, t = [0.9, 0.1, 0.8, 0.9, 0.99], [0.0, 0.5, 0.0, 0.0, 0.0]
    # The products of c and of the masks before, without position 1, which has entered:
    # 0.9, 0.72, 0.648, 0.6415.
    assert call(Flow(reedit="always", jump=0.7), c, t)[1] == [0, 1, 2, 3, 4]
    assert call(Flow(reedit="always", jump=0.7, left=1.0), c, t)[1] == [0, 1, 2]
    assert call(Flow(reedit="always", jump=0.645, left=1.0), c, t)[1] == [0, 1, 2, 3]
    # With the root of the products: 0.9, 0.759, 0.764, 0.797.
    assert call(Flow(reedit="always", jump=0.76, left=0.5), c, t)[1] == [0, 1, 3, 4]
    assert call(Flow(reedit="always", jump=0.95, left=1.0), c, t)[1] == [0, 1]  # at least one mask
    # (n + 1)(1 - c(n)) of the products: 0.2, 0.84, 1.408, 1.79.
    assert call(Flow(reedit="always", factor=0.85, left=1.0), c, t)[1] == [0, 1, 2]
    here = [NO, YES, YES, YES, YES]  # masks outside count for nothing: 0.8, 0.72, 0.713
    assert call(Flow(reedit="always", jump=0.715, left=1.0), c, t, candidates=here)[1] == [1, 2, 3]


def test_a_token_that_stands_gives_way_only_to_one_that_is_sure_enough():
    # Position i predicts token i. Position 0 has entered with it, 1 and 2 with another token.
    c, t, tokens = [0.5, 0.6, 0.97, 0.95], [0.9, 0.9, 1.0, 0.0], [0, 7, 7, 7]
    assert call(Flow(reedit="always"), c, t, tokens)[1] == [0, 1, 2, 3]
    sure = Flow(reedit="always", replace_above=0.9)
    assert call(sure, c, t, tokens)[1] == [0, 2, 3]
    # Nothing is taken back, but the mixture of an agreeing position follows c, and masks enter.
    assert call(Flow(reedit="always", replace_above=1.0), c, t, tokens)[1] == [0, 3]
    # A contradiction that does not count is no change, so the block is over.
    for rule, over in ((sure, YES), (Flow(reedit="always", replace_above=0.5), NO)):
        assert bool(call(rule, [0.5, 0.6], [0.9, 0.9], [0, 7])[0].memory.over[0]) is over


@pytest.mark.parametrize(
    "c, t, tokens, over",
    [
        ([0.9, 0.95], [0.5, 0.5], [7, 7], YES),  # all sure, although both changed
        ([0.8, 0.95], [0.5, 0.5], [0, 1], YES),  # nothing changed
        ([0.8, 0.95], [0.5, 0.5], [0, 7], NO),
        ([0.8, 0.95], [0.5, 0.0], [0, 1], NO),  # a mask entered
        ([0.9, 0.95], [0.0, 0.0], [9, 9], YES),  # all in one step
    ],
)
def test_the_end_of_a_block(c, t, tokens, over):
    rule = Flow(reedit="always", jump=0.7)
    memory = call(rule, c, t, tokens)[0].memory
    assert bool(memory.over[0]) is over
    state = state_with(rule, c, tokens, memory)  # every t is c after the step
    assert np.asarray(rule.is_open(state)).tolist() == [[not over] * 2]


def test_a_floor_applies_to_all_that_has_entered():
    action, reset = call(Flow(reedit="always", floor=0.6), c=[0.3, 0.95, 0.2], t=[0.3, 0.0, 0.0])
    np.testing.assert_allclose(action.floor, [[0.6] * 3])
    assert reset == [0, 1]
    assert not np.any(call(Flow(reedit="always"), c=[0.3], t=[0.3])[0].floor)


def test_a_floor_of_one_writes_anew_until_no_mask_is_left():
    rule, t, tokens = Flow(reedit="always", jump=0.7, floor=1.0), [1.0, 0.0, 0.0], [7, 9, 9]
    action, reset = call(rule, c=[0.3, 0.8, 0.6], t=t, tokens=tokens)
    assert reset == [0, 1]
    assert rule.is_open(state_with(rule, t, tokens, action.memory)).tolist() == [[NO, YES, YES]]
    params = {"wte": {"embedding": jnp.arange(10.0)[:, None]}}
    state, here = state_with(rule, t, tokens), jnp.ones((1, 3), bool)
    after = move_positions(params, 9, here, state, belief_of([0.3, 0.8, 0.6]), action)
    assert after.t.tolist() == [[1.0, 1.0, 0.0]] and after.tokens[0, :2].tolist() == [0, 1]
    assert after.x[0, :2, 0].tolist() == [0.0, 1.0]


def test_a_mask_keeps_its_block_open():
    rule = Flow(reedit="always")
    assert rule.is_open(state_with(rule, [0.0, 0.5, 1.0], memory=memory_of(YES, 3))).tolist() == [
        [YES, NO, NO]
    ]


@pytest.mark.parametrize("rule", [Flow(reedit="always", jump=0.7), Flow(jump=0.7)], ids=repr)
def test_the_least_number_of_passes(rule):
    rule = dataclasses.replace(rule, least_passes=3)
    sure, standing = [0.95, 0.95], [0, 1]

    def over(c, tokens, passes, rho=0.5):
        return bool(
            call(rule, c, [0.95, 0.95], tokens, memory_of(NO, passes), rho=rho)[0].memory.over[0]
        )

    assert not over(sure, standing, passes=1) and over(sure, standing, passes=2)
    assert not over(sure, [0, 7], passes=2)  # the pass changed a token
    assert not over(sure, standing, passes=9, rho=0.0)  # another block begins
    waiting = state_with(rule, [1.0, 1.0], memory=memory_of(NO, 2))
    ready = state_with(rule, [1.0, 1.0], memory=memory_of(YES, 3))
    if rule.reedit != "always":
        assert rule.is_open(waiting).all()
    assert not rule.is_open(ready).any()


def test_dmax_lets_the_leftmost_masks_enter():
    def entering(c, t=(0.0,) * 5):
        return np.flatnonzero(np.asarray(act_dmax(c, t)) & (np.asarray(t) == 0)).tolist()

    def act_dmax(c, t):
        rule = DMax(tau=0.5)
        return rule(belief_of(c), state_with(rule, t), step_of(5)).reset[0]

    assert entering([0.9, 0.5, 0.4, 0.9, 0.9]) == [0, 1]  # up to the first below tau
    assert entering([0.4, 0.9, 0.9, 0.9, 0.9]) == [0]  # at least the leftmost
    # Those that have entered do not end the run of masks, however doubtful they are.
    assert entering([0.1, 0.9, 0.1, 0.9, 0.2], (0.3, 0.0, 0.3, 0.0, 0.0)) == [1, 3]
    action = DMax()(belief_of([0.9]), state_with(DMax(), [0.0]), step_of(1))
    assert action.rescale and DMax().revises and DMax().early_exit


def test_options_out_of_range():
    for options, sentence in (
        ({"reedit": "never"}, "reedit must be confidence, disagreement or always, not 'never'"),
        ({"least_passes": 0}, "least_passes must be at least 1, not 0"),
        ({"floor": -0.5}, "floor must be between 0 and 1, not -0.5"),
        (
            {"reedit": "always", "jump": 0.5, "factor": 1.0},
            "factor needs reedit=always, and takes the place of jump and of a policy",
        ),
        ({"left": 0.5}, "left needs reedit=always, and no policy"),
        ({"reedit": "always", "left": -0.5}, "left must be at least 0, not -0.5"),
        ({"reedit": "always", "factor": -1.0}, "factor must be at least 0, not -1.0"),
        ({"replace_above": 2.0}, "replace_above must be between 0 and 1, not 2.0"),
        ({"reedit_above": 1.5}, "reedit_above must be between 0 and 1, not 1.5"),
        (
            {"reedit": "always", "synchronous": True},
            'reedit "always" takes no steps, so leave out step-size policies and synchronous',
        ),
    ):
        with pytest.raises(UserError) as error:
            Flow(**options)
        assert str(error.value) == sentence
    with pytest.raises(UserError, match="tau must be between 0 and 1, not 2"):
        DMax(tau=2.0)


def test_the_printed_rule_keeps_no_memory():
    assert Flow().init_memory(1, 2) is None
    assert act(Flow(), [0.5, 0.2], [0.2, 0.9])[1] == [NO, YES]
