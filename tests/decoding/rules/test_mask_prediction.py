"""Mask prediction on beliefs written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.decoding.helpers import NO, YES, act, belief_of, state_of, step_of
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction


@pytest.mark.parametrize(
    "order, chosen",
    [("confidence", [0, 4]), ("entropy", [1, 4]), ("margin", [2, 4])],
)
def test_orders(order, chosen):
    belief = belief_of(
        [0.9, 0.5, 0.6, 0.99, 0.7], [0.8, 0.4, 0.1, 0.0, 0.3], [2.0, 0.1, 1.5, 0.0, 0.5]
    )
    state = state_of([0, 0, 0, 1, 0])
    action = MaskPrediction(order=order)(belief, state, step_of(5, quota=2))
    assert np.flatnonzero(action.a[0]).tolist() == chosen
    assert not action.reset.any() and not action.commit.any()


def test_random_order_draws_among_the_masked():
    rule, c, t = MaskPrediction(order="random"), [0.1, 0.9, 0.9, 0.1], [0, 0, 1, 0]
    counts = np.zeros(4, int)
    for key in range(60):
        a, _, _ = act(rule, c, t, quota=1, key=key)
        assert sum(a) == 1
        counts += np.asarray(a, int)
    assert counts[2] == 0 and (counts[[0, 1, 3]] > 8).all()


def test_the_scheduled_number_is_written():
    c, t = [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0]
    assert act(MaskPrediction(), c, t, quota=0)[0] == [0, 0, 0, 0]
    assert act(MaskPrediction(), c, t, quota=2)[0] == [0, 1, 1, 0]
    assert act(MaskPrediction(), c, t, quota=9)[0] == [0, 1, 1, 1]
    assert act(MaskPrediction(), c, t, quota=2, candidates=[NO, NO, YES, NO])[0] == [0, 0, 1, 0]


def test_threshold_option():
    """All masks above it, if they are at least the scheduled number, else that number."""
    rule, t = MaskPrediction(threshold=0.65), [0, 0, 0, 1]
    assert act(rule, [0.9, 0.8, 0.7, 0.99], t, quota=2)[0] == [1, 1, 1, 0]
    assert act(rule, [0.9, 0.6, 0.5, 0.99], t, quota=2)[0] == [1, 1, 0, 0]
    assert act(rule, [0.6, 0.6, 0.5, 0.99], t, quota=0)[0] == [0, 0, 0, 0]
    # Strictly above, as LLaDA2.0 keeps c > tau.
    assert act(MaskPrediction(threshold=0.5), [0.5, 0.75, 0.5], [0, 0, 0], quota=1)[0] == [0, 1, 0]
