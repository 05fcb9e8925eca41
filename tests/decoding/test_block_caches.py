"""Caches of bidirectional models: a plain twin, goldens, batches, meshes and bad input."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.cache_twin import Setting
from tests.decoding.cache_twin import decode as decode_twin
from tests.decoding.helpers import prompt_arrays
from tests.helpers import eight, random_prompts, toy
from tests.llada2_helpers import toy2
from xflow_jax.decoding.blocks import make_schedule
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.cached_forward import make_forward
from xflow_jax.decoding.generate import Generation, decode_batch, generate
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.parsing import parse_rule
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError

PROMPTS = random_prompts([3, 20, 7, 1, 12])
HARD = Setting("dual", refresh=3, window=5, prompt_every=2, rule="threshold")
SETTINGS = [
    Setting("prompt", refresh=3, prompt_every=2, rule="flow"),
    Setting("prefix", rule="threshold"),
    Setting("dual", window=3, rule="flow"),
    Setting("dual", refresh=3, window=2, prompt_every=2, guidance=0.5),
    HARD,
]
SLOW = [
    Setting("none"),
    Setting("prompt"),
    Setting("prefix", prompt_every=2, rule="flow"),
    Setting("prefix", refresh=2, guidance=0.5),
    Setting("prefix", blocks=6, size=2, steps=2, rule="threshold"),
    Setting("dual"),
    Setting("dual", rule="threshold"),
    Setting("dual", rule="flow"),
    Setting("dual", guidance=0.5),
    Setting("dual", refresh=2, rule="flow"),
    Setting("dual", prompt_every=2, rule="threshold"),
    Setting("dual", window=12, rule="flow"),
    Setting("dual", blocks=1, size=12, steps=3, rule="flow"),
]
ALL_RULES = (
    *("mask:order=random", "mask:cfg_scale=0.5", "mask:threshold=0.4"),
    *("threshold:tau=0.4", "factor", "eb:gamma=1", "klass:tau=0.3,epsilon=1", "softmask", "edit"),
    *("flow", "flow:jump=0.5", "flow:early_exit=true"),
)


def rule_of(setting: Setting) -> Rule:
    if setting.rule == "threshold":
        return Threshold(setting.tau)
    return Flow() if setting.rule == "flow" else MaskPrediction(cfg_scale=setting.guidance)


def run(lm, setting: Setting, prompts=PROMPTS, rule=None, **changes) -> Generation:
    names = ("cache", "refresh", "window", "prompt_every")
    arguments = {name: getattr(setting, name) for name in names}
    return generate(
        lm,
        prompts,
        rule or rule_of(setting),
        setting.blocks * setting.size,
        steps_per_block=setting.steps,
        block_length=setting.size,
        trace=True,
        seed=5,
        **arguments | changes,
    )


def check_equal(ours: Generation, wanted: Generation) -> None:
    """Compares tokens, passes and progress, and the confidence in the active blocks."""
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_array_equal(ours.forward_passes, wanted.forward_passes)
    np.testing.assert_allclose(ours.progress, wanted.progress, rtol=0, atol=2e-3)
    both = np.where(ours.trace.confidence > 0, wanted.trace.confidence, 0)
    np.testing.assert_allclose(ours.trace.confidence, both, rtol=0, atol=2e-3)


def name_of(setting: Setting) -> str:
    default = dataclasses.asdict(Setting(""))
    fields = dataclasses.asdict(setting).items()
    return " ".join(f"{key}={value}" for key, value in fields if value != default[key])


def slow(cases: list[Setting]) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("setting", [*SETTINGS, *slow(SLOW)], ids=name_of)
def test_a_decode_equals_the_numpy_twin(setting):
    lm, filled = toy(), 0
    out = run(lm, setting)
    for row, prompt in enumerate(PROMPTS):
        tokens, passes = decode_twin(lm, prompt, setting)
        np.testing.assert_array_equal(out.tokens[row], tokens)
        assert out.forward_passes[row] == len(passes)
        taken = [0] * setting.blocks
        for step in passes:
            at = step.block * setting.steps + taken[step.block]
            part = slice(step.block * setting.size, (step.block + 1) * setting.size)
            for ours, wanted in (
                (out.trace.confidence, step.confidence),
                (out.trace.progress, step.t),
            ):
                np.testing.assert_allclose(ours[at, row, part], wanted, rtol=0, atol=2e-3)
            taken[step.block] += 1
        filled += taken.count(1)
    if setting.rule == "threshold":
        assert filled  # some block was filled by its first pass


# --- against the decode without a cache


def test_the_belief_covers_the_block_alone():
    """With a dual or prefix cache, as under block-causal attention."""
    setting = Setting("dual", window=3, rule="flow")
    trace = run(toy(), setting).trace
    block = np.arange(12) // setting.size
    for step in range(12):
        outside = block != step // setting.steps
        assert not trace.confidence[step][:, outside].any()
        assert not trace.reedited[step][:, outside].any()
        assert (trace.confidence[step][:, ~outside] > 0).all()


@pytest.mark.parametrize(
    "cache, rule",
    [
        ("dual", "edit"),
        *(
            pytest.param(cache, rule, marks=pytest.mark.slow)
            for cache in ("prefix", "dual")
            for rule in ALL_RULES
        ),
    ],
)
def test_one_layer_is_exact(cache, rule):
    """With one layer, keys and values come from the embeddings, which only a block changes."""
    lm, rule = toy(n_layers=1), parse_rule(rule)[1]
    plain = run(lm, Setting("none"), rule=rule)
    check_equal(run(lm, Setting(cache), rule=rule), plain)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("cache", ["prompt", "prefix", "dual"])
def test_a_refresh_in_every_step_is_exact(cache, rule):
    rule = parse_rule(rule)[1]
    check_equal(
        run(toy(), Setting(cache, refresh=1), rule=rule), run(toy(), Setting("none"), rule=rule)
    )


def test_a_refresh_alone_is_the_cache_of_the_prompt():
    config, lengths = toy().config, DecodeConfig(12, 4, 4)
    named = CacheOptions("prompt", refresh=3).apply(config, lengths)
    assert CacheOptions(refresh=3).apply(config, lengths) == named
    assert CacheOptions(refresh=1).apply(config, lengths) == lengths
    assert CacheOptions(refresh=3).describe(config) == {"refresh": 3}


# --- batches and meshes


@pytest.mark.parametrize(
    "setting",
    [
        HARD,
        Setting("dual", window=3, rule="flow"),
        Setting("dual", guidance=0.5, prompt_every=3, refresh=2, window=4),
        Setting("prefix", prompt_every=2, rule="threshold"),
        Setting("prompt", prompt_every=2, refresh=3, rule="threshold"),
    ],
    ids=name_of,
)
@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(setting):
    """Alone they have less padding or none, and skip steps that their batch takes."""
    check_rows(setting, rule_of(setting))


@pytest.mark.slow
def test_drawn_tokens_do_not_depend_on_their_batch():
    check_rows(Setting("dual"), MaskPrediction(temperature=0.5))


def check_rows(setting: Setting, rule: Rule) -> None:
    prompts = random_prompts([3, 16, 7, 1, 12, 32, 20])
    decode_batch.clear_cache()  # of other modules' programs
    together = run(toy(), setting, prompts, rule)
    if setting.rule == "threshold":
        assert len(set(together.forward_passes.tolist())) > 1
    programs = decode_batch._cache_size()
    for row, prompt in enumerate(prompts):
        alone = run(toy(), setting, [prompt], rule)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.forward_passes[0] == together.forward_passes[row]
        np.testing.assert_allclose(alone.progress[0], together.progress[row], rtol=0, atol=2e-3)
        took = alone.trace.confidence[:, 0] > 0
        both = (out.trace.confidence[:, i][took] for out, i in ((alone, 0), (together, row)))
        np.testing.assert_allclose(*both, rtol=0, atol=2e-3)
    assert decode_batch._cache_size() == programs + 2  # one for each padded length


@eight
@pytest.mark.parametrize(
    "mesh, setting",
    [
        ("2,2,2", HARD),
        *(
            pytest.param(mesh, setting, marks=pytest.mark.slow)
            for mesh, setting in [
                ("1,8,1", HARD),
                ("1,1,2", Setting("prefix", prompt_every=2, rule="flow")),
                ("8,1,1", Setting("dual", guidance=0.5, refresh=2)),
            ]
        ),
    ],
)
def test_a_mesh_changes_no_token(mesh, setting):
    prompts = random_prompts([3, 16, 7, 1, 12, 32, 20])
    check_equal(run(toy(mesh), setting, prompts), run(toy(), setting, prompts))


def equations(jaxpr):
    """Yields the equations of a jaxpr and of all jaxprs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                yield from equations(value)


@pytest.mark.parametrize("cache, window, queries", [("dual", 0, {4}), ("dual", 3, {10})])
def test_a_step_computes_the_queries_of_one_block(cache, window, queries):
    """No product with a matrix of the model has more rows."""
    lm, (ids, mask, _) = toy(), prompt_arrays(toy(), [5, 20])
    config = DecodeConfig(36, 4, 2, cache=cache, window=window)
    x = jnp.zeros((2, config.canvas, 16))
    prompt = jnp.zeros((*ids.shape, 16))
    forward = make_forward(lm.model, lm.params, config, prompt, mask, x[..., 0] == 0)
    step = jax.tree.map(lambda part: part[1], make_schedule(config))
    jaxpr = jax.make_jaxpr(forward._reuse)(x, step, forward.init_cache())
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert {e.invars[0].aval.shape[1] for e in dots if e.invars[1].aval.ndim == 2} == queries


@pytest.mark.parametrize(
    "cache, prompt_every",
    [
        ("dual", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dual", 1), ("prefix", 1), ("prefix", 2), ("prompt", 1), ("prompt", 2))
        ),
    ],
)
def test_no_step_copies_the_cache(cache, prompt_every):
    """The compiled loop holds no copy of all keys or values."""
    lm, config = toy(), DecodeConfig(20, 4, 3, cache=cache, prompt_every=prompt_every)
    ids, keys = jnp.zeros((2, 16), jnp.int32), jax.random.split(jax.random.key(0), 2)
    arrays = (ids, ids == 0, keys)
    text = decode_batch.lower(lm.model, lm.params, MaskPrediction(), config, *arrays)
    loop = text.compile().as_text().partition("\nENTRY ")[0]
    forward = make_forward(lm.model, lm.params, config, jnp.zeros((2, 16, 16)), *arrays[1:2] * 2)
    shape = ",".join(map(str, forward.init_cache()["blocks"]["k"].shape))
    assert f"f32[{shape}]" in loop
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", loop)


# --- bad input


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"cache": "duel"}, "there is no cache 'duel'. There are none, exact, prompt, prefix"),
        ({"window": -1}, "window must be a whole number of at least 0, not -1"),
        ({"window": 13}, "window 13 exceeds the response of 12 tokens"),
        ({"refresh": 5}, "refresh 5 exceeds the 4 steps of a block"),
        ({"refresh": -1}, "refresh must be a whole number of at least 0, not -1"),
        ({"prompt_every": 0}, "prompt_every must be a whole number of at least 1, not 0"),
        ({"cache": "prefix", "window": 2}, "window 2 needs cache dual, not prefix"),
        ({"cache": "none", "refresh": 2}, "refresh 2 needs cache prompt, prefix or dual, not none"),
        ({"cache": None, "prompt_every": 2}, "prompt_every 2 needs cache prompt"),
        (
            {"cache": "exact"},
            "llada attends to later blocks, so it has no exact cache. Leave cache",
        ),
    ],
)
def test_wrong_caches(changes, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        run(toy(), Setting("dual"), **changes)


@pytest.mark.parametrize("cache", ["prompt", "prefix", "dual"])
def test_a_block_causal_model_has_an_exact_cache(cache):
    sentence = "^llada2 is block-causal, so its cache is exact. Use cache exact or none, not "
    with pytest.raises(UserError, match=sentence + cache):
        run(toy2(), Setting(cache))
