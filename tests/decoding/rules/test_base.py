"""Selection of positions, the options that all rules share, and the Rule protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import belief_of, state_of, step_of
from tests.helpers import TOY
from xflow_jax.decoding.belief import BeliefOptions
from xflow_jax.decoding.rules.base import Action, Rule, TokenConstraints, select_highest
from xflow_jax.decoding.rules.baselines import Editing, Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.decoding.rules.revision import DMax
from xflow_jax.errors import UserError


@pytest.mark.parametrize(
    "score, among, count, chosen",
    [
        ([3, 1, 2, 5], [1, 1, 1, 1], 2, [0, 3]),
        ([1, 1, 1, 1], [1, 1, 1, 1], 2, [0, 1]),  # ties: lowest index first
        ([1, 2, 2, 2], [1, 0, 1, 1], 1, [2]),
        ([3, 1, 2, 5], [1, 1, 0, 0], 3, [0, 1]),  # fewer than `count` are allowed
        ([3, 1, 2, 5], [0, 0, 0, 0], 3, []),
        ([3, 1, 2, 5], [1, 1, 1, 1], 0, []),
        ([-math.inf, -math.inf, 0, -1], [0, 1, 0, 0], 1, [1]),  # -inf is a score too
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


@pytest.mark.parametrize("name", RULES)
def test_every_rule_conforms_to_the_protocol(name):
    rule = RULES[name]()
    assert isinstance(rule, Rule)
    assert type(rule.early_exit) is type(rule.needs_keys) is type(rule.revises) is bool
    assert 0 < rule.settled <= 1
    assert isinstance(rule.belief_options(TOY, None), BeliefOptions)
    state = state_of([0.0, 0.0])
    state = state.replace(memory=rule.init_memory(1, 2))
    assert rule.is_open(state).all()
    action = rule(belief_of([0.6, 0.3]), state, step_of(2))
    assert isinstance(action, Action) and action.a.shape == (1, 2)


def test_a_class_without_all_members_is_no_rule():
    @dataclass(frozen=True)
    class Incomplete:
        early_exit: bool = False

        def __call__(self, belief, state, step):
            return Action.unmask(step.candidates)

    assert not isinstance(Incomplete(), Rule)
    assert not isinstance(TokenConstraints(), Rule)  # it has no __call__


@pytest.mark.parametrize(
    "rule, revises",
    [
        (Flow(), True),
        (Flow(reedit_margin=0.0), True),
        (Flow(reedit_margin=None), False),
        (Flow(revise_committed=False), False),
        (Flow(reedit_margin=None, revise_committed=False), False),
        (Flow(reedit="always"), True),
        (Flow(reedit="disagreement", revise_committed=False), False),
        (Editing(), True),
        (DMax(), True),
        *((cls(), False) for cls in RULES.values() if cls not in (Flow, Editing, DMax)),
    ],
    ids=repr,
)
def test_which_rules_revise_committed_tokens(rule, revises):
    assert rule.revises is revises


def test_belief_options():
    eos, mask, vocab = TOY.eos_id, TOY.mask_id, TOY.vocab_size
    plain, suppressed = BeliefOptions(), BeliefOptions(never=(mask,), vocab_size=vocab)
    assert Flow().belief_options(TOY, 5) == suppressed
    assert Flow(suppress_mask=False).belief_options(TOY, 5) == plain
    assert Threshold().belief_options(TOY, 5) == plain
    assert MaskPrediction().belief_options(TOY, 5) == plain
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
    by_entropy = MaskPrediction(order="entropy")
    assert jax.tree.structure(MaskPrediction()) != jax.tree.structure(by_entropy)
    assert jax.tree.leaves(Flow()) == []


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: MaskPrediction(order="best"),
            "order must be confidence, random, entropy, margin, sequential or origin, not 'best'",
        ),
        (lambda: MaskPrediction(temperature=-1.0), "temperature must be at least 0, not -1.0"),
        (lambda: MaskPrediction(cfg_scale=-0.5), "cfg_scale must be at least 0, not -0.5"),
        (lambda: MaskPrediction(threshold=1.5), "threshold must be between 0 and 1, not 1.5"),
        (lambda: Threshold(-0.1), "tau must be between 0 and 1, not -0.1"),
        (lambda: Threshold(math.nan), "tau must be between 0 and 1, not nan"),
        (lambda: Flow(power=-2.0), "power must be at least 0, not -2.0"),
        (lambda: Flow(reedit_margin=-0.1), "reedit_margin must be at least 0, not -0.1"),
        (lambda: Flow(jump=2.0), "jump must be between 0 and 1, not 2.0"),
        (lambda: Flow(sample=True), "sample needs a policy, so name its file"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message
