"""x-prediction alignment (Eqs. 11, 12): the fused loss against the plain formula, and the step's promises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xflow_jax import losses
from xflow_jax.alignment import AlignSettings
from xflow_jax.config import LLaDAConfig
from xflow_jax.models import build, init_params
from xflow_jax.steps import TrainState, make_align_step, make_alignment_loss

CONFIG = LLaDAConfig(
    d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=60, embedding_size=64, mask_token_id=50,
    eos_token_id=51,
)


SETTINGS = AlignSettings(prompt_length=5, gen_length=11, batch_size=4, steps=30, chunk=4, freeze_embedding=False)


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


def plain_errors(head, hidden, table, tokens):
    p = jax.nn.softmax(head(hidden))
    table = jax.lax.stop_gradient(table)
    return jnp.sum((p @ table - table[tokens]) ** 2, axis=-1)


@pytest.mark.parametrize("chunk", [1, 4, 11, 16])
def test_the_fused_loss_is_the_plain_formula_in_value_and_gradient(setting, chunk):
    _, params, batch = setting
    hidden = jax.random.normal(jax.random.key(1), (4, 11, 32))
    tokens = batch["response"]

    def fused(w, h):
        return jnp.mean(losses.alignment_errors(lambda x: x @ w, h, params["wte"]["embedding"], tokens, chunk)[0])

    def plain(w, h):
        return jnp.mean(plain_errors(lambda x: x @ w, h, params["wte"]["embedding"], tokens))

    w = params["ff_out"]["kernel"]
    (a, grads_a), (b, grads_b) = (jax.value_and_grad(f, (0, 1))(w, hidden) for f in (fused, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(grads_a, grads_b, strict=True):
        assert float(jnp.abs(x - y).max()) <= 1e-5 * float(jnp.abs(y).max())


def test_cross_entropy_beside_it_is_the_plain_one(setting):
    _, params, batch = setting
    hidden = jax.random.normal(jax.random.key(1), (4, 11, 32))
    logits = hidden @ params["ff_out"]["kernel"]
    _, nll, _ = losses.alignment_errors(
        lambda x: x @ params["ff_out"]["kernel"], hidden, params["wte"]["embedding"], batch["response"], 4
    )
    np.testing.assert_allclose(nll, losses.cross_entropy(logits, batch["response"]), rtol=1e-5, atol=1e-6)


def test_the_table_is_a_constant_of_the_loss(setting):
    _, params, batch = setting
    hidden = jax.random.normal(jax.random.key(1), (4, 11, 32))

    def loss(table):
        head = lambda x: x @ params["ff_out"]["kernel"]  # noqa: E731
        return jnp.mean(losses.alignment_errors(head, hidden, table, batch["response"])[0])

    assert not np.any(jax.grad(loss)(params["wte"]["embedding"]))


def test_no_logits_of_the_whole_response_stand_in_memory():
    config = LLaDAConfig(
        d_model=8, n_layers=1, n_heads=1, mlp_hidden_size=8, vocab_size=4096, mask_token_id=1, eos_token_id=2
    )
    hidden = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    table = jax.ShapeDtypeStruct((config.vocab_rows, 8), jnp.float32)

    def temporary(errors) -> int:
        def loss(h, w, table, tokens):
            return jnp.mean(errors(h, w, table, tokens))

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table, table, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fused = temporary(lambda h, w, table, tokens: losses.alignment_errors(lambda x: x @ w.T, h, table, tokens, 4)[0])
    plain = temporary(lambda h, w, table, tokens: plain_errors(lambda x: x @ w.T, h, table, tokens))
    assert fused * 5 < plain


def test_metrics_tell_masked_and_clean_positions_apart(setting):
    model, params, batch = setting
    loss, metrics = make_alignment_loss(model, SETTINGS)(params, batch, jax.random.key(3))
    assert {"loss", "error_masked", "error_clean", "masked_nll"} <= set(metrics)
    low, high = sorted((float(metrics["error_masked"]), float(metrics["error_clean"])))
    assert low <= float(loss) <= high and low < high


def test_steps_lower_the_loss_and_leave_a_frozen_table_alone(setting):
    model, params, batch = setting
    labels = {k: "frozen" if k == "wte" else "trained" for k in params}
    optimizer = optax.multi_transform({"trained": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels)
    step, loss = jax.jit(make_align_step(model, optimizer, SETTINGS)), jax.jit(make_alignment_loss(model, SETTINGS))
    state = TrainState.create(params, optimizer)
    before, _ = loss(params, batch, jax.random.key(7))
    for _ in range(30):
        state, _ = step(state, batch, jax.random.key(0))
    after, _ = loss(state.params, batch, jax.random.key(7))
    assert float(after) < 0.9 * float(before)
    np.testing.assert_array_equal(state.params["wte"]["embedding"], params["wte"]["embedding"])
    assert np.any(state.params["ff_out"]["kernel"] != params["ff_out"]["kernel"])
    assert step._cache_size() == 1  # one program for the whole run


def test_accumulated_parts_average_their_gradients(setting):
    model, params, batch = setting
    optimizer = optax.sgd(1.0)
    state = TrainState.create(params, optimizer)
    key = jax.random.fold_in(jax.random.key(0), 0)
    parts = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    grads = [
        jax.grad(make_alignment_loss(model, SETTINGS), has_aux=True)(params, part, k)[0]
        for part, k in zip(parts, jax.random.split(key, 2), strict=True)
    ]
    step = make_align_step(model, optimizer, dataclasses.replace(SETTINGS, accumulate=2))
    after, _ = step(state, batch, jax.random.key(0))
    wanted = jax.tree.map(lambda p, a, b: p - (a + b) / 2, params, *grads)
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
