"""Tests of the pretraining step: the formula, learning and the curriculum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.family_helpers import golden_lm
from tests.helpers import TOY, random_prompts
from xflow_jax.errors import UserError
from xflow_jax.models.factory import build, init_params
from xflow_jax.tokenizer import pad_left
from xflow_jax.training import losses
from xflow_jax.training.pretraining import (
    block_logits,
    count_blocks,
    draw_blocks,
    make_pretrain_step,
    response_logits,
)
from xflow_jax.training.state import TrainState

MODEL = build(TOY)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    prompt, mask = pad_left(random_prompts([3, 5, 4, 1]), TOY.pad_id)
    response = np.asarray(random_prompts([6] * 4, seed=1))
    return {
        "prompt": jnp.asarray(prompt),
        "prompt_mask": jnp.asarray(mask),
        "response": jnp.asarray(response),
    }


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_pretrain_step(MODEL, optax.adam(1e-2), optax.constant_schedule(1.0)))


def test_response_logits_are_the_models(params, batch):
    tokens = jnp.concatenate([batch["prompt"], batch["response"]], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(batch["response"], bool)], axis=1)
    ours = jax.jit(response_logits, static_argnums=(0, 4))(MODEL, params, tokens, mask, 5)
    np.testing.assert_allclose(
        ours, jax.jit(MODEL.apply)({"params": params}, tokens, mask)[:, 5:], atol=1e-5
    )


def test_the_step_is_the_formula(params, batch, step):
    """Computes Eq. 1 row by row in NumPy, with the draws of the step's key."""
    key, n = jax.random.fold_in(jax.random.key(9), 0), 6
    ratio_key, mask_key = jax.random.split(key)
    sigma = losses.mask_ratios(ratio_key, 4)
    masked = losses.draw_masks(mask_key, sigma, n)
    total, sum_nll = 0.0, 0.0
    for row in range(4):
        real = np.asarray(batch["prompt_mask"][row])
        prompt = np.asarray(batch["prompt"][row])[real]
        noisy = np.where(masked[row], TOY.mask_id, batch["response"][row])
        logits = jax.jit(MODEL.apply)({"params": params}, np.concatenate([prompt, noisy])[None])[
            0, -n:
        ]
        nll = -jax.nn.log_softmax(logits)[np.arange(n), batch["response"][row]]
        total += float((nll * masked[row]).sum() / sigma[row] / n / 4)
        sum_nll += float((nll * masked[row]).sum())
    state, metrics = step(TrainState.create(params, optax.adam(1e-2)), batch, jax.random.key(9))
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["masked_nll"], sum_nll / masked.sum(), rtol=1e-4)
    assert state.step == 1 and metrics["grad_norm"] > 0


def test_it_learns_and_compiles_once(params, batch, step):
    state, key = TrainState.create(params, optax.adam(1e-2)), jax.random.key(0)
    nll = []
    for _ in range(150):
        state, metrics = step(state, batch, key)
        nll.append(float(metrics["masked_nll"]))
    assert np.mean(nll[-20:]) < 0.5 * np.mean(nll[:20])
    assert step._cache_size() == 1 and state.step == 150


def test_one_key_serves_a_run(params, batch, step):
    """The step folds its number into the key, so only equal steps draw equal masks."""
    state = TrainState.create(params, optax.adam(1e-2))
    (_, first), (_, again) = (step(state, batch, jax.random.key(0)) for _ in range(2))
    _, later = step(state.replace(step=state.step + 1), batch, jax.random.key(0))
    assert first["loss"] == again["loss"] != later["loss"]


def test_the_curriculum_bounds_the_masking_ratio(params, batch):
    """largest_sigma receives the step. With a ratio near 0 nothing is masked."""
    schedule = optax.piecewise_constant_schedule(1e-6, {5: 1e6})
    curriculum = jax.jit(make_pretrain_step(MODEL, optax.sgd(0.0), schedule))
    state = TrainState.create(params, optax.sgd(0.0))
    _, metrics = curriculum(state, batch, jax.random.key(0))
    assert metrics["masked_nll"] == 0 and metrics["loss"] == 0
    _, metrics = curriculum(state.replace(step=state.step + 7), batch, jax.random.key(0))
    assert metrics["masked_nll"] > 0


@jax.jit
def logits_of_pieces(params, tokens, numbers):
    allowed = (numbers[None, :] <= numbers[:, None])[None]
    variables = {"params": params}
    x = MODEL.apply(variables, tokens[None], method="embed")
    hidden = MODEL.apply(variables, x, None, None, allowed, method="hidden")
    return MODEL.apply(variables, hidden[0], method="head")


def logits_of_block(params, pieces, count):
    """Computes the logits of the last piece, each piece attending to itself and earlier ones."""
    numbers = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    tokens, length = np.concatenate(pieces), len(numbers)
    rest = 12 - length  # one shape for all, with a piece behind that nothing attends to
    padded = np.pad(tokens, (0, rest)), np.pad(numbers, (0, rest), constant_values=len(pieces))
    return logits_of_pieces(params, *padded)[length - count : length]


def rows_of(batch):
    for row, real in enumerate(np.asarray(batch["prompt_mask"])):
        yield np.asarray(batch["prompt"][row])[real], np.asarray(batch["response"][row])


def test_blocks_are_predicted_as_one_by_one(params, batch):
    """A block alone, behind its prompt and the clean blocks before it, gives the same logits."""
    blocks = np.array([[1, 1, 2, 2, 2, 3], [1, 2, 3, 4, 5, 6], [1] * 6, [1, 2, 2, 2, 2, 2]])
    masked = np.random.default_rng(0).random((4, 6)) < 0.7
    noised = np.where(masked, TOY.mask_id, batch["response"])
    padded = np.pad(blocks, ((0, 0), (5, 0)))  # the prompt is block 0
    ours = jax.jit(block_logits, static_argnums=0)(MODEL, params, batch, noised, padded)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        for block in np.unique(blocks[row]):
            own = blocks[row] == block
            before = [response[blocks[row] == earlier] for earlier in range(1, block)]
            want = logits_of_block(params, [prompt, *before, noised[row][own]], own.sum())
            np.testing.assert_allclose(ours[row][own], want, atol=1e-5)


def test_grids_of_blocks_begin_anywhere():
    blocks = draw_blocks(jax.random.key(0), jnp.array([1, 4] * 32), 3, 10)
    assert blocks.shape == (64, 13) and not blocks[:, :3].any()
    blocks = blocks[:, 3:]
    np.testing.assert_array_equal(blocks[::2], np.tile(np.arange(1, 11), (32, 1)))
    assert set(np.sum(np.asarray(blocks[1::2]) == 1, axis=1).tolist()) == {1, 2, 3, 4}
    for row in np.asarray(blocks[1::2]):
        sizes = np.unique(row, return_counts=True)[1]
        assert row[0] == 1 and set(np.diff(row)) <= {0, 1} and set(sizes[1:-1]) == {4}


def test_blocks_of_one_position_are_next_token_prediction(params, batch):
    """Every position counts, whatever the largest masking ratio."""
    optimizer = optax.sgd(0.0)
    step = make_pretrain_step(MODEL, optimizer, optax.constant_schedule(0.1), (1,))
    _, metrics = jax.jit(step)(TrainState.create(params, optimizer), batch, jax.random.key(0))
    total = 0.0
    for prompt, response in rows_of(batch):
        for i, token in enumerate(response):
            pieces = [prompt, *(response[j : j + 1] for j in range(i)), [TOY.mask_id]]
            (logits,) = logits_of_block(params, pieces, 1)
            total -= float(jax.nn.log_softmax(logits)[token])
    np.testing.assert_allclose(metrics["loss"], total / 24, rtol=1e-4)
    np.testing.assert_allclose(metrics["masked_nll"], total / 24, rtol=1e-4)


def test_blocks_behind_clean_copies_have_the_loss_of_their_masks(params, batch):
    """Eq. 1 with the draws of the step's key: sigma of a row, and one for rows of one position."""
    optimizer, key = optax.sgd(0.0), jax.random.fold_in(jax.random.key(3), 0)
    step = make_pretrain_step(MODEL, optimizer, optax.constant_schedule(0.8), (3, 1))
    _, metrics = jax.jit(step)(TrainState.create(params, optimizer), batch, jax.random.key(3))
    ratio_key, mask_key, block_key = jax.random.split(key, 3)
    blocks = draw_blocks(block_key, jnp.array([3, 1, 3, 1]), 5, 6)
    sigma = losses.mask_ratios(ratio_key, 4, 0.8).at[1::2].set(1.0)
    masked = losses.draw_masks(mask_key, sigma, 6)
    noised = jnp.where(masked, TOY.mask_id, batch["response"])
    logits = jax.jit(block_logits, static_argnums=0)(MODEL, params, batch, noised, blocks)
    nll = losses.cross_entropy(logits, batch["response"])
    want = losses.diffusion_loss(nll, masked, sigma)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 16])
def test_blocks_of_a_block_causal_model_are_those_of_a_decode(batch, size):
    """The first block of a response may begin in its prompt. All see what they see in a decode."""
    lm = golden_lm("sdar_tiny")
    response = batch["response"]
    noised = np.where(
        np.random.default_rng(0).random(response.shape) < 0.7, lm.config.mask_id, response
    )
    blocks = count_blocks(jnp.full(4, size), batch["prompt_mask"], 6)
    ours = jax.jit(block_logits, static_argnums=(0, 5))(
        lm.model, lm.params, batch, noised, blocks, min(size - 1, 5)
    )
    whole = jax.jit(lm.model.apply, static_argnums=3)
    for row, (prompt, clean) in enumerate(rows_of(batch)):
        number = (len(prompt) + np.arange(6)) // size
        for block in np.unique(number):
            own = number == block
            tokens = np.where(own, noised[row], clean)  # later blocks have no effect
            text, real = pad_left([np.concatenate([prompt, tokens])], TOY.pad_id, 11)
            want = whole({"params": lm.params}, text, real, size)[0, -6:]
            np.testing.assert_allclose(ours[row][own], want[own], atol=1e-4)


def test_the_end_of_a_prompt_counts_in_the_first_block(batch):
    """The loss is that of the draws of the step's key. More of the prompt would change nothing."""
    lm, optimizer, key = golden_lm("sdar_tiny"), optax.sgd(0.0), jax.random.key(3)
    step = make_pretrain_step(lm.model, optimizer, optax.constant_schedule(1.0), (4, 3))
    _, metrics = jax.jit(step)(TrainState.create(lm.params, optimizer), batch, key)
    ratio_key, mask_key, _ = jax.random.split(jax.random.fold_in(key, 0), 3)
    sigma = losses.mask_ratios(ratio_key, 4, 1.0)
    masked = losses.draw_masks(mask_key, sigma, 6)
    noised = jnp.where(masked, lm.config.mask_id, batch["response"])
    blocks = count_blocks(jnp.array([4, 3, 4, 3]), batch["prompt_mask"], 6)
    logits = jax.jit(block_logits, static_argnums=(0, 5))(
        lm.model, lm.params, batch, noised, blocks, 5
    )
    want = losses.diffusion_loss(losses.cross_entropy(logits, batch["response"]), masked, sigma)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_a_block_causal_model_is_trained_in_its_own_blocks(batch):
    lm, optimizer = golden_lm("sdar_tiny"), optax.sgd(0.0)
    state = TrainState.create(lm.params, optimizer)
    own, given, other = (
        jax.jit(make_pretrain_step(lm.model, optimizer, optax.constant_schedule(1.0), blocks))
        .lower(state, batch, jax.random.key(0))
        .as_text()
        for blocks in ((), (lm.config.block_size,), (2,))
    )
    assert own == given != other


def test_models_that_shift_their_logits_get_no_clean_copies():
    model = golden_lm("fastdllm2_tiny").model
    for blocks in ((), (1,)):
        with pytest.raises(UserError, match="for models whose logits are not shifted"):
            make_pretrain_step(model, optax.sgd(0.0), optax.constant_schedule(1.0), blocks)
