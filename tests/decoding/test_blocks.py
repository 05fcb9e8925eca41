"""The schedule, block lengths and numbers of steps."""

from __future__ import annotations

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOY
from tests.llada2_helpers import TINY2
from xflow_jax.decoding.blocks import (
    block_layout,
    count_blocks,
    make_schedule,
    resolve_block_length,
    resolve_steps,
)
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError


@pytest.mark.parametrize(
    "size, steps, quotas", [(17, 5, [4, 4, 3, 3, 3]), (4, 6, [1, 1, 1, 1, 0, 0]), (8, 1, [8])]
)
def test_schedule(size, steps, quotas):
    schedule = make_schedule(DecodeConfig(gen_length=2 * size, block_length=size, steps=steps))
    np.testing.assert_array_equal(schedule.quota, quotas * 2)
    np.testing.assert_array_equal(schedule.block, [0] * steps + [1] * steps)
    np.testing.assert_array_equal(schedule.index, np.arange(2 * steps))
    np.testing.assert_array_equal(schedule.steps_left, list(range(steps, 0, -1)) * 2)
    rho = [0.0] if steps == 1 else [i / (steps - 1) for i in range(steps)]
    np.testing.assert_allclose(schedule.rho, rho * 2, rtol=1e-6)


def test_layout_of_equal_blocks():
    block, decoded = block_layout(DecodeConfig(6, 3, 1), jnp.ones((2, 5), bool))
    assert block.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 and decoded.all()


def test_layout_of_block_causal_rows():
    """The grid counts from each row's first token, here of prompts with 4 and 6 tokens."""
    mask = jnp.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    block, decoded = block_layout(DecodeConfig(5, 4, 1, block_causal=True), mask)
    assert block.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2]]
    assert decoded.sum(axis=-1).tolist() == [8, 6]


@pytest.mark.parametrize(
    "model, gen_length, block_length, wanted",
    [
        (TOY, 48, None, 48),  # one block by default
        (TOY, 48, 16, 16),
        (TOY, 48, 48, 48),
        (TINY2, 64, None, TINY2.default_block_length),
        (TINY2, 64, 8, 8),
        (TINY2, 10, 8, 8),  # a block-causal model completes the last block
        (TINY2, 4, 8, 8),
    ],
)
def test_resolve_block_length(model, gen_length, block_length, wanted):
    assert resolve_block_length(model, gen_length, block_length) == wanted


@pytest.mark.parametrize(
    "gen_length, block_length, message",
    [
        (48, 9, "gen_length 48 is not a whole number of blocks of 9. Use 45 or 54."),
        (4, 9, "gen_length 4 is not a whole number of blocks of 9. Use 9."),
        (0, None, "gen_length must be a whole number of at least 1, not 0"),
        (2.0, None, "gen_length must be a whole number of at least 1, not 2.0"),
        (True, None, "gen_length must be a whole number of at least 1, not True"),
        (48, 0, "block_length must be a whole number of at least 1, not 0"),
        (48, "8", "block_length must be a whole number of at least 1, not 8"),
    ],
)
def test_wrong_block_lengths(gen_length, block_length, message):
    with pytest.raises(UserError) as error:
        resolve_block_length(TOY, gen_length, block_length)
    assert str(error.value) == message


def test_numpy_integers_are_whole_numbers():
    assert resolve_block_length(TOY, np.int64(48), np.int32(16)) == 16
    assert count_blocks(TOY, np.int64(48), np.int32(16)) == 3


def test_count_blocks():
    assert count_blocks(TOY, 64, None) == 1 and count_blocks(TOY, 64, 16) == 4
    assert count_blocks(TINY2, 64, None) == 2 and count_blocks(TINY2, 16, None) == 1


@pytest.mark.parametrize(
    "model, budget, gen_length, block_length, wanted",
    [
        (TOY, "1", 48, None, 48),
        (TOY, "1/2", 48, None, 24),
        (TOY, "1/4", 48, None, 12),
        (TOY, "1/8", 48, None, 6),
        (TOY, "1/4", 48, 8, 12),
        (TOY, "1/8", 48, 8, 6),  # one step for each block
        (TINY2, "1/4", 64, None, 16),
        (TINY2, "1/2", 8, 32, 4),  # less than one block
    ],
)
def test_resolve_steps(model, budget, gen_length, block_length, wanted):
    steps = resolve_steps(model, Fraction(budget), gen_length, block_length)
    assert steps == wanted and type(steps) is int


@pytest.mark.parametrize(
    "budget, blocks, advice",
    [
        ("0.3", 1, "Use 7/24 or 5/16."),
        ("1/100", 1, "Use 1/48."),
        ("1/16", 6, "Use 1/8."),
        ("1/4", 8, "Use 1/6 or 1/3."),
    ],
)
def test_a_budget_of_no_whole_steps_gives_the_nearest_ones(budget, blocks, advice):
    with pytest.raises(UserError) as error:
        resolve_steps(TOY, Fraction(budget), 48, 48 // blocks)
    assert str(error.value).endswith(advice)
