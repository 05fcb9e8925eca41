"""Arithmetic of the benchmark, a measurement of a toy, and bad input."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import apply, stub, toy
from tests.llada2_helpers import TINY2, toy2
from xflow_jax.benchmarks import decode_bench, timer, workload
from xflow_jax.cli import bench
from xflow_jax.decoding.generate import make_decode_config, pad_prompts
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(bench, "load_or_make", lambda name, dtype, mesh, mask_id: toy(mesh))
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: 1e11)


@pytest.mark.slow
def test_a_run_prints_and_keeps_its_numbers(toys, monkeypatch, tmp_path, capsys):
    file = tmp_path / "bench.json"
    argv = (
        "--batch-sizes=1,3",
        "--gen-length=8",
        "--steps=2",
        "--prompt-length=5",
        "--rounds=2",
        f"--json={file}",
    )
    monkeypatch.setattr(decode_bench, "LEAST_SECONDS", 0.0)
    bench.run(arguments("--model=toy", *argv))
    head, rule, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("toy: 0.01 M parameters in float32, on cpu") and "in 2 steps" in rule
    assert columns.split()[:2] == ["batch", "tokens/s"] and [row.split()[0] for row in rows] == [
        "1",
        "3",
    ]
    kept = json.loads(file.read_text())
    assert kept["model"] == "toy" and kept["gen_length"] == 8 and kept["parameters"] > 1000
    for timing, batch in zip(kept["timings"], (1, 3), strict=True):
        assert timing["batch"] == batch and timing["peak_memory"] > 1e6
        assert timing["step"] > 0 and timing["outside_share"] < 1 and timing["floor_share"] > 0
        assert math.isclose(timing["warm"], 2 * timing["step"])
        assert math.isclose(timing["tokens_per_second"], batch * 8 / timing["warm"])
        parts = timing["backbone"] + timing["head"] + timing["outside"]
        assert math.isclose(parts, timing["step"], rel_tol=1e-6)
    with pytest.raises(UserError, match="bench.json: the destination exists"):
        bench.run(arguments("--model=toy", *argv))


def test_the_forward_pass_that_is_timed_is_the_decoders():
    """As many passes as in the decode, of the whole length. The head computes the response only."""
    lm = toy()
    decode_config = make_decode_config(lm, 5, 8, 4, None, 4)
    x, mask = jnp.ones((3, 13, 16)), jnp.ones((3, 13), bool)
    h, logits = decode_bench._full_passes(lm.model, lm.params, decode_config, True, x, mask)
    wanted = x
    for _ in range(4):
        wanted = apply(lm.model, lm.params, wanted, mask, method="hidden")
    assert h.shape == (3, 13, 16) and logits.shape == (3, 8, lm.config.vocab_rows)
    assert jnp.allclose(h, wanted, atol=1e-4)
    assert jnp.allclose(
        logits, apply(lm.model, lm.params, wanted[:, -8:], method="head"), atol=1e-3
    )
    alone, nothing = decode_bench._full_passes(lm.model, lm.params, decode_config, False, x, mask)
    assert jnp.allclose(alone, h, atol=1e-6) and nothing.shape == ()


@pytest.mark.slow
def test_the_passes_with_a_cache_are_the_decoders():
    """The parts of a decode with the exact cache. This model is little more than a head."""
    lm = toy2(0, dataclasses.replace(TINY2, num_experts=None, num_hidden_layers=1))
    decode_config = dataclasses.replace(make_decode_config(lm, 8, 8, 4, None, 4), stop_at_eos=False)
    prompt, mask = jnp.arange(16).reshape(2, 8), jnp.ones((2, 8), bool)
    x, cache, logits = decode_bench._cached_passes(
        lm.model, lm.params, decode_config, True, 2, prompt, mask
    )
    assert x.shape == (2, decode_config.canvas, TINY2.hidden_size) and logits.shape == (
        2,
        4,
        lm.config.vocab_rows,
    )
    assert all(
        jnp.any(part[:, :, :12] != 0, axis=(0, 3, 4)).all() for part in jax.tree.leaves(cache)
    )
    timing = decode_bench.measure_decode(
        lm, MaskPrediction(), decode_config, 1, 8, rate=1e9, rounds=1
    )
    assert math.isclose(timing.warm, 4 * timing.step)
    padded = pad_prompts(lm, [[0] * 8])[0].shape[1]
    assert math.isclose(
        timing.floor,
        decode_bench.step_flops(lm.config, 1, 4, padded + decode_config.canvas, 4) / 1e9,
    )


def test_flops_by_hand():
    lm, b, length, canvas = toy(), 2, 13, 8
    c = lm.config
    layer = 4 * c.d_model**2 + 3 * c.d_model * c.mlp_dim  # q, k, v, out; gate, up, down
    attention = 2 * c.n_heads * length * c.head_dim * 2  # scores and their use, per position
    wanted = (
        b * length * c.n_layers * (2 * layer + attention)
        + b * canvas * 2 * c.d_model * c.vocab_rows
    )
    assert decode_bench.step_flops(c, b, length, length, canvas) == wanted


def test_guidance_counts_its_doubled_batch(monkeypatch):
    monkeypatch.setattr(decode_bench, "LEAST_SECONDS", 0.0)
    lm = stub()
    decode_config = make_decode_config(lm, 5, 4, 2, None, None)
    rules = (MaskPrediction(), MaskPrediction(cfg_scale=1.0))
    plain, guided = (
        decode_bench.measure_decode(lm, rule, decode_config, 2, 5, rate=1e9, rounds=1)
        for rule in rules
    )
    assert math.isclose(guided.floor, 2 * plain.floor)


def test_rates_are_of_real_products():
    rate = timer.matmul_rate(jnp.float32, rounds=1)
    assert 1e8 < rate < 1e16


def test_presets_have_random_weights(monkeypatch):
    small = dataclasses.replace(toy().config, n_layers=1)
    monkeypatch.setitem(workload.RANDOM_MODELS, "small", small)
    lm = workload.load_or_make("small", "bfloat16")
    assert lm.config == small and lm.tokenizer is None
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--batch-sizes=1,x"],
            "--batch-sizes must be positive whole numbers with commas between them, not '1,x'",
        ),
        (
            ["--batch-sizes=0"],
            "--batch-sizes must be positive whole numbers with commas between them, not '0'",
        ),
        (["--prompt-length=0"], "--prompt-length must be at least 1, not 0"),
        (["--rounds=0"], "--rounds must be at least 1, not 0"),
        (["--steps=0"], "steps must be a whole number of at least 1, not 0"),
        (["--prompt-length=121", "--gen-length=8"], "exceed the model's 128 positions"),
        (["--rule=flaw"], "there is no rule 'flaw', did you mean flow?"),
    ],
)
def test_bad_input(toys, argv, message):
    with pytest.raises(UserError) as error:
        bench.run(arguments("--model=toy", *argv))
    assert message in str(error.value)


def test_models_that_are_not_there():
    with pytest.raises(UserError, match="dtype is 'float16'"):
        workload.load_or_make("llada-8b", "float16")
    with pytest.raises(UserError):
        workload.load_or_make("/no/such/directory", "float32")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra [bench]")
def test_pytorch_writes_the_same_tokens(monkeypatch, tmp_path, capsys):
    # With fresh weights no confidence is 1, so there are no ties.
    monkeypatch.setitem(workload.RANDOM_MODELS, "toy", toy().config)
    file = tmp_path / "bench.json"
    argv = ("--batch-sizes=3", "--gen-length=8", "--steps=3", "--prompt-length=5", "--rounds=1")
    bench.run(arguments("--model=toy", "--against=torch", f"--json={file}", *argv))
    assert "100.0 % of the tokens are equal" in capsys.readouterr().out
    (rival,) = json.loads(file.read_text())["rivals"]
    assert rival["batch"] == 3 and rival["ours"] > 0 and rival["theirs"] > 0


def test_without_pytorch_one_sentence_names_the_extra(toys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"PyTorch is missing. It comes with the extra \[bench\]"):
        bench.run(arguments("--model=toy", "--against=torch"))
