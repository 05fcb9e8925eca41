"""Tests of x-prediction alignment: the fused loss against the plain formula, and the step."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.family_helpers import GOLDEN_MODELS, golden_lm
from tests.helpers import eight
from xflow_jax.errors import UserError
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import build, init_params
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.training import alignment, alignment_loss, losses, pretraining
from xflow_jax.training.alignment import AlignmentConfig, make_alignment_loss
from xflow_jax.training.alignment_program import begin_trajectories, check_lengths
from xflow_jax.training.alignment_step import make_align_step
from xflow_jax.training.state import TrainState
from xflow_jax.training.trajectory import TrajectoryConfig
from xflow_jax.training.trajectory_loss import make_trajectory_loss

CONFIG = LLaDAConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    mlp_hidden_size=48,
    vocab_size=60,
    embedding_size=64,
    mask_token_id=50,
    eos_token_id=51,
)


ALIGNMENT = AlignmentConfig(
    prompt_length=5, gen_length=11, batch_size=4, steps=30, chunk=16, freeze_embedding=False
)


def batch_of(rows: int = 4, prompt: int = 5, response: int = 11) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    mask = np.ones((rows, prompt), bool)
    mask[0, :2] = False
    return {
        "prompt": jnp.asarray(rng.integers(0, 50, (rows, prompt))),
        "prompt_mask": jnp.asarray(mask),
        "response": jnp.asarray(rng.integers(0, 50, (rows, response))),
    }


@pytest.fixture(scope="module")
def setting():
    model = build(CONFIG)
    params = jax.tree.map(lambda x: x * 8, init_params(model, jax.random.key(0)))
    return model, params, batch_of()


def plain_errors(hidden, kernel, table, tokens, bias):
    """Computes Eqs. 11 and 12 as they are written, and the cross-entropy."""
    logits = hidden @ kernel + bias[None, None]
    table = jax.lax.stop_gradient(table)
    error = jnp.sum((jax.nn.softmax(logits) @ table - table[tokens]) ** 2, axis=-1)
    return error, losses.cross_entropy(logits, tokens)


def both(errors, hidden, kernel, table, tokens, bias):
    """Sums both outputs with different weights at each position, so every gradient counts."""
    error, nll = errors(hidden, kernel, table, tokens, bias)
    weight = jnp.linspace(0.5, 2.0, error.size).reshape(error.shape)
    return jnp.sum(error * weight + nll * weight[::-1])


@pytest.fixture(scope="module")
def inputs(setting):
    _, params, batch = setting
    hidden, bias = (
        jax.random.normal(jax.random.key(1), (4, 11, 32)),
        jax.random.normal(jax.random.key(2), (64,)),
    )
    return hidden, params["ff_out"]["kernel"], params["wte"]["embedding"], batch["response"], bias


@pytest.mark.parametrize("chunk", [4, 20, 64])
def test_the_fused_loss_is_the_plain_formula_in_value_and_gradient(inputs, chunk):
    fused = partial(alignment_loss.alignment_errors, chunk=chunk)
    for ours, wanted in zip(jax.jit(fused)(*inputs), plain_errors(*inputs), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))
    ours, wanted = (
        jax.jit(jax.grad(partial(both, f), (0, 1, 2, 4)))(*inputs) for f in (fused, plain_errors)
    )
    for x, y in zip(ours, wanted, strict=True):
        assert float(jnp.abs(x - y).max()) <= 1e-5 * float(jnp.abs(y).max())
    assert not np.any(ours[2])  # the table is a constant of the loss


@pytest.mark.slow
@eight
@pytest.mark.parametrize("mesh", ["1,8,1", "1,4,2", "2,2,2", "1,1,8"])
def test_it_is_right_on_a_mesh_and_under_a_sharded_vocabulary(inputs, mesh):
    hidden, kernel, table, tokens, bias = inputs
    hidden, tokens = (jnp.concatenate([x, x]) for x in (hidden, tokens))
    made = make_mesh(mesh)
    specs = (
        P(("data", "fsdp")),
        P("fsdp", "tensor"),
        P("tensor", "fsdp"),
        P(("data", "fsdp")),
        P("tensor"),
    )
    args = hidden, kernel, table, tokens, bias
    wanted = jax.jit(jax.value_and_grad(partial(both, plain_errors), (0, 1, 4)))(*args)
    placed = [
        jax.device_put(x, NamedSharding(made, spec)) for x, spec in zip(args, specs, strict=True)
    ]
    with jax.set_mesh(made):
        fused = partial(alignment_loss.alignment_errors, chunk=16)
        ours = jax.jit(jax.value_and_grad(partial(both, fused), (0, 1, 4)))(*placed)
    of_kernel = ours[1][1]  # sharded like the kernel
    assert of_kernel.sharding.is_equivalent_to(placed[1].sharding, of_kernel.ndim)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.abs(x - y).max()) <= 1e-5 * float(jnp.abs(y).max())


def test_the_logits_of_the_whole_response_are_never_in_memory():
    """The head of LLaDA-8B in float32, with 8 responses of 256 tokens and two gradients."""
    b, n, e, v = 8, 256, 4096, 126464
    shapes = [(b, n, e), (e, v), (v, e), (v,)]
    hidden, kernel, table, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    tokens = jax.ShapeDtypeStruct((b, n), jnp.int32)

    def temporary(errors) -> int:
        loss = lambda *args: jnp.mean(errors(*args)[0])  # noqa: E731
        compiled = (
            jax.jit(jax.value_and_grad(loss, (0, 1)))
            .lower(hidden, kernel, table, tokens, bias)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert 5 * temporary(alignment_loss.alignment_errors) < temporary(plain_errors)


def test_metrics_separate_masked_and_clean_positions(setting):
    model, params, batch = setting
    loss, metrics = make_alignment_loss(model, ALIGNMENT)(params, batch, jax.random.key(3))
    assert {"loss", "error_masked", "error_clean", "masked_nll"} <= set(metrics)
    low, high = sorted((float(metrics["error_masked"]), float(metrics["error_clean"])))
    assert low <= float(loss) <= high and low < high


def test_the_cross_entropy_of_clean_positions_is_added_where_asked(setting):
    model, params, batch = setting
    key = jax.random.key(3)
    weighted = dataclasses.replace(ALIGNMENT, clean_nll=0.5)
    plain, added = (
        make_alignment_loss(model, config)(params, batch, key)[0]
        for config in (ALIGNMENT, weighted)
    )
    masked, _ = alignment.draw_noise(key, batch, 0)
    tokens = jnp.concatenate([batch["prompt"], jnp.where(masked, 50, batch["response"])], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)
    nll = losses.cross_entropy(
        pretraining.response_logits(model, params, tokens, mask, 5), batch["response"]
    )
    wanted = 0.5 * jnp.mean(jnp.where(masked, 0, nll))
    assert float(wanted) > 0.1
    np.testing.assert_allclose(added - plain, wanted, rtol=1e-4)


def test_steps_lower_the_loss_and_leave_a_frozen_table_alone(setting):
    model, params, batch = setting
    labels = {k: "frozen" if k == "wte" else "trained" for k in params}
    optimizer = optax.multi_transform(
        {"trained": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels
    )
    step, loss = (
        jax.jit(make_align_step(model, optimizer, ALIGNMENT)),
        jax.jit(make_alignment_loss(model, ALIGNMENT)),
    )
    state = TrainState.create(params, optimizer)
    before, _ = loss(params, batch, jax.random.key(7))
    for _ in range(30):
        state, _ = step(state, batch, jax.random.key(0))
    after, _ = loss(state.params, batch, jax.random.key(7))
    assert float(after) < 0.9 * float(before)
    np.testing.assert_array_equal(state.params["wte"]["embedding"], params["wte"]["embedding"])
    assert np.any(state.params["ff_out"]["kernel"] != params["ff_out"]["kernel"])
    assert step._cache_size() == 1  # one program for the whole run


@pytest.mark.slow
def test_accumulated_parts_average_their_gradients(setting):
    model, params, batch = setting
    optimizer = optax.sgd(1.0)
    state = TrainState.create(params, optimizer)
    key = jax.random.fold_in(jax.random.key(0), 0)
    parts = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    grad = jax.jit(jax.grad(make_alignment_loss(model, ALIGNMENT), has_aux=True))
    grads = [
        grad(params, part, k)[0] for part, k in zip(parts, jax.random.split(key, 2), strict=True)
    ]
    step = jax.jit(make_align_step(model, optimizer, dataclasses.replace(ALIGNMENT, accumulate=2)))
    after, _ = step(state, batch, jax.random.key(0))
    wanted = jax.tree.map(lambda p, a, b: p - (a + b) / 2, params, *grads)
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, states",
    [
        ("dream_tiny", "masked"),
        ("dream_tiny", "trajectory"),
        *(
            pytest.param(name, "masked", marks=pytest.mark.slow)
            for name in GOLDEN_MODELS
            if name != "dream_tiny"
        ),
    ],
)
def test_every_family_is_aligned_at_the_rows_that_predict(name, states):
    """The cross-entropy of a position is that of its row, or of the row before it."""
    lm = golden_lm(name)
    model, params = lm.model, lm.params
    batch, size = batch_of(), 4 if lm.config.is_block_causal else 0
    config = dataclasses.replace(
        ALIGNMENT,
        states=states,
        trajectory=TrajectoryConfig(rules=("threshold",)),
        clean_nll=1.0 if states == "masked" else 0.0,
        block_length=size,
    )
    response = batch["response"]
    if states == "masked":
        key = jax.random.key(3)
        masked, _ = alignment.draw_noise(key, batch, size)
        found = jax.jit(make_alignment_loss(model, config))(params, batch, key)[1]["masked_nll"]
    else:
        masked = jnp.ones_like(response, bool)
        empty = TrainState(jnp.int32(0), params, ())
        live = begin_trajectories(lm.config, config, empty, params).live
        loss = jax.jit(make_trajectory_loss(model, config))
        found = loss(params, batch, live, jax.random.key(3))[1][0]["state_nll"]
    inputs = jnp.where(masked, lm.config.mask_id, response)
    tokens = jnp.concatenate([batch["prompt"], inputs], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)
    logits = lm.logits(tokens, mask, block_length=size or None)
    # With a shift row i predicts position i + 1.
    rows = logits[:, 4:-1] if lm.config.logits_shift else logits[:, 5:]
    nll = losses.cross_entropy(rows, response)
    np.testing.assert_allclose(found, losses.masked_mean(nll, masked), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "states", "sentence"),
    [
        ("llada21_tiny", "masked", "block_length is 0, but the model is block-causal: set block_"),
        ("fastdllm2_tiny", "trajectory", "writes the first token of a block before its first pass"),
    ],
)
def test_layouts_that_a_family_has_not_are_refused(name, states, sentence):
    block_length = 4 if states == "trajectory" else 0
    config = dataclasses.replace(ALIGNMENT, states=states, block_length=block_length)
    with pytest.raises(UserError, match=sentence):
        check_lengths(golden_lm(name).config, config)
