"""Tests of train.upcycle: without attention, the result computes what the LLaDA computes."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import GOLDENS, apply, toy
from train.setup import run_program
from train.upcycle import USAGE, main, upcycle
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_params, build


@pytest.fixture(scope="module")
def made():
    lm = toy()
    return upcycle(lm.params, lm.config, 3, jax.random.key(0))


@pytest.mark.slow
def test_a_token_alone_gets_the_same_logits(made):
    params, config = made
    tokens = jnp.arange(24)[:, None]  # a softmax over one key is 1, whatever the norms
    ours = apply(build(config), params, tokens)
    np.testing.assert_allclose(ours, toy().logits(tokens), rtol=2e-5, atol=2e-5)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
        lambda x: x.shape, abstract_params(build(config))
    )


def test_the_norms_keep_the_size_of_queries_and_keys(made):
    params, _ = made
    blocks = toy().params["blocks"]
    x = jax.random.normal(jax.random.key(1), (4096, 16)) * blocks["attn_norm"]["scale"][1][None, :]
    for name in ("q", "k"):
        size = jnp.sqrt(jnp.mean((x @ blocks[f"{name}_proj"]["kernel"][1]) ** 2))
        np.testing.assert_allclose(params["blocks"][f"{name}_norm"]["scale"][0], size, rtol=0.02)


def test_what_cannot_be_upcycled():
    for change in ({"include_bias": True}, {"weight_tying": True}):
        lm = toy(**change)
        with pytest.raises(UserError, match="biases or a tied head"):
            upcycle(lm.params, lm.config, 2, jax.random.key(0))
    with pytest.raises(UserError, match="takes two layers"):
        upcycle(toy().params, dataclasses.replace(toy().config, n_layers=1), 2, jax.random.key(0))


@pytest.mark.slow
def test_the_program_and_its_mistakes(tmp_path, capsys, monkeypatch):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.upcycle", *arguments])
        with pytest.raises(SystemExit) as end:
            run_program(main, USAGE)
        return end.value.code

    out = tmp_path / "start"
    assert run(str(GOLDENS / "llada_tiny"), str(out), "--experts", "2") == 0
    assert load(out).config.num_experts == 2
    for model, words in ((GOLDENS / "llada_tiny", str(out)), (out, "of the family llada2")):
        capsys.readouterr()
        assert run(str(model), str(out if model != out else tmp_path / "other")) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1
