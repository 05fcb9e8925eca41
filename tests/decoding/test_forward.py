"""The prompt as it was some steps ago: exact where nothing can be old, old where it should be, and safe to batch."""

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
GUIDED = MaskPrediction(cfg_scale=0.5)  # in a doubled batch
SLOW = [("float32", Flow()), ("bfloat16", Flow()), ("bfloat16", GUIDED)]


def run(lm, rule, prompts=PROMPTS, refresh=3, steps=8):
    """Two blocks of four tokens, by default in four steps each, of which the first and the last read all anew."""
    return generate(lm, prompts, rule, 8, steps, block_length=4, trace=True, refresh=refresh)


def test_every_step_is_off():
    for rule in (Flow(), GUIDED):
        off, every = (run(toy(n_layers=1), rule, refresh=r) for r in (0, 1))
        jax.tree.map(np.testing.assert_array_equal, off.trace, every.trace)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Flow(), GUIDED])
def test_the_first_step_of_a_block_reads_all_anew(rule):
    """With one step in a block nothing is ever old."""
    off, ours = (run(toy(), rule, refresh=r, steps=2) for r in (0, 3))
    np.testing.assert_array_equal(ours.tokens, off.tokens)
    np.testing.assert_allclose(ours.trace.confidence, off.trace.confidence, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, rule",
    [("float32", GUIDED), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_one_layer_is_exact(dtype, rule):
    """Its keys and values of the prompt come from the embeddings alone, so they are never old."""
    lm, near = toy(n_layers=1), 2e-4
    if dtype == "bfloat16":
        params, near = jax.tree.map(lambda x: x.astype(dtype), lm.params), 0.05
        lm = dataclasses.replace(lm, model=lm.model.clone(dtype=jnp.bfloat16), params=params)
    off, ours = (run(lm, rule, refresh=r) for r in (0, 3))
    np.testing.assert_allclose(ours.trace.confidence, off.trace.confidence, rtol=0, atol=near)
    np.testing.assert_allclose(ours.progress, off.progress, rtol=0, atol=near)


class Twin:
    """The model in NumPy, one sequence, with the prompt's keys and values kept by hand."""

    def __init__(self, lm, prompt):
        self.p, self.config = (
            jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params),
            lm.config,
        )
        self.prompt, self.kept = self.p["wte"]["embedding"][prompt], {}

    def confidence(self, tokens, anew):
        """Of a canvas of tokens [N]: the highest probability at each position [N]."""
        c, x = self.config, self.p["wte"]["embedding"][tokens]
        x, start = (np.concatenate([self.prompt, x]), 0) if anew else (x, len(self.prompt))
        for layer in range(c.n_layers):
            part = jax.tree.map(lambda leaf, at=layer: leaf[at], self.p["blocks"])
            h = self.norm(x, part["attn_norm"])
            q, k, v = (self.heads(h @ part[f"{name}_proj"]["kernel"]) for name in "qkv")
            q, k = self.turn(q, start), self.turn(k, start)
            if anew:
                self.kept[layer] = k[:, : len(self.prompt)], v[:, : len(self.prompt)]
            else:
                k, v = (
                    np.concatenate([old, new], 1)
                    for old, new in zip(self.kept[layer], (k, v), strict=True)
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

    def heads(self, x):
        return x.reshape(len(x), self.config.n_heads, -1).transpose(1, 0, 2)

    def turn(self, x, start):
        half = self.config.head_dim // 2
        angle = np.outer(
            start + np.arange(x.shape[1]), self.config.rope_theta ** (-np.arange(half) / half)
        )
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )


def test_a_twin_that_keeps_keys_and_values_by_hand():
    """Every step's confidence, from what mask prediction had written by then; where old, it is not the exact one."""
    lm = toy()
    trace, old = run(lm, MaskPrediction()).trace, 0.0
    for row, prompt in enumerate(PROMPTS):
        twin, tokens = Twin(lm, prompt), np.full(8, lm.config.mask_id)
        for step in range(8):
            wanted = twin.confidence(tokens, anew=step % 4 in (0, 3))
            np.testing.assert_allclose(trace.confidence[step, row], wanted, rtol=0, atol=1e-4)
            old = max(old, np.abs(Twin(lm, prompt).confidence(tokens, anew=True) - wanted).max())
            before = trace.progress[step - 1, row] if step else np.zeros(8)
            written = (trace.progress[step, row] == 1) & (before < 1)
            tokens = np.where(written, trace.tokens[step, row], tokens)
    assert old > 0.01


def test_rows_do_not_depend_on_their_batch():
    """Alone and padded less, among others, and where others take steps that a row alone would skip."""
    rule = Threshold(0.4)
    together, programs = run(toy(), rule), decode_batch._cache_size()
    assert len(set(together.forward_passes.tolist())) > 1
    for row in (0, 2, 3, 4):
        alone = run(toy(), rule, PROMPTS[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.forward_passes[0] == together.forward_passes[row]
    assert decode_batch._cache_size() == programs + 1


@eight
def test_a_mesh_changes_no_token():
    sharded, plain = (run(lm, MaskPrediction()) for lm in (toy("2,2,2"), toy()))
    np.testing.assert_array_equal(sharded.trace.tokens, plain.trace.tokens)
    np.testing.assert_allclose(sharded.trace.confidence, plain.trace.confidence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("refresh", [-1, 2.0, True])
def test_no_number_of_steps(refresh):
    with pytest.raises(
        UserError, match=f"^refresh must be a whole number of at least 0, not {refresh}$"
    ):
        run(toy(), Flow(), refresh=refresh)


def test_block_causal_models_have_an_exact_cache():
    with pytest.raises(
        UserError, match="^llada2 is block-causal, so its cache is exact and never refreshed; leave"
    ):
        run(toy2(), Flow())
