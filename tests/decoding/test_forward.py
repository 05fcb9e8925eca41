"""Stale keys and values of the prompt: exact if none can be old, and independent of the batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eight, random_prompts, toy
from tests.llada2_helpers import toy2
from xflow_jax.decoding.generate import decode_batch, generate
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError

PROMPTS = random_prompts([3, 20, 7, 1, 12])
GUIDED = MaskPrediction(cfg_scale=0.5)  # doubles the batch
SLOW = [("float32", Flow()), ("bfloat16", Flow()), ("bfloat16", GUIDED)]


def run(lm, rule, prompts=PROMPTS, refresh=3, steps=8, cache=None):
    """Decodes two blocks of four tokens.

    By default each has four steps, and the first and the last of them renew the prompt.
    """
    options = {"refresh": refresh, "cache": cache}
    return generate(lm, prompts, rule, 8, steps, block_length=4, trace=True, **options)


def test_a_refresh_of_1_is_off():
    for rule in (Flow(), GUIDED):
        off, every = (run(toy(n_layers=1), rule, refresh=r) for r in (0, 1))
        for ours, wanted in zip(*map(jax.tree.leaves, (every.trace, off.trace)), strict=True):
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Flow(), GUIDED])
def test_the_first_step_of_a_block_renews_the_prompt(rule):
    """With one step in a block, nothing is ever old."""
    off, ours = (run(toy(), rule, steps=2, refresh=0, cache=c) for c in ("none", "prompt"))
    np.testing.assert_array_equal(ours.tokens, off.tokens)
    np.testing.assert_allclose(ours.trace.confidence, off.trace.confidence, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, rule",
    [("float32", GUIDED), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_one_layer_is_exact(dtype, rule):
    """With one layer, keys and values come from the embeddings alone and are never old."""
    lm, tolerance = toy(n_layers=1), 2e-4
    if dtype == "bfloat16":
        params, tolerance = jax.tree.map(lambda x: x.astype(dtype), lm.params), 0.05
        lm = dataclasses.replace(lm, model=lm.model.clone(dtype=jnp.bfloat16), params=params)
    off, ours = (run(lm, rule, refresh=r) for r in (0, 3))
    np.testing.assert_allclose(ours.trace.confidence, off.trace.confidence, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.progress, off.progress, rtol=0, atol=tolerance)


class NumpyModel:
    """The model in NumPy, for one sequence, with stored keys and values of the prompt."""

    def __init__(self, lm, prompt):
        self.p, self.config = (
            jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params),
            lm.config,
        )
        self.prompt, self.stored = self.p["wte"]["embedding"][prompt], {}

    def confidence(self, tokens, renew):
        """Returns the highest probability at each position of a canvas [N]."""
        c, x = self.config, self.p["wte"]["embedding"][tokens]
        x, start = (np.concatenate([self.prompt, x]), 0) if renew else (x, len(self.prompt))
        for layer in range(c.n_layers):
            part = jax.tree.map(lambda leaf, at=layer: leaf[at], self.p["blocks"])
            h = self.norm(x, part["attn_norm"])
            q, k, v = (self.split_heads(h @ part[f"{name}_proj"]["kernel"]) for name in "qkv")
            q, k = self.rotate(q, start), self.rotate(k, start)
            if renew:
                self.stored[layer] = k[:, : len(self.prompt)], v[:, : len(self.prompt)]
            else:
                k, v = (
                    np.concatenate([old, new], 1)
                    for old, new in zip(self.stored[layer], (k, v), strict=True)
                )
            scores = np.exp(np.einsum("hqd,hkd->hqk", q, k) / c.head_dim**0.5)
            h = np.einsum("hqk,hkd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(
                len(x), -1
            )
            x = x + h @ part["attn_out"]["kernel"]
            h = self.norm(x, part["ff_norm"])
            gate = h @ part["ff_proj"]["kernel"]
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * (h @ part["up_proj"]["kernel"]))
                @ part["ff_out"]["kernel"]
            )
        z = self.norm(x[-len(tokens) :], self.p["ln_f"]) @ self.p["ff_out"]["kernel"]
        z = np.exp(z - z.max(-1, keepdims=True))
        return (z / z.sum(-1, keepdims=True)).max(-1)

    def norm(self, x, part):
        return (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * part["scale"]
        )

    def split_heads(self, x):
        return x.reshape(len(x), self.config.n_heads, -1).transpose(1, 0, 2)

    def rotate(self, x, start):
        half = self.config.head_dim // 2
        angle = np.outer(
            start + np.arange(x.shape[1]), self.config.rope_theta ** (-np.arange(half) / half)
        )
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )


def test_confidences_equal_those_of_the_numpy_model():
    """In every step, from the tokens written before it. With old keys and values they differ."""
    lm = toy()
    trace, difference = run(lm, MaskPrediction()).trace, 0.0
    for row, prompt in enumerate(PROMPTS):
        model, tokens = NumpyModel(lm, prompt), np.full(8, lm.config.mask_id)
        for step in range(8):
            wanted = model.confidence(tokens, renew=step % 4 in (0, 3))
            np.testing.assert_allclose(trace.confidence[step, row], wanted, rtol=0, atol=1e-4)
            exact = NumpyModel(lm, prompt).confidence(tokens, renew=True)
            difference = max(difference, np.abs(exact - wanted).max())
            before = trace.progress[step - 1, row] if step else np.zeros(8)
            written = (trace.progress[step, row] == 1) & (before < 1)
            tokens = np.where(written, trace.tokens[step, row], tokens)
    assert difference > 0.01


def test_rows_do_not_depend_on_their_batch():
    """A row alone has less padding, and skips steps that its batch takes."""
    rule = Threshold(0.4)
    decode_batch.clear_cache()  # of other modules' programs
    together, programs = run(toy(), rule), decode_batch._cache_size()
    assert len(set(together.forward_passes.tolist())) > 1
    for row in (0, 2, 3, 4):
        alone = run(toy(), rule, PROMPTS[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.forward_passes[0] == together.forward_passes[row]
    assert decode_batch._cache_size() == programs + 1


@pytest.mark.slow
@eight
def test_a_mesh_changes_no_token():
    sharded, plain = (run(lm, MaskPrediction()) for lm in (toy("2,2,2"), toy()))
    np.testing.assert_array_equal(sharded.trace.tokens, plain.trace.tokens)
    np.testing.assert_allclose(sharded.trace.confidence, plain.trace.confidence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("refresh", [-1, 2.0, True])
def test_wrong_refresh(refresh):
    with pytest.raises(
        UserError, match=f"^refresh must be a whole number of at least 0, not {refresh}$"
    ):
        run(toy(), Flow(), refresh=refresh)


def test_block_causal_models_have_an_exact_cache():
    with pytest.raises(
        UserError, match="^llada2 is block-causal, so its cache is exact and never refreshed. Leave"
    ):
        run(toy2(), Flow())
