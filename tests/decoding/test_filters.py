"""Temperature, top-k and top-p against sorted distributions, and draws by their counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import belief_of, state_of, step_of
from tests.family_helpers import family_config
from tests.helpers import eight
from xflow_jax.decoding.belief import BeliefOptions, compute_belief
from xflow_jax.decoding.filters import Filters
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.models.lm_head import Head
from xflow_jax.parallel.mesh import make_mesh

FILTERS = [
    Filters(temperature=0.7),
    Filters(top_k=3),
    Filters(top_p=0.8),
    Filters(1.5, top_k=5, top_p=0.6),
    Filters(1.5, top_k=5, top_p=0.6, top_p_first=True),
    Filters(top_k=99, top_p=0.001),
]


CONFIG = family_config("dream")


def reference(z, filters):
    """Returns the distribution as the original samplers compute it, by a sort."""
    z = np.asarray(z, np.float64) / filters.temperature

    def softmax(row):
        p = np.exp(row - row.max())
        return p / p.sum()

    def top_k(row):
        if filters.top_k and filters.top_k < len(row):
            row = np.where(row < np.sort(row)[-filters.top_k], -np.inf, row)
        return row

    def top_p(row):
        order = np.argsort(-row, kind="stable")
        before = np.cumsum(softmax(row)[order]) - softmax(row)[order]
        return np.where(np.isin(np.arange(len(row)), order[before > filters.top_p]), -np.inf, row)

    steps = (top_p, top_k) if filters.top_p_first else (top_k, top_p)
    rows = z.reshape(-1, z.shape[-1])
    return np.asarray([softmax(steps[1](steps[0](row))) for row in rows]).reshape(z.shape)


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_equal_a_sort(filters):
    z = np.random.default_rng(0).normal(size=(2, 6, 40)).astype(np.float32) * 4
    z[..., 7:11] = -np.inf
    z[0, 0] = -3.0  # equal logits
    ours = jax.nn.softmax(filters.apply(jnp.asarray(z)), axis=-1)
    wanted = reference(z, filters)
    if filters.top_p < 1:  # equal logits stay or go together
        ours, wanted = ours.at[0, 0].set(0.0), wanted * (np.arange(12) > 0).reshape(2, 6, 1)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_draws_have_the_filtered_distribution():
    """By the counts of 6000 positions with the same logits."""
    n, row = 6000, np.array([2.0, 1.5, 1.0, 0.0, -1.0, 3.0, -4.0, 0.5], np.float32)
    rule = MaskPrediction(temperature=0.8, top_k=5, top_p=0.9)
    options = rule.belief_options(CONFIG, None)
    z = jnp.broadcast_to(row, (1, n, len(row)))
    keys = jax.random.split(jax.random.key(0), 1)
    belief = compute_belief(read_logits, z, len(row), options, keys)
    p = reference(row[None], Filters(0.8, 5, 0.9))[0]
    counts = np.bincount(np.ravel(belief.tokens), minlength=len(row)) / n
    np.testing.assert_allclose(counts, p, atol=4 * 0.5 / n**0.5)
    assert (counts[p == 0] == 0).all() and (p > 0).sum() > 2
    # The confidence is the probability of the draw, and the entropy that of what stays.
    np.testing.assert_allclose(belief.confidence[0], p[np.ravel(belief.tokens)], atol=1e-5)
    kept = p[p > 0]
    np.testing.assert_allclose(belief.entropy, -(kept * np.log(kept)).sum(), atol=1e-4)
    # Fast-dLLM v2 draws the same tokens, and reads confidences before it filters.
    rule = dataclasses.replace(rule, confidence_of="temperature")
    other = compute_belief(read_logits, z, len(row), rule.belief_options(CONFIG, None), keys)
    np.testing.assert_array_equal(other.tokens, belief.tokens)
    p = reference(row[None], Filters(0.8))[0]
    np.testing.assert_allclose(other.confidence[0], p[np.ravel(other.tokens)], atol=1e-5)


def read_logits(hidden, start, size):
    return jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=-1)


@eight
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sharded_vocabulary_has_the_same_distribution(tied):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(4, 3, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32) * 2
    head = Head(table.T if tied else table, None, tied=tied)
    options = BeliefOptions(never=(5,), filters=Filters(0.9, top_k=6, top_p=0.8))

    @jax.jit
    def belief(head, hidden):
        return compute_belief(head, hidden, 64, options)

    plain = belief(head, hidden)
    with jax.set_mesh(make_mesh("1,4,2")):
        sharded = belief(head, hidden)
    np.testing.assert_array_equal(sharded.tokens, plain.tokens)
    for name in ("confidence", "top", "entropy"):
        np.testing.assert_allclose(getattr(sharded, name), getattr(plain, name), atol=1e-5)


def test_positions_are_drawn_by_the_softmax_of_their_score():
    c, t = np.array([0.2, 0.5, 0.9, 0.6]), 0.4
    rule = MaskPrediction(order_temperature=t)
    assert rule.needs_keys
    counts = np.zeros(4)
    run = jax.jit(lambda key: rule(belief_of(c), state_of([0, 0, 1, 0]), key).a[0])
    for key in range(600):
        counts += np.asarray(run(step_of(4, quota=1, key=key)))
    p = np.exp(c / t) * (np.arange(4) != 2)
    np.testing.assert_allclose(counts / counts.sum(), p / p.sum(), atol=0.08)
    assert counts.sum() == 600


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 0.5, "confidence_of": "model"}, "confidence_of model needs top_k 0 and top_p 1"),
        ({"confidence_of": "x"}, "confidence_of must be model, temperature or sampler, not 'x'"),
        ({"order_temperature": 1.0, "order": "random"}, "order_temperature needs order confidence"),
        ({"order_temperature": -1.0}, "order_temperature must be at least 0"),
        ({"sub_block": 0}, "sub_block must be at least 1, not 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        MaskPrediction(**options)


def test_the_distribution_behind_the_confidence():
    """LLaDA's is the model's own, Dream's and SDAR's that of the draw."""
    cases = {
        MaskPrediction(temperature=0.5): (0.5, None),
        MaskPrediction(temperature=0.5, schedule="eps"): (1.0, Filters(0.5, top_p_first=True)),
        MaskPrediction(schedule="eps"): (0.0, None),
        MaskPrediction(temperature=1.0, confidence_of="sampler"): (1.0, None),
        MaskPrediction(top_k=3): (0.0, Filters(top_k=3)),
        MaskPrediction(temperature=2.0, top_p=0.5): (1.0, Filters(2.0, top_p=0.5)),
    }
    for rule, (noise, filters) in cases.items():
        options = rule.belief_options(CONFIG, None)
        assert (options.temperature, options.filters) == (noise, filters), rule
