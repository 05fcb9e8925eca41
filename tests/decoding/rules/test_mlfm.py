"""The alternation of denoising and unmasking."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import xflow_jax as xf
from tests.decoding.helpers import belief_of, state_of, step_of
from tests.helpers import tiny_lm
from xflow_jax.decoding import parse_rule
from xflow_jax.decoding.decode import move_positions
from xflow_jax.decoding.rules.mlfm import MLFM
from xflow_jax.decoding.rules.revision import Revision
from xflow_jax.errors import UserError


def call(rule, c, t, passes):
    memory = Revision(jnp.zeros(1, bool), jnp.full(1, passes, jnp.int32))
    state = dataclasses.replace(state_of(t), memory=memory)
    step = dataclasses.replace(step_of(len(c)), rho=jnp.asarray(0.5))
    return rule(belief_of(c), state, step)


def test_a_cycle_by_hand():
    """Token k has the embedding 10 k, and m is that of token 4."""
    params, mask_id = {"wte": {"embedding": 10.0 * jnp.arange(5.0)[:, None]}}, 4
    top = jnp.tile(jnp.asarray([0.8, 0.2, 0.0, 0.0]), (1, 3, 1))
    belief = belief_of([0.7, 0.9, 0.9], tokens=[1, 1, 1]).replace(
        top=top, top_tokens=jnp.tile(jnp.asarray([1, 2, 3, 4]), (1, 3, 1))
    )
    rule, yes = MLFM(tau=0.8, denoising_steps=3), jnp.ones((1, 3), bool)
    state = state_of([0.0, 0.0, 1.0], [40.0, 40.0, 30.0], [4, 4, 3])
    state = dataclasses.replace(state, memory=rule.init_memory(1, 3))
    mean, seen = 0.8 * 10 + 0.2 * 20, []
    for rho in (0.0, 0.25, 0.5, 0.75):
        action = rule(belief, state, dataclasses.replace(step_of(3), rho=jnp.asarray(rho)))
        state = move_positions(params, mask_id, yes, state, belief, action)
        state = dataclasses.replace(state, memory=action.memory)
        seen.append((state.x[0, :, 0].tolist(), state.t[0].tolist()))
    third = 40 + (mean - 40) / 3
    np.testing.assert_allclose(seen[0], ([third, third, 30], [1 / 3, 1 / 3, 1]), rtol=1e-5)
    halfway = third + (mean - third) / 2
    np.testing.assert_allclose(seen[1], ([halfway, halfway, 30], [2 / 3, 2 / 3, 1]), rtol=1e-5)
    assert seen[2] == ([40, 10, 30], [0, 1, 1])  # the doubtful one is a mask again
    np.testing.assert_allclose(seen[3], ([third, 10, 30], [1 / 3, 1, 1]), rtol=1e-5)


def test_the_surest_mask_is_written_in_any_case():
    action = call(MLFM(tau=0.8, denoising_steps=2), [0.3, 0.5, 0.4], [0.5, 0.5, 0.5], passes=1)
    assert action.a.tolist() == [[0, 1, 0]] and action.remask.tolist() == [[True, False, True]]


def test_one_denoising_step_is_threshold_decoding():
    lm = tiny_lm()
    options = {"gen_length": 8, "steps": 8, "early_exit": True}
    prompts = [[5, 6, 7], [8, 9]]
    plain = xf.generate(lm, prompts, xf.Threshold(tau=0.5), **options)
    rule = parse_rule("mlfm:tau=0.5,denoising_steps=1,suppress_mask=false")[1]
    once = xf.generate(lm, prompts, rule, **options)
    np.testing.assert_array_equal(plain.tokens, once.tokens)
    np.testing.assert_array_equal(plain.forward_passes, once.forward_passes)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"denoising_steps": 0}, "denoising_steps must be at least 1, not 0"),
        ({"tau": 2.0}, "tau must be between 0 and 1, not 2.0"),
    ],
)
def test_options_out_of_range(options, sentence):
    with pytest.raises(UserError, match=sentence):
        MLFM(**options)
