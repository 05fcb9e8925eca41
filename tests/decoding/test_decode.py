"""The decoder against plain loops and NumPy, its early exits, and properties of all states."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.helpers import prompt_arrays, python_scan
from tests.helpers import STUB, TOY, Stub, random_prompts, stub, stub_hidden, stub_params, toy
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.generate import decode_batch, generate
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.models.factory import abstract_params, build


@pytest.mark.parametrize(
    "rule, more",
    [
        pytest.param(
            Flow(policy=init_policy(jax.random.key(0), width=8)), {}, marks=pytest.mark.slow
        ),
        (MaskPrediction(order="random", cfg_scale=0.5), {"eos_early_stop": True}),
        (Threshold(0.5), {"early_exit": True}),
    ],
    ids=["flow", "mask", "threshold"],
)
def test_the_scan_equals_a_plain_loop(rule, more):
    lm = stub()
    config = DecodeConfig(gen_length=6, block_length=3, steps=2, trace=True, **more)
    inputs = prompt_arrays(lm, [5, 3])
    scanned = jax.jit(lambda *a: decode(lm.model, lm.params, rule, config, *a))(*inputs)
    with jax.disable_jit():  # conditions become Python too
        plain = decode(lm.model, lm.params, rule, config, *inputs, scan=python_scan)
    chex.assert_trees_all_close(scanned, plain, atol=2e-5)
    chex.assert_trees_all_equal(scanned[1].tokens, plain[1].tokens)
    chex.assert_trees_all_equal(scanned[0].forward_passes, plain[0].forward_passes)


def test_a_flow_that_takes_nothing_back_is_threshold_decoding():
    lm, shape = toy(), {"gen_length": 16, "block_length": 8, "steps": 16}
    prompts = random_prompts([3, 5, 4, 6])
    written = Flow(reedit="always", jump=0.5, floor=1.0, replace_above=1.0, early_exit=True)
    outputs = [generate(lm, prompts, rule, **shape) for rule in (written, Threshold(0.5))]
    assert 2 < np.mean(outputs[0].forward_passes) < 16
    chex.assert_trees_all_equal(*((out.tokens, out.forward_passes) for out in outputs))


def numpy_flow(
    p, config, prompt, gen_length, block_length, steps, power, margin, revise, commit, synchronous
):
    """Runs the flow in float64 NumPy, one position at a time, from the equations alone."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    table = p["wte"]["embedding"]
    m = table[config.mask_id]
    x, t = np.tile(m, (gen_length, 1)), np.zeros(gen_length)
    tokens, history = np.full(gen_length, config.mask_id), []
    for start in range(0, gen_length, block_length):
        block = range(start, start + block_length)
        for i in range(start):
            if t[i] < 1:
                x[i], t[i] = table[tokens[i]], 1.0
        for step in range(steps):
            both = np.concatenate([table[prompt], x])
            hidden = stub_hidden(np, p, both[None], np.ones((1, len(both)), bool))
            logits = hidden[0, -gen_length:] @ p["ff_out"]["kernel"]
            logits[:, config.mask_id] = logits[:, config.vocab_size :] = -np.inf
            z = np.exp(logits - logits.max(-1, keepdims=True))
            c, v = (z / z.sum(-1, keepdims=True)).max(-1), logits.argmax(-1)
            for i in block:
                target = table[v[i]]
                if t[i] < 1:
                    tokens[i] = v[i]
                if margin is not None and c[i] - t[i] < -margin and (revise or t[i] < 1):
                    x[i], t[i], tokens[i] = c[i] * target + (1 - c[i]) * m, c[i], v[i]
                elif t[i] < 1:
                    a = 1 / (steps - step) if synchronous else max(c[i] ** power, 1 / 256)
                    x[i], t[i] = x[i] + a * (target - x[i]), t[i] + a * (1 - t[i])
            open_ = [i for i in block if t[i] < 0.99]
            if commit and open_:
                best = max(open_, key=lambda i: (c[i], -i))
                x[best], t[best] = table[v[best]], 1.0
            history.append((c.copy(), t.copy(), v.copy()))
    return x, t, tokens, history


FLOW_CASES = [
    (12, 12, 5, {}),
    (12, 4, 3, {"power": 1.0}),
    (10, 5, 4, {"revise": False}),
    (9, 9, 6, {"margin": None, "power": 3.0}),
    (8, 4, 3, {"commit": False}),
    (8, 8, 4, {"synchronous": True, "commit": False, "margin": None}),
    (8, 8, 1, {}),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gen_length, block_length, steps, switches", FLOW_CASES)
def test_flow_equals_the_equations(gen_length, block_length, steps, switches, seed):
    wanted = {
        "power": 2.0,
        "margin": 0.1,
        "revise": True,
        "commit": True,
        "synchronous": False,
    } | switches
    params = stub_params(seed, 6, STUB.vocab_rows, 1.5)
    rule = Flow(
        power=wanted["power"],
        revise_committed=wanted["revise"],
        reedit_margin=wanted["margin"],
        commit=wanted["commit"],
        synchronous=wanted["synchronous"],
    )
    prompt = random_prompts([5], seed, 8)[0]
    config = DecodeConfig(gen_length, block_length, steps, trace=True)
    inputs = (jnp.asarray([prompt]), jnp.ones((1, 5), bool), jax.random.split(jax.random.key(0), 1))
    state, trace = _jit_decode(Stub(STUB), params, rule, config, *inputs)
    x, t, tokens, history = numpy_flow(
        params, STUB, prompt, gen_length, block_length, steps, **wanted
    )
    confidence, progress, predicted = (np.stack(part) for part in zip(*history, strict=True))
    np.testing.assert_array_equal(trace.tokens[:, 0], predicted)
    np.testing.assert_allclose(trace.confidence[:, 0], confidence, atol=1e-4)
    np.testing.assert_allclose(trace.progress[:, 0], progress, atol=1e-4)
    np.testing.assert_array_equal(state.tokens[0], tokens)
    np.testing.assert_allclose(state.x[0], x, atol=1e-3)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _jit_decode(model, params, rule, config, *inputs):
    return decode(model, params, rule, config, *inputs)


# --- compilations


def test_one_compilation_per_shape_and_rule():
    prompts = functools.partial(random_prompts, top=8)
    run = functools.partial(generate, stub(), gen_length=5, steps=5)
    decode_batch.clear_cache()  # of other modules' programs
    run(prompts([3, 9]), Threshold(0.31))
    before = decode_batch._cache_size()
    for seed in range(3):  # other prompts, lengths with the same padding, and seeds
        run(prompts([4 + seed, 16], seed), Threshold(0.31), seed=seed)
    assert decode_batch._cache_size() == before
    run(prompts([3, 9]), Threshold(0.32))
    run(prompts([3, 17]), Threshold(0.31))
    run(prompts([3, 9, 9]), Threshold(0.31))
    assert decode_batch._cache_size() == before + 3
    run(prompts([3, 9]), Flow(policy=init_policy(jax.random.key(0), width=8)))
    # Another policy has the same program.
    run(prompts([3, 9]), Flow(policy=init_policy(jax.random.key(1), width=8)))
    assert decode_batch._cache_size() == before + 4


def _keys(n):
    return jax.random.split(jax.random.key(0), n)


def test_depth_costs_no_compile_time():
    """By the length of the program, which is the same on every machine."""

    def lengths(layers):
        model = build(dataclasses.replace(TOY, n_layers=layers))
        config = DecodeConfig(gen_length=8, block_length=8, steps=4)
        inputs = jax.eval_shape(
            lambda: (jnp.zeros((2, 16), int), jnp.zeros((2, 16), bool), _keys(2))
        )
        made = decode_batch.lower(model, abstract_params(model), Flow(), config, *inputs)
        return [text.count("\n") for text in (made.as_text(), made.compile().as_text())]

    for few, many in zip(lengths(4), lengths(32), strict=True):
        assert abs(many / few - 1) < 0.01


# --- early exit and the end of a sequence


@pytest.mark.parametrize(
    "rule", [MaskPrediction(), MaskPrediction(threshold=0.6), Threshold(0.4)], ids=repr
)
def test_early_exit_changes_no_token(rule):
    lm, prompts = stub(), random_prompts([6, 3, 9], top=8)
    run = functools.partial(
        generate, lm, prompts, rule, gen_length=8, steps=16, block_length=4, trace=True
    )
    on, off = run(early_exit=True), run(early_exit=False)
    np.testing.assert_array_equal(on.tokens, off.tokens)
    np.testing.assert_array_equal(on.progress, off.progress)
    np.testing.assert_array_equal(off.forward_passes, 16)
    # A sequence takes part in a step if its block has a mask before the step.
    before = np.concatenate([np.zeros_like(off.trace.progress[:1]), off.trace.progress[:-1]])
    block = np.arange(8)[None, None, :] // 4 == np.arange(16)[:, None, None] // 8
    np.testing.assert_array_equal(on.forward_passes, ((before < 1) & block).any(-1).sum(0))
    assert on.forward_passes.max() < 16


def test_early_exit_of_the_flow_stops_at_settled():
    lm, prompts, rule = (
        stub(sharpness=4.0),
        random_prompts([6, 3, 9], top=8),
        Flow(power=1.0, reedit_margin=None),
    )
    on, off = (generate(lm, prompts, rule, 8, 24, early_exit=e, trace=True) for e in (True, False))
    np.testing.assert_array_equal(off.forward_passes, 24)
    assert on.forward_passes.max() < 24
    for row, passes in enumerate(on.forward_passes):
        np.testing.assert_allclose(
            on.trace.progress[:passes, row], off.trace.progress[:passes, row], atol=1e-5
        )
        assert (on.trace.progress[passes - 1, row] >= 0.99).all()
        assert passes == 1 or (on.trace.progress[passes - 2, row] < 0.99).any()
        assert (on.trace.progress[passes:, row] == on.trace.progress[passes - 1, row]).all()
    assert (
        not Flow().early_exit
        and Threshold().early_exit
        and MaskPrediction(threshold=0.5).early_exit
    )
    assert not MaskPrediction().early_exit


def test_skipped_steps_cost_nothing():
    """The forward pass is inside a condition, and nothing of its size is outside."""
    lm = stub()
    config = DecodeConfig(gen_length=8, block_length=8, steps=4, early_exit=True)
    jaxpr = jax.make_jaxpr(lambda *a: decode(lm.model, lm.params, Threshold(), config, *a))(
        *prompt_arrays(lm, [4])
    )
    for _ in range(2):  # the scan over blocks, and in it the scan over steps
        (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        jaxpr = scan.params["jaxpr"]
    names = [eqn.primitive.name for eqn in scan.params["jaxpr"].eqns]
    assert "cond" in names and not {"dot_general", "scan", "exp", "while"} & set(names)


@pytest.mark.parametrize(
    "rule",
    [
        MaskPrediction(),
        MaskPrediction(order="random"),
        Threshold(0.7),
        Flow(reedit_margin=0.5),
    ],
    ids=repr,
)
def test_eos_early_stop(rule):
    lm, n = stub(eos=3.0), 12
    prompts = random_prompts([6, 3, 9, 5, 4, 8, 7, 5], seed=3, top=8)
    straight = generate(lm, prompts, rule, n, 12, trace=True)
    stopped = generate(lm, prompts, rule, n, 12, eos_early_stop=True, trace=True)
    eos, early, waits = lm.config.eos_id, 0, 0
    for row in range(len(prompts)):
        settled = straight.trace.progress[:, row] >= 0.99
        # By definition the end is the first step after which all positions up to the first
        # settled EOS are settled.
        passes = int(straight.forward_passes[row])
        for step in range(passes):
            current = read_tokens(straight.trace, row, step, lm.config.mask_id)
            ends = np.flatnonzero(settled[step] & (current == eos))
            if ends.size and settled[step][: ends[0]].all():
                early += step + 1 < passes
                passes = step + 1
                wanted = np.where(np.arange(n) > ends[0], eos, current)
                np.testing.assert_array_equal(stopped.tokens[row], wanted)
                break
            waits += ends.size > 0
        else:
            np.testing.assert_array_equal(stopped.tokens[row], straight.tokens[row])
        assert stopped.forward_passes[row] == passes
    assert early
    assert waits or rule != MaskPrediction(order="random")  # an EOS before an open position


def read_tokens(trace, row, step, mask_id):
    """Returns the tokens after `step`: each position's last prediction while it was open."""
    tokens, before = np.full(trace.tokens.shape[-1], mask_id), np.zeros(trace.tokens.shape[-1])
    for s in range(step + 1):
        free = (before < 1) | trace.reedited[s, row]
        tokens, before = np.where(free, trace.tokens[s, row], tokens), trace.progress[s, row]
    return tokens


@pytest.mark.slow
def test_guidance_near_0_equals_none():
    """The guided u + (w + 1)(c - u) is c at w = 0. The program for w > 0 is another one."""
    lm, prompts = stub(), random_prompts([6, 4], top=8)
    none, little = (
        generate(lm, prompts, MaskPrediction(cfg_scale=w), 6, 6, trace=True) for w in (0.0, 1e-6)
    )
    np.testing.assert_array_equal(none.tokens, little.tokens)
    np.testing.assert_allclose(none.trace.confidence, little.trace.confidence, atol=1e-4)


# --- properties


PROPERTY_CASES = [
    (Flow(power=1.0), DecodeConfig(6, 6, 4, trace=True)),
    (
        Flow(power=8.0, revise_committed=False, commit=False),
        DecodeConfig(6, 2, 3, trace=True, early_exit=True),
    ),
    (Flow(power=0.0, reedit_margin=0.0), DecodeConfig(4, 2, 5, trace=True)),
    (MaskPrediction(order="random"), DecodeConfig(9, 3, 2, trace=True)),
    (
        MaskPrediction(order="margin", temperature=1.0),
        DecodeConfig(4, 4, 7, trace=True, early_exit=True),
    ),
    (Threshold(0.6), DecodeConfig(6, 3, 2, trace=True, eos_early_stop=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize("rule, config", PROPERTY_CASES)
def test_properties_of_every_state(rule, config):
    """In random models t is in [0, 1], nothing is NaN, and blocks come in order.

    Progress falls only where a position is re-edited.
    """
    n, size, steps, blocks = (
        config.gen_length,
        config.block_length,
        config.steps,
        config.blocks,
    )
    for seed, sharpness in enumerate((0.0, 0.3, 1.0, 3.0, 10.0, 100.0)):
        lm = stub(seed, sharpness)
        state, trace = _jit_decode(
            lm.model, lm.params, rule, config, *prompt_arrays(lm, [4, 1, 7], seed)
        )
        trace = jax.device_get(trace)
        chex.assert_tree_all_finite(jax.tree.leaves((state, trace)))
        progress = trace.progress
        assert progress.min() >= 0 and progress.max() <= 1
        assert trace.confidence.min() >= 0 and trace.confidence.max() <= 1 + 1e-6
        before = np.concatenate([np.zeros_like(progress[:1]), progress[:-1]])
        assert (progress >= before - 1e-6)[~trace.reedited].all()
        # Later blocks have not begun, and earlier ones are committed.
        block, now = np.arange(n)[None, :] // size, np.repeat(np.arange(blocks), steps)[:, None]
        assert not progress[np.broadcast_to((block > now)[:, None], progress.shape)].any()
        assert (progress[np.broadcast_to((block < now)[:, None], progress.shape)] == 1).all()
        if not isinstance(rule, Flow):
            assert set(np.unique(progress)) <= {0.0, 1.0} and not trace.reedited.any()
        done = state.t == 1
        x = lm.params["wte"]["embedding"][state.tokens[done]]
        np.testing.assert_allclose(state.x[done], x, atol=1e-3)
        assert (state.forward_passes <= steps * blocks).all()


@pytest.mark.slow
def test_a_model_with_a_tied_head_decodes():
    """The first prediction is the argmax of the model's own logits."""
    lm, prompt = toy(weight_tying=True), random_prompts([5])[0]
    assert "ff_out" not in lm.params
    out = generate(lm, [prompt], MaskPrediction(), 4, 4, trace=True)
    logits = lm.logits([prompt + [lm.config.mask_id] * 4])[0, -4:]
    np.testing.assert_array_equal(out.trace.tokens[0, 0], jnp.argmax(logits, -1))
    np.testing.assert_allclose(
        out.trace.confidence[0, 0], jax.nn.softmax(logits).max(-1), atol=1e-5
    )
