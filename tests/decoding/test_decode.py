"""The decoder against the original decoders' trajectories, against plain loops, and its own promises."""

from __future__ import annotations

import dataclasses
import functools
import json
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.helpers import (
    GOLDENS,
    STUB,
    TOY,
    Stub,
    decode_golden,
    llada_tiny,
    random_prompts,
    stub,
    stub_hidden,
    stub_params,
    toy,
)
from xflow_jax.decoding.blocks import make_schedule
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.generate import decode_batch, generate
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.policy_io import load_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.state import DecodeConfig, read_out
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.tokenizer import pad_left

OFFICIAL = {c["name"]: c for c in decode_golden()["llada_official_generate"]}
FAST_DLLM = {
    c["name"]: c for c in decode_golden()["fast_dllm_generate"] if "cache" not in c["function"]
}
FLOW = json.loads((GOLDENS / "flow" / "flow_golden.json").read_text())["cases"]


def unpadded(case):
    mask = np.asarray(case.get("attention_mask") or np.ones_like(case["prompt"]), bool)
    return [row[real].tolist() for row, real in zip(np.asarray(case["prompt"]), mask, strict=True)]


def check_golden(lm, case, rule):
    """Tokens exact; per step, what was written, where, and with what confidence."""
    args, rows = case["args"], unpadded(case)
    out = generate(
        lm,
        rows,
        rule,
        args["gen_length"],
        args["steps"],
        block_length=args["block_length"],
        trace=True,
    )
    wanted = np.asarray(case["output"])[:, -args["gen_length"] :]
    np.testing.assert_array_equal(out.tokens, wanted)
    if "trajectory" not in case:
        return out
    prompt = len(case["prompt"][0])
    done = np.zeros(wanted.shape, bool)
    ran = np.flatnonzero(
        out.trace.confidence.any((1, 2))
    )  # Fast-dLLM lists the forward passes, not the steps
    for number, step in enumerate(case["trajectory"]):
        at = step.get("step", ran[number])
        if "positions_in_window" in step:
            step = {"positions": [step["positions_in_window"]]} | {
                k: [step[k]] for k in ("tokens", "confidence")
            }
        for row, places in enumerate(step["positions"]):
            places = np.asarray(places, int) - prompt
            written = (out.trace.progress[at][row] == 1) & ~done[row]
            assert sorted(places) == np.flatnonzero(written).tolist()
            np.testing.assert_array_equal(out.trace.tokens[at][row, places], step["tokens"][row])
            np.testing.assert_allclose(
                out.trace.confidence[at][row, places], step["confidence"][row], atol=1e-3
            )
            done[row] |= written
    assert done.all()
    return out


@pytest.mark.parametrize("name", [n for n in OFFICIAL if not n.startswith("quirk_")])
def test_mask_prediction_is_the_official_decoder(name):
    case = OFFICIAL[name]
    switches = {
        k: case["args"][k] for k in ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
    }
    out = check_golden(llada_tiny(), case, MaskPrediction(**switches))
    np.testing.assert_array_equal(out.forward_passes, case["n_forward"])


@pytest.mark.parametrize("name", list(FAST_DLLM))
def test_threshold_is_fast_dllm_without_a_cache(name):
    case = FAST_DLLM[name]
    tau = case["args"].get("threshold")
    out = check_golden(llada_tiny(), case, MaskPrediction() if tau is None else Threshold(tau))
    np.testing.assert_array_equal(out.forward_passes, case["nfe"])


def test_masks_in_the_prompt_are_context():
    """The official loop lets them compete with the answer's masks and writes over them; a prompt is never changed here,
    and the whole schedule is the answer's."""
    case = OFFICIAL["quirk_mask_token_inside_prompt"]
    args = case["args"]
    assert args["mask_id"] in case["prompt"][0]
    assert args["mask_id"] in case["output"][0][-args["gen_length"] :]
    out = generate(
        llada_tiny(), case["prompt"], MaskPrediction(), args["gen_length"], args["steps"], block_length=6
    )
    assert args["mask_id"] not in out.tokens
    assert (out.progress == 1).all()


def test_a_predicted_mask_token_is_read_out_as_the_last_prediction():
    """The official loop leaves such masks in its answer and, in later blocks, lets them compete again; here a block's
    end hardens what was last predicted, as for every other rule."""
    case = OFFICIAL["quirk_model_predicts_the_mask_token"]
    args, lm = case["args"], llada_tiny()
    config = dataclasses.replace(lm.config, mask_token_id=args["mask_id"])
    lm = dataclasses.replace(lm, config=config, model=build(config))
    out = generate(lm, case["prompt"], MaskPrediction(), 12, 6, block_length=6, trace=True)
    assert (out.trace.tokens == args["mask_id"]).any()
    first, last = out.tokens[0, :6], out.tokens[0, 6:]
    settled = out.trace.progress[2][0, :6] == 1
    np.testing.assert_array_equal(first[~settled], out.trace.tokens[2][0, :6][~settled])
    np.testing.assert_array_equal(
        last[out.progress[0, 6:] < 1], out.trace.tokens[5][0, 6:][out.progress[0, 6:] < 1]
    )
    # The official answer up to the first step in which a mask token is predicted.
    np.testing.assert_array_equal(
        generate(lm, case["prompt"], MaskPrediction(suppress_mask=True), 12, 6).progress, 1
    )


@pytest.mark.parametrize("number", range(len(FLOW)))
def test_flow_is_the_reference(number):
    case, golden = FLOW[number], np.load(GOLDENS / "flow" / "flow_golden.npz")
    assert case["case"] == number
    policy = (
        load_policy(GOLDENS / "flow" / "policy.safetensors")
        if "policy" in case["step_rule"]
        else None
    )
    rule = Flow(
        policy=policy,
        power=2.0,
        revise_committed=case["revise_committed"],
        reedit_margin=0.1 if case.get("reedit", True) else None,
        commit=case.get("commit", True),
    )
    g = {
        key: golden[f"case{number}_{key}"]
        for key in ("prompt", "tokens", "t", "c", "a", "predicted", "reedited")
    }
    out = generate(llada_tiny(), g["prompt"], rule, case["gen_length"], case["steps"], trace=True)
    np.testing.assert_array_equal(out.tokens, g["tokens"])
    np.testing.assert_array_equal(out.trace.tokens, g["predicted"])
    np.testing.assert_array_equal(out.trace.reedited, g["reedited"])
    for ours, name in (
        (out.trace.progress, "t"),
        (out.trace.confidence, "c"),
        (out.trace.step_fraction, "a"),
    ):
        np.testing.assert_allclose(ours, g[name], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(out.progress, out.trace.progress[-1])
    np.testing.assert_array_equal(out.forward_passes, case["steps"])


# --- the scan and plain loops


def python_scan(f, init, xs):
    """jax.lax.scan as the loop that it stands for."""
    ys = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        init, y = f(init, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return init, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def arrays(lm, lengths, seed=0):
    ids, mask = pad_left(random_prompts(lengths, seed, 8), lm.config.pad_id)
    return jnp.asarray(ids), jnp.asarray(mask), jax.random.split(jax.random.key(seed), len(lengths))


@pytest.mark.parametrize(
    "rule, more",
    [
        (Flow(policy=init_policy(jax.random.key(0), width=8)), {}),
        (MaskPrediction(order="random", cfg_scale=0.5), {"eos_early_stop": True}),
        (Threshold(0.5), {"early_exit": True}),
    ],
    ids=["flow", "mask", "threshold"],
)
def test_the_scan_is_a_plain_loop(rule, more):
    lm = stub()
    settings = DecodeConfig(gen_length=6, block_length=3, steps=2, trace=True, **more)
    inputs = arrays(lm, [5, 3])
    scanned = jax.jit(lambda *a: decode(lm.model, lm.params, rule, settings, *a))(*inputs)
    with jax.disable_jit():  # which makes Python of conditions, too
        plain = decode(lm.model, lm.params, rule, settings, *inputs, scan=python_scan)
    chex.assert_trees_all_close(scanned, plain, atol=2e-5)
    chex.assert_trees_all_equal(scanned[1].tokens, plain[1].tokens)
    chex.assert_trees_all_equal(scanned[0].forward_passes, plain[0].forward_passes)


def numpy_flow(
    p, config, prompt, gen_length, block_length, steps, power, margin, revise, commit, synchronous
):
    """The flow in float64 NumPy, one sequence and one position at a time, from the equations alone."""
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
def test_flow_is_the_equations(gen_length, block_length, steps, switches, seed):
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
    settings = DecodeConfig(gen_length, block_length, steps, trace=True)
    inputs = (jnp.asarray([prompt]), jnp.ones((1, 5), bool), jax.random.split(jax.random.key(0), 1))
    state, trace = _jit_decode(Stub(STUB), params, rule, settings, *inputs)
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
def _jit_decode(model, params, rule, settings, *inputs):
    return decode(model, params, rule, settings, *inputs)


# --- compilations


def test_one_compilation_per_shape_and_rule():
    prompts = functools.partial(random_prompts, top=8)
    run = functools.partial(generate, stub(), gen_length=5, steps=5)
    run(prompts([3, 9]), Threshold(0.31))
    before = decode_batch._cache_size()
    for seed in range(3):  # other prompts, other lengths under the same padding, another seed
        run(prompts([4 + seed, 16], seed), Threshold(0.31), seed=seed)
    assert decode_batch._cache_size() == before
    run(prompts([3, 9]), Threshold(0.32))
    run(prompts([3, 17]), Threshold(0.31))
    run(prompts([3, 9, 9]), Threshold(0.31))
    assert decode_batch._cache_size() == before + 3
    run(prompts([3, 9]), Flow(policy=init_policy(jax.random.key(0), width=8)))
    run(
        prompts([3, 9]), Flow(policy=init_policy(jax.random.key(1), width=8))
    )  # another policy, same program
    assert decode_batch._cache_size() == before + 4


def _keys(n):
    return jax.random.split(jax.random.key(0), n)


@pytest.fixture
def no_compilation_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def test_depth_costs_no_compile_time(no_compilation_cache):
    def lowered(layers):
        model = build(dataclasses.replace(TOY, n_layers=layers))
        settings = DecodeConfig(gen_length=8, block_length=8, steps=4)
        inputs = jax.eval_shape(
            lambda: (jnp.zeros((2, 16), int), jnp.zeros((2, 16), bool), _keys(2))
        )
        return decode_batch.lower(model, abstract_params(model), Flow(), settings, *inputs)

    def seconds(layers):
        began = time.process_time()  # of this process alone, since others may share the machine
        compiled = lowered(layers).compile()
        return time.process_time() - began, compiled.as_text().count("\n")

    seconds(4)
    pairs = []
    for _ in range(
        4
    ):  # the smallest of many times comes down to the true one, and sooner on a quiet machine
        pairs += [(seconds(4), seconds(32)) for _ in range(15)]
        few, many = zip(*pairs, strict=True)
        if abs(min(many)[0] / min(few)[0] - 1) < 0.2:
            break
    assert abs(many[0][1] / few[0][1] - 1) < 0.01  # lines of the compiled program
    assert abs(min(many)[0] / min(few)[0] - 1) < 0.2


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
    # A sequence takes part in a step as long as its block holds a mask before it.
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
    """The forward pass stands inside a condition, and nothing of its size outside."""
    lm = stub()
    settings = DecodeConfig(gen_length=8, block_length=8, steps=4, early_exit=True)
    jaxpr = jax.make_jaxpr(lambda *a: decode(lm.model, lm.params, Threshold(), settings, *a))(
        *arrays(lm, [4])
    )
    for _ in range(2):  # of blocks, and in it of steps
        (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        jaxpr = scan.params["jaxpr"]
    names = [eqn.primitive.name for eqn in scan.params["jaxpr"].eqns]
    assert "cond" in names and not {"dot_general", "scan", "exp", "while"} & set(names)


@pytest.mark.parametrize(
    "rule", [MaskPrediction(), Threshold(0.7), Flow(reedit_margin=0.5)], ids=repr
)
def test_eos_early_stop(rule):
    lm, n = stub(eos=3.0), 12
    prompts = random_prompts([6, 3, 9, 5, 4, 8, 7, 5], seed=3, top=8)
    straight = generate(lm, prompts, rule, n, 12, trace=True)
    stopped = generate(lm, prompts, rule, n, 12, eos_early_stop=True, trace=True)
    eos, early = lm.config.eos_id, 0
    for row in range(len(prompts)):
        settled = straight.trace.progress[:, row] >= 0.99
        # The first step after which all positions up to the first settled EOS are settled, from the definition.
        passes = int(straight.forward_passes[row])
        for step in range(passes):
            standing = read_tokens(straight.trace, row, step, lm.config.mask_id)
            ends = np.flatnonzero(settled[step] & (standing == eos))
            if ends.size and settled[step][: ends[0]].all():
                early += step + 1 < passes
                passes = step + 1
                wanted = np.where(np.arange(n) > ends[0], eos, standing)
                np.testing.assert_array_equal(stopped.tokens[row], wanted)
                break
        else:
            np.testing.assert_array_equal(stopped.tokens[row], straight.tokens[row])
        assert stopped.forward_passes[row] == passes
    assert early


def read_tokens(trace, row, step, mask_id):
    """The state's tokens after `step`: of each position the last prediction made while it was open."""
    tokens, before = np.full(trace.tokens.shape[-1], mask_id), np.zeros(trace.tokens.shape[-1])
    for s in range(step + 1):
        free = (before < 1) | trace.reedited[s, row]
        tokens, before = np.where(free, trace.tokens[s, row], tokens), trace.progress[s, row]
    return tokens


# --- the schedule and the parts


@pytest.mark.parametrize(
    "size, steps, quotas", [(17, 5, [4, 4, 3, 3, 3]), (4, 6, [1, 1, 1, 1, 0, 0]), (8, 1, [8])]
)
def test_schedule(size, steps, quotas):
    plan = make_schedule(DecodeConfig(gen_length=2 * size, block_length=size, steps=steps))
    np.testing.assert_array_equal(plan.quota, quotas * 2)
    np.testing.assert_array_equal(plan.block, [0] * steps + [1] * steps)
    np.testing.assert_array_equal(plan.index, np.arange(2 * steps))
    np.testing.assert_array_equal(plan.steps_left, list(range(steps, 0, -1)) * 2)
    rho = [0.0] if steps == 1 else [i / (steps - 1) for i in range(steps)]
    np.testing.assert_allclose(plan.rho, rho * 2, rtol=1e-6)


def test_guidance_of_nothing_is_no_guidance_and_weighs_linearly():
    """u + (w + 1)(c - u) at w = 0 is c; the program for w > 0 is another, so compare them near 0."""
    lm, prompts = stub(), random_prompts([6, 4], top=8)
    none, little = (
        generate(lm, prompts, MaskPrediction(cfg_scale=w), 6, 6, trace=True) for w in (0.0, 1e-6)
    )
    np.testing.assert_array_equal(none.tokens, little.tokens)
    np.testing.assert_allclose(none.trace.confidence, little.trace.confidence, atol=1e-4)


def test_read_out_behind_the_end():
    state, _ = _jit_decode(*_small(Flow(), DecodeConfig(6, 6, 2)))
    state = state.replace(tokens=jnp.array([[3, 9, 4, 9, 5, 6]]), finished=jnp.array([False]))
    for more, finished, wanted in [
        ({}, False, [3, 9, 4, 9, 5, 6]),
        ({"eos_early_stop": True}, False, [3, 9, 4, 9, 5, 6]),
        ({"eos_early_stop": True}, True, [3, 9, 9, 9, 9, 9]),
        ({"stop_at_eos": True}, False, [3, 9, 9, 9, 9, 9]),
    ]:
        tokens, _ = read_out(
            DecodeConfig(6, 6, 2, **more), state.replace(finished=jnp.array([finished])), eos_id=9
        )
        np.testing.assert_array_equal(tokens, [wanted])


def _small(rule, settings):
    inputs = (jnp.asarray([[1, 2]]), jnp.ones((1, 2), bool), jax.random.split(jax.random.key(0), 1))
    return Stub(STUB), stub().params, rule, settings, *inputs


# --- properties


PROMISES = [
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
@pytest.mark.parametrize("rule, settings", PROMISES)
def test_promises_of_every_state(rule, settings):
    """On random models: t in [0, 1], nothing is NaN, what is committed stays unless re-edited, blocks come in order."""
    n, size, steps, blocks = (
        settings.gen_length,
        settings.block_length,
        settings.steps,
        settings.blocks,
    )
    for seed, sharpness in enumerate((0.0, 0.3, 1.0, 3.0, 10.0, 100.0)):
        lm = stub(seed, sharpness)
        state, trace = _jit_decode(
            lm.model, lm.params, rule, settings, *arrays(lm, [4, 1, 7], seed)
        )
        state, trace = jax.device_get((state, trace))
        chex.assert_tree_all_finite((state, trace))
        progress = trace.progress
        assert progress.min() >= 0 and progress.max() <= 1
        assert trace.confidence.min() >= 0 and trace.confidence.max() <= 1 + 1e-6
        before = np.concatenate([np.zeros_like(progress[:1]), progress[:-1]])
        assert (progress >= before - 1e-6)[~trace.reedited].all()
        # Later blocks wait, earlier ones are hard.
        block, now = np.arange(n)[None, :] // size, np.repeat(np.arange(blocks), steps)[:, None]
        assert not progress[np.broadcast_to((block > now)[:, None], progress.shape)].any()
        assert (progress[np.broadcast_to((block < now)[:, None], progress.shape)] == 1).all()
        if not isinstance(rule, Flow):
            assert set(np.unique(progress)) <= {0.0, 1.0} and not trace.reedited.any()
        hard = state.t == 1  # to float32's last bits
        np.testing.assert_allclose(
            state.x[hard], lm.params["wte"]["embedding"][state.tokens[hard]], atol=1e-3
        )
        assert (state.forward_passes <= steps * blocks).all()


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
