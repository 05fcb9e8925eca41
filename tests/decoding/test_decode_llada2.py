"""Block-causal decoding: the original's responses, and a cache that changes no token."""

from __future__ import annotations

import dataclasses
import functools
import random

import chex
import jax
import numpy as np
import pytest

from tests.decoding.helpers import prompt_arrays, python_scan
from tests.helpers import decode_golden, eight, random_prompts, stub
from tests.llada2_helpers import TINY2, llada2_tiny, random_config, random_params, toy2
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.generate import decode_batch, generate
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError
from xflow_jax.lm import LM
from xflow_jax.models.factory import build
from xflow_jax.models.logical_axes import shardings
from xflow_jax.parallel.mesh import make_mesh

GENERATE = {case["name"]: case for case in decode_golden()["llada2_generate"]}
BATCHED = {case["name"]: case for case in decode_golden()["llada2_batched_canvas"]}
DENSE = dataclasses.replace(TINY2, num_experts=None, num_hidden_layers=1)  # compiles fastest


def mostly_slow(values, default):
    """Marks all values as slow except those of the default run."""
    return [
        value if value in default else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


# --- the original decoder


def run_golden(name, cache):
    case = GENERATE[name]
    a = case["args"]
    steps = min(a["steps"], a["gen_length"] // a["minimal_topk"])
    return case, generate(
        llada2_tiny(),
        case["prompt"],
        MaskPrediction(threshold=a["threshold"]),
        a["gen_length"],
        steps_per_block=steps,
        block_length=a["block_length"],
        eos_early_stop=a["eos_early_stop"],
        trace=True,
        cache=cache,
    )


def check_golden(name, cache):
    """Checks tokens, forward passes, and what each step writes with what confidence."""
    case, out = run_golden(name, cache)
    a, response = case["args"], np.asarray(case["output"][0])
    np.testing.assert_array_equal(out.tokens[0, : len(response)], response)
    np.testing.assert_array_equal(out.tokens[0, len(response) :], a["eos_id"])
    assert out.forward_passes[0] == case["n_forward"]
    prompt, size = len(case["prompt"][0]), a["block_length"]
    steps = len(out.trace.tokens) // -(-(a["gen_length"] + size - 1) // size)
    before = np.concatenate([np.zeros_like(out.trace.progress[:1]), out.trace.progress[:-1]])
    for step in case.get("trajectory", ()):
        at = (step["block"] - prompt // size) * steps + step["step_in_block"]
        # Positions after the response are left out.
        kept = [i for i, p in enumerate(step["positions"]) if p < prompt + a["gen_length"]]
        places = np.asarray(step["positions"], int)[kept] - prompt
        written = (out.trace.progress[at, 0] == 1) & (before[at, 0] < 1)
        assert sorted(places) == np.flatnonzero(written).tolist()
        np.testing.assert_array_equal(
            out.trace.tokens[at, 0, places], np.asarray(step["tokens"])[kept]
        )
        np.testing.assert_allclose(
            out.trace.confidence[at, 0, places], np.asarray(step["confidence"])[kept], atol=1e-3
        )


PLAIN = [name for name in GENERATE if not name.startswith("quirk_")]


@pytest.mark.parametrize("name", mostly_slow(PLAIN, ["unaligned_prompt"]))
def test_mask_prediction_equals_the_original_decoder(name):
    check_golden(name, cache=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_mask_prediction_without_the_cache(name):
    check_golden(name, cache=False)


@pytest.mark.slow
def test_an_eos_in_the_prompt_is_no_end():
    """The original finds it there and returns nothing. Here only the response is searched."""
    case, out = run_golden("quirk_eos_in_prompt_with_early_stop", None)
    assert case["output"] == [[]] and case["args"]["eos_id"] in case["prompt"][0]
    stops = np.flatnonzero(out.tokens[0] == case["args"]["eos_id"])
    assert stops.size and stops[0] > 0 and (out.progress[0, : stops[0] + 1] == 1).all()
    assert out.forward_passes[0] > case["n_forward"]


@pytest.mark.parametrize("name", mostly_slow(BATCHED, []))
def test_a_batch_equals_the_original_batch(name):
    case = BATCHED[name]
    a, prompt = case["args"], len(case["prompts"][0])
    rule, n = MaskPrediction(threshold=a["threshold"]), a["max_new_tokens"]
    run = functools.partial(
        generate, llada2_tiny(), rule=rule, gen_length=n, block_length=a["block_size"], trace=True
    )
    out = run(case["prompts"], steps_per_block=a["steps_per_block"])
    np.testing.assert_array_equal(out.tokens, np.asarray(case["canvas"])[:, prompt : prompt + n])
    assert out.trace.confidence.any((1, 2)).sum() == case["n_forward"]


# --- the cache


def decode_both(lm, prompts, rule, **arguments):
    """Decodes with the cache, checks the result against the one without it, and returns it."""
    cached, plain = (
        generate(lm, prompts, rule, cache=cache, seed=5, trace=True, **arguments)
        for cache in (True, False)
    )
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_array_equal(cached.forward_passes, plain.forward_passes)
    np.testing.assert_allclose(cached.progress, plain.progress, atol=2e-3)
    for name in ("tokens", "reedited"):
        np.testing.assert_array_equal(getattr(cached.trace, name), getattr(plain.trace, name))
    for name in ("progress", "confidence", "step_fraction"):
        np.testing.assert_allclose(
            getattr(cached.trace, name), getattr(plain.trace, name), atol=2e-3
        )
    return cached


RULES = {
    "flow": Flow(),
    "threshold": Threshold(0.4),
    "guided": MaskPrediction(order="random", temperature=0.7, cfg_scale=0.5),
    "policy": Flow(
        policy=init_policy(jax.random.key(0), width=8), revise_committed=False, early_exit=True
    ),
    "synchronous": Flow(synchronous=True, commit=False, reedit_margin=None),
    "jump": Flow(jump=0.5),
    "official": MaskPrediction(threshold=0.5),
    "entropy": MaskPrediction(order="entropy"),
    "margin": MaskPrediction(order="margin", confidence_eos_eot_inf=True),
}


@pytest.mark.parametrize("name", mostly_slow(RULES, ["flow"]))
def test_the_cache_changes_nothing(name):
    """With prompts of whole blocks and others, shorter than a block too."""
    lm, prompts = toy2(1, DENSE), random_prompts([9, 20, 2, 4], seed=1, top=36)
    out = decode_both(lm, prompts, RULES[name], gen_length=10, steps=8, block_length=4)
    for row, prompt in enumerate(prompts):
        block = (len(prompt) + np.arange(10)) // 4 - len(prompt) // 4
        for step, (progress, passed) in enumerate(
            zip(out.trace.progress, out.trace.confidence, strict=True)
        ):
            now = step // 4
            assert not progress[row, block > now].any() and not passed[row, block != now].any()
            if passed[row].any():  # still decoding
                assert (progress[row, block < now] == 1).all()


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch():
    lm, prompts = toy2(1, DENSE), random_prompts([9, 20, 2, 4], seed=1, top=36)
    run = functools.partial(
        generate, lm, rule=RULES["guided"], gen_length=10, steps=8, block_length=4, seed=5
    )
    together = run(prompts)
    for row in (0, 2):
        np.testing.assert_array_equal(run([prompts[row]]).tokens[0], together.tokens[row])


@pytest.mark.parametrize("seed", mostly_slow(range(24), []))
def test_the_cache_changes_nothing_in_any_model(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    lm = toy2(seed, config)
    size = rng.choice([3, 4, 5, 8])
    lengths = [rng.randint(1, 18), size * rng.randint(1, 3), rng.randint(1, 9)]
    prompts = random_prompts(lengths, seed, top=36)
    rule = list(RULES.values())[seed % len(RULES)]
    more = {"eos_early_stop": rng.random() < 0.5, "early_exit": rng.choice([None, True])}
    decode_both(
        lm,
        prompts,
        rule,
        gen_length=rng.randint(3, 14),
        steps_per_block=rng.randint(2, 4),
        block_length=size,
        **more,
    )


def equations(jaxpr):
    """Yields all equations of a jaxpr and its inner ones."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(value, "eqns"):
                yield from equations(value)


def length(equation):
    """Returns the length of a scan, or None for other equations."""
    return equation.params["length"] if equation.primitive.name == "scan" else None


def test_a_step_costs_one_block():
    """With a cache, no product in the scan over steps has the length of the sequence."""
    lm, (ids, mask, keys) = toy2(0, DENSE), prompt_arrays(toy2(0, DENSE), [5, 20])
    config = DecodeConfig(
        gen_length=10, block_length=4, steps=2, block_causal=True, stop_at_eos=True
    )
    whole, cached = (
        mask.shape[1] + config.canvas,
        mask.shape[1] // 4 * 4 + (config.blocks - 1) * 4,
    )

    def products(cache):
        run = functools.partial(
            decode, lm.model, lm.params, Threshold(), dataclasses.replace(config, cache=cache)
        )
        (outer,) = (
            e for e in equations(jax.make_jaxpr(run)(ids, mask, keys)) if length(e) == config.blocks
        )
        (inner,) = (e for e in equations(outer.params["jaxpr"]) if length(e) == config.steps)
        dots = (e for e in equations(inner.params["jaxpr"]) if e.primitive.name == "dot_general")
        return {axis for e in dots for x in (*e.invars, *e.outvars) for axis in x.aval.shape}

    assert whole in products("none")
    assert whole not in products("exact") and cached + 4 in products("exact")


def test_one_compilation_for_all_blocks():
    lm = toy2(1, DENSE)
    run = functools.partial(
        generate, lm, rule=Threshold(0.41), gen_length=8, steps=8, block_length=4
    )
    decode_batch.clear_cache()  # of other modules' programs
    before = decode_batch._cache_size()
    for seed in range(3):
        run(random_prompts([3 + seed, 12], seed, top=36))
    assert decode_batch._cache_size() == before + 1


@pytest.mark.slow
def test_the_scans_equal_plain_loops():
    lm = toy2(2, DENSE)
    config = DecodeConfig(5, 3, 2, block_causal=True, cache="exact", stop_at_eos=True, trace=True)
    inputs = prompt_arrays(lm, [5, 3])
    scanned = jax.jit(lambda *a: decode(lm.model, lm.params, Flow(), config, *a))(*inputs)
    with jax.disable_jit():
        plain = decode(lm.model, lm.params, Flow(), config, *inputs, scan=python_scan)
    chex.assert_trees_all_close(scanned, plain, atol=2e-5)


@eight
@pytest.mark.slow
@pytest.mark.parametrize("spec, name", [("2,2,2", "flow"), ("1,4,2", "guided")])
def test_a_mesh_changes_no_token(spec, name):
    mesh, config = make_mesh(spec), dataclasses.replace(TINY2, num_key_value_heads=4)
    model = build(config)
    params = random_params(model)
    params["ff_out"]["kernel"] *= 4
    sharded = LM(
        model, config, jax.device_put(params, shardings(params, mesh, "llada2")), None, mesh
    )
    prompts = random_prompts([9, 20, 2], seed=1, top=36)
    run = functools.partial(
        generate, prompts=prompts, rule=RULES[name], gen_length=10, steps=8, block_length=4
    )
    np.testing.assert_array_equal(run(sharded).tokens, run(LM(model, config, params, None)).tokens)


def test_no_exact_cache_with_attention_to_later_blocks():
    with pytest.raises(
        UserError,
        match="^llada attends to later blocks, so it has no exact cache. Leave cache out.$",
    ):
        generate(stub(), [[1, 2]], Flow(), gen_length=8, steps=8, cache=True)


@eight
@pytest.mark.slow
def test_a_decode_step_uses_the_stacked_experts_of_all_layers(monkeypatch):
    """The stacked kernel runs if no device gathers experts, by default on TPUs."""
    x, params = jax.random.normal(jax.random.key(0), (2, 8, 32)), random_params(build(TINY2))

    def run(kernel, spec="1,1,1", only_text=False):
        model, mesh = build(TINY2, experts_kernel=kernel), make_mesh(spec)
        cache = model.empty_cache(2, 0)

        def apply(params, x):
            return model.apply({"params": params}, x, cache, 0, None, 4, method="hidden_cached")[0]

        with jax.set_mesh(mesh):
            text = str(jax.make_jaxpr(apply)(params, x))
            return "[16,32,24]" in text, None if only_text else jax.jit(apply)(
                jax.device_put(params, shardings(params, mesh, "llada2")), x
            )

    (at_once, wanted), (_, ours) = run("ragged"), run("stacked", "2,1,2")
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
    assert not at_once and run("stacked", only_text=True)[0]  # the two layers' eight experts as one
    assert not run("stacked", "1,2,1", only_text=True)[0]
    assert not run(None, only_text=True)[0]
    monkeypatch.setattr("xflow_jax.models.moe.platform", lambda: "tpu")
    assert run(None, only_text=True)[0]
