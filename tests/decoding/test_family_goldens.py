"""The decoders of the families' authors, and the flow around each model, against their goldens."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tests.decoding.helpers import belief_of, state_of, step_of
from tests.family_helpers import decode_cases, directory, golden_lm, unpadded
from tests.helpers import read_arrays
from xflow_jax.decoding.blocks import make_schedule
from xflow_jax.decoding.cached_forward import make_forward
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.baselines import Editing
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError
from xflow_jax.models import build, shift_rows
from xflow_jax.tokenizer import pad_left

OFFICIAL = ["illada_tiny", "lladamoe_tiny"]  # decoded by LLaDA's own loop


def first_quick(kind, checkpoints, left_out=(), quick=()):
    """Lists (checkpoint, case). Those of `quick` are quick, else the first of each checkpoint."""
    found = []
    for checkpoint in checkpoints:
        names = [name for name in decode_cases(kind, checkpoint) if name not in left_out]
        slow = [name for name in names if name not in (quick or names[:1])]
        found += [
            pytest.param(checkpoint, name, marks=[pytest.mark.slow] if name in slow else [])
            for name in names
        ]
    return found


def check_whole_rows(out, case):
    """Compares prompts and responses with rows of an original that fills both.

    A mask that no step wrote has the last prediction here, and stays a mask in the original.
    """
    mask, n = case["args"]["mask_id"], case["args"]["gen_length"]
    wanted, prompts = np.asarray(case["output"]), unpadded(case)
    tokens = np.where(out.progress < 1, mask, out.tokens)
    np.testing.assert_array_equal(tokens, wanted[:, -n:])
    if any(mask in prompt for prompt in prompts):
        assert out.prompts == [
            row[-n - len(prompt) : -n].tolist() for row, prompt in zip(wanted, prompts, strict=True)
        ]
    np.testing.assert_array_equal(out.forward_passes, case["n_forward"])


def infill_of(case):
    """Returns True if a prompt holds masks."""
    return any(case["args"]["mask_id"] in row for row in case["prompt"])


@pytest.mark.parametrize("checkpoint, name", first_quick("llada_official_generate", OFFICIAL))
def test_mask_prediction_equals_the_official_decoder(checkpoint, name):
    case = decode_cases("llada_official_generate", checkpoint)[name]
    args = case["args"]
    switches = ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
    out = generate(
        golden_lm(checkpoint),
        unpadded(case),
        MaskPrediction(**{key: args[key] for key in switches}),
        args["gen_length"],
        args["steps"],
        block_length=args["block_length"],
        infill=infill_of(case),
    )
    check_whole_rows(out, case)


# --- LLaDA2.1


@pytest.mark.parametrize("checkpoint, name", first_quick("llada21_generate", ["llada21_tiny"]))
def test_editing_equals_the_original_decoder(checkpoint, name):
    case = decode_cases("llada21_generate", checkpoint)[name]
    a, prompt = case["args"], len(case["prompt"][0])
    rule = Editing(
        tau=a["threshold"],
        tau_edit=a["editing_threshold"],
        max_post_steps=a["max_post_steps"],
        num_to_transfer=a["num_to_transfer"],
    )
    out = generate(
        golden_lm(checkpoint),
        case["prompt"],
        rule,
        a["gen_length"],
        steps_per_block=a["steps"],
        block_length=a["block_length"],
        eos_early_stop=a["eos_early_stop"],
        trace=True,
    )
    wanted = np.ravel(case["output"])
    np.testing.assert_array_equal(out.tokens[0, : len(wanted)], wanted)
    np.testing.assert_array_equal(out.tokens[0, len(wanted) :], a["eos_id"])
    assert out.forward_passes[0] == case["n_forward"]
    steps = a["steps"] + a["max_post_steps"]
    for step in case["trajectory"]:
        at = (step["block"] - prompt // a["block_length"]) * steps + step["step_in_block"]
        progress = out.trace.progress
        before = progress[at - 1, 0] if at else np.zeros_like(progress[0, 0])
        filled = np.flatnonzero((progress[at, 0] == 1) & (before < 1))
        edited = np.flatnonzero(out.trace.reedited[at, 0])
        for ours, theirs in ((filled, step["filled"]), (edited, step["edited"])):
            # Positions after the response are left out.
            kept = [i for i, p in enumerate(theirs["positions"]) if p < prompt + a["gen_length"]]
            places = np.asarray(theirs["positions"], int)[kept] - prompt
            assert sorted(places) == ours.tolist()
            for part, name in ((out.trace.tokens, "tokens"), (out.trace.confidence, "confidence")):
                np.testing.assert_allclose(
                    part[at, 0, places], np.asarray(theirs[name])[kept], rtol=0, atol=1e-3
                )


@pytest.mark.slow
def test_the_steps_of_the_budget_fill_the_block():
    """With fewer steps than masks the schedule writes more of them, and editing follows."""
    case = decode_cases("llada21_generate", "llada21_tiny")["quality_mode"]
    lm, prompt = golden_lm("llada21_tiny"), case["prompt"]
    out = generate(lm, prompt, Editing(tau=1.0), 16, steps_per_block=2, block_length=8, trace=True)
    size = 2 + 16
    progress = out.trace.progress.reshape(-1, size, 16)
    for block, start in ((0, 0), (1, 5)):  # the prompt of 11 has three tokens of the first block
        assert (progress[block, 1, start : start + 5] == 1).all()


# --- Dream

DREAM_ORDERS = {
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
    "origin": "origin",
}


@struct.dataclass
class RecordedDraws(MaskPrediction):
    """Takes the numbers of the order "origin" from a table [steps, B, N]."""

    table: jax.Array | None = None

    def draw_scores(self, masked, step):
        return self.table[step.index]


def dream_rule(case):
    args = case["args"]
    options = {
        "order": DREAM_ORDERS[args["alg"]],
        "schedule": "eps",
        "eps": args["eps"],
        "temperature": args["temperature"],
        "top_k": args["top_k"] or 0,
        "top_p": args["top_p"] or 1.0,
    }
    if "uniforms" not in case:
        return MaskPrediction(**options)
    masked = np.ones((len(case["prompt"]), args["gen_length"]), bool)
    tables = []
    for drawn, step in zip(case["uniforms"], case["trajectory"], strict=True):
        tables.append(np.ones(masked.shape, np.float32))
        tables[-1][masked] = np.ravel(drawn)  # of the masks, row by row
        for row, places in enumerate(step["positions"]):
            masked[row, np.asarray(places, int) - len(case["prompt"][0])] = False
    return RecordedDraws(**options, table=jnp.asarray(np.stack(tables)))


@pytest.mark.parametrize(
    "checkpoint, name",
    first_quick("dream_generate", ["dream_tiny"], quick=("mask_in_prompt", "origin_batch_ragged")),
)
def test_the_schedule_of_dream_equals_the_original_decoder(checkpoint, name):
    case = decode_cases("dream_generate", checkpoint)[name]
    n, steps, infill = case["args"]["gen_length"], case["args"]["steps"], infill_of(case)
    lm, prompts = golden_lm(checkpoint), unpadded(case)
    check_whole_rows(generate(lm, prompts, dream_rule(case), n, steps, infill=infill), case)


@pytest.mark.parametrize("name", decode_cases("dream_schedule", None))
def test_the_times_of_dream(name):
    case = decode_cases("dream_schedule", None)[name]
    config = DecodeConfig(case["masks"], case["masks"], case["steps"], eps=case["eps"])
    left, written = np.float32(case["masks"]), []
    for share in np.asarray(make_schedule(config).share):
        written.append(int(np.floor(left * share)))
        left -= np.float32(written[-1])
    assert written == case["transferred"] and left == 0


def test_the_order_origin_writes_each_mask_by_chance():
    rule = MaskPrediction(order="origin", schedule="eps")
    belief, state = belief_of(np.full(4000, 0.5)), state_of(np.zeros(4000))
    for share in (0.0, 0.25, 1.0):
        action = rule(belief, state, step_of(4000).replace(share=jnp.float32(share)))
        assert abs(float(action.a.mean()) - share) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoint, rule",
    [
        ("dream_tiny", Flow()),
        ("illada_tiny", MaskPrediction(cfg_scale=0.5)),
        ("lladamoe_tiny", Flow()),
    ],
)
def test_masks_of_a_prompt_change_no_other_row(checkpoint, rule):
    """A prompt without masks decodes as ever, and one with masks as alone."""
    lm = golden_lm(checkpoint)
    mask = lm.config.mask_id
    prompts = [[20, 21, 22, 23, 24], [mask, 31, mask], [40, mask, 42, 43]]

    def run(prompts, infill=True):
        options = {"block_length": 4, "infill": infill, "eos_early_stop": True}
        return generate(lm, prompts, rule, 8, 4, **options)

    together, alone = run(prompts), run(prompts[1:2])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    assert together.prompts[1] == alone.prompts[0]
    plain = run(prompts[:1], infill=False)
    np.testing.assert_array_equal(together.tokens[0], plain.tokens[0])
    assert together.forward_passes[0] == plain.forward_passes[0]
    np.testing.assert_allclose(together.progress[0], plain.progress[0], rtol=0, atol=2e-3)
    assert plain.prompts is None
    for before, after in zip(prompts, together.prompts, strict=True):
        assert len(before) == len(after)
        assert all(x == y for x, y in zip(before, after, strict=True) if x != mask)
        assert mask not in after


def test_infill_needs_attention_both_ways_and_no_cache():
    with pytest.raises(UserError, match="^sdar attends to earlier blocks only, so masks in a pro"):
        generate(golden_lm("sdar_tiny"), [[310]], Flow(), 8, 4, infill=True)
    with pytest.raises(UserError, match="^infill works with cache none, not with dual$"):
        generate(golden_lm("dream_tiny"), [[310]], Flow(), 8, 4, infill=True, cache="dual")


BOTH_WAYS = ("dream_tiny", "illada_tiny", "lladamoe_tiny")
QUICK = [("dream_tiny", "dual", 2), ("illada_tiny", "prefix", 2)]
CACHED_PASSES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in itertools.product(BOTH_WAYS, ("prompt", "prefix", "dual"), (1, 2))
]


@pytest.mark.parametrize("checkpoint, cache, prompt_every", CACHED_PASSES)
def test_cached_passes_equal_the_full_one(checkpoint, cache, prompt_every):
    """As long as nothing moves. In Dream the row before a block predicts its first position."""
    lm = golden_lm(checkpoint)
    ids, mask = pad_left([[20, 21, 22, 23, 24], [30, 31]], lm.config.pad_id)
    config = DecodeConfig(8, 4, 2, cache=cache, prompt_every=prompt_every)
    steps = make_schedule(config)
    x = jax.random.normal(jax.random.key(0), (2, 8, lm.config.hidden_size))
    arrays = (lm.embed(ids), jnp.asarray(mask), jnp.ones((2, 8), bool))
    plain = make_forward(lm.model, lm.params, dataclasses.replace(config, cache="none"), *arrays)
    forward = make_forward(lm.model, lm.params, config, *arrays)
    first = jax.tree.map(lambda part: part[0], steps)
    full, kept = plain.hidden(None, x, first)[0], forward.init_cache()
    one_pass = jax.jit(lambda kept, step: forward.hidden(kept, x, step))
    for number in range(4):
        step = jax.tree.map(lambda part, at=number: part[at], steps)
        step = dataclasses.replace(step, candidates=jnp.ones((2, 8), bool))
        wanted = full[:, number // 2 * 4 :][:, :4] if config.block_only else full
        ours, kept = one_pass(kept, step)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Flow(), MaskPrediction()], ids=["flow", "mask"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("checkpoint", BOTH_WAYS)
def test_a_cache_is_exact_with_one_layer_or_a_refresh_in_every_step(checkpoint, cache, rule):
    """Keys and values of the first layer come from the embeddings, which only a block changes."""
    lm = golden_lm(checkpoint)
    freq = {"moe_layer_freq": (1,)} if checkpoint == "lladamoe_tiny" else {}
    config = dataclasses.replace(lm.config, num_hidden_layers=1, **freq)
    layer = jax.tree.map(lambda x: x[:1], lm.params["blocks"])
    params = {**lm.params, "blocks": layer}
    one = dataclasses.replace(lm, model=build(config), config=config, params=params)
    prompts = [[20, 21, 22, 23, 24], [30, 31], [40, 41, 42]]
    for model, refresh in ((one, 0), (lm, 1)):
        ours, wanted = (
            generate(model, prompts, rule, 12, steps_per_block=4, block_length=4, **options)
            for options in ({"cache": cache, "refresh": refresh}, {"cache": "none"})
        )
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)
        np.testing.assert_allclose(ours.progress, wanted.progress, rtol=0, atol=2e-3)


def test_a_row_predicts_the_next_position():
    h = jnp.arange(8.0).reshape(2, 4, 1)
    real = jnp.array([[False, False, True, True], [True] * 4])
    assert shift_rows(h, real)[..., 0].tolist() == [[0, 1, 2, 2], [4, 4, 5, 6]]


@pytest.mark.slow
def test_draws_repeat_with_their_seed_and_one_token_is_no_draw():
    lm, prompts = golden_lm("dream_tiny"), [[20, 21, 22], [30, 31, 32, 33]]

    def run(seed=0, **options):
        rule = MaskPrediction(order="sequential", suppress_mask=True, **options)
        return generate(lm, prompts, rule, 8, 4, seed=seed).tokens

    np.testing.assert_array_equal(run(temperature=0.9, top_k=1), run())
    options = {"temperature": 1.5, "top_p": 0.9}
    first, same, other = (run(seed, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    # Draws of a row depend on its own prompt alone.
    rule = MaskPrediction(order="sequential", suppress_mask=True, **options)
    np.testing.assert_array_equal(generate(lm, prompts[1:], rule, 8, 4, seed=1).tokens[0], first[1])


# --- SDAR

QUIRK = "quirk_one_step_rewrites_prompt_tail"


@struct.dataclass
class WithoutDraws(MaskPrediction):
    """Takes the likeliest token of the sampler's distribution, as the goldens do."""

    def belief_options(self, config, eot_id):
        options = MaskPrediction.belief_options(self, config, eot_id)
        return dataclasses.replace(options, temperature=0.0)


def decode_as_sdar(case, prompt, gen_length):
    args = case["args"]
    strategy = args["remasking_strategy"]
    rule = WithoutDraws(
        temperature=args["temperature"],
        top_k=args["top_k"],
        top_p=args["top_p"],
        confidence_of="sampler",
        order="sequential" if strategy == "sequential" else "confidence",
        threshold=args["confidence_threshold"] if strategy.endswith("dynamic") else None,
    )
    return generate(
        golden_lm("sdar_tiny"),
        [prompt],
        rule,
        gen_length,
        steps_per_block=args["denoising_steps"],
        block_length=args["block_length"],
        early_exit=True,
        trace=True,
    )


@pytest.mark.parametrize("checkpoint, name", first_quick("sdar_generate", ["sdar_tiny"], (QUIRK,)))
def test_mask_prediction_equals_sdar(checkpoint, name):
    case = decode_cases("sdar_generate", checkpoint)[name]
    args, (prompt,) = case["args"], case["prompt"]
    first, n, size = len(prompt), args["gen_length"], args["block_length"]
    out = decode_as_sdar(case, prompt, n)
    wanted = np.ravel(case["output"])[first : first + n]
    ends = np.flatnonzero(np.isin(wanted, args["stopping_criteria_idx"] or [300]))
    kept = ends[0] + 1 if ends.size else len(wanted)
    np.testing.assert_array_equal(out.tokens[0, :kept], wanted[:kept])
    for step in case["trajectory"]:
        at = (step["block"] - first // size) * args["denoising_steps"] + step["step_in_block"]
        before = out.trace.progress[at - 1, 0] if at else np.zeros(n)
        ours = np.flatnonzero((out.trace.progress[at, 0] == 1) & (before < 1))
        inside = [i for i, place in enumerate(step["positions"]) if place < first + n]
        assert ours.tolist() == [step["positions"][i] - first for i in inside]
        for part, key in ((out.trace.tokens, "tokens"), (out.trace.confidence, "confidence")):
            wanted = np.asarray(step[key])[inside]
            np.testing.assert_allclose(part[at, 0, ours], wanted, rtol=0, atol=1e-3)
    # Theirs also counts a pass that stores each block, and the prompt's.
    stored = len({step["block"] for step in case["trajectory"]}) + (first >= size)
    assert out.forward_passes[0] + stored == case["n_forward"]


@pytest.mark.slow
def test_the_end_of_a_prompt_stays():
    """SDAR writes over it, if the schedule asks for more positions than there are masks."""
    case = decode_cases("sdar_generate", "sdar_tiny")[QUIRK]
    (prompt,), wanted = case["prompt"], np.ravel(case["output"])
    first, size = len(prompt), case["args"]["block_length"]
    whole, tail = first // size * size, first % size
    assert (wanted[whole:first] != prompt[whole:]).all()
    # The first block has the same tokens, since all are written in one pass.
    out = decode_as_sdar(case, prompt, case["args"]["gen_length"])
    np.testing.assert_array_equal(out.tokens[0, : size - tail], wanted[first : whole + size])
    logits = golden_lm("sdar_tiny").logits(
        [[*prompt, *[case["args"]["mask_id"]] * (size - tail)]], block_length=size
    )
    np.testing.assert_array_equal(
        np.argmax(logits[0, whole:first], -1), case["trajectory"][0]["tokens"][:tail]
    )
    # Later blocks have them too, behind the prompt as the original left it.
    rest = decode_as_sdar(case, wanted[: whole + size].tolist(), len(wanted) - whole - size)
    np.testing.assert_array_equal(rest.tokens[0], wanted[whole + size :])


# --- Fast-dLLM v2


@pytest.mark.parametrize(
    "checkpoint, name", first_quick("fast_dllm_v2_generate", ["fastdllm2_tiny"])
)
def test_parts_of_blocks_equal_fast_dllm_v2(checkpoint, name):
    case = decode_cases("fast_dllm_v2_generate", checkpoint)[name]
    a, length = case["args"], len(case["prompt"][0])
    size, n = a["block_size"], a["max_new_tokens"] - length % a["block_size"]
    # The original ends with the first token of the next block, if it does not stop.
    more = int(len(case["output"][0]) > length + n)
    out = generate(
        golden_lm(checkpoint),
        case["prompt"],
        MaskPrediction(threshold=a["threshold"], sub_block=a["small_block_size"]),
        n + more,
        steps_per_block=size,
        trace=True,
    )
    for row, wanted in enumerate(case["output"]):
        kept = wanted[length : length + n + more]
        kept = kept[: kept.index(a["stop_token"]) + 1] if a["stop_token"] in kept else kept
        np.testing.assert_array_equal(out.tokens[row, : len(kept)], kept)
    if not case.get("trajectory"):
        return
    for step, places in steps_of(case, out, 0):
        for part, key in ((out.trace.tokens, "tokens"), (out.trace.confidence, "confidence")):
            ours = part[step["at"], 0, places]
            np.testing.assert_allclose(ours, step[key], rtol=0, atol=1e-3)
    # Theirs also counts a pass that stores each block, but for one with the stop token, and the
    # prompt's.
    blocks = {step["block"] for step in case["trajectory"] if step["rule"] != "next_token"}
    stored = len(blocks) - (not more) + (length >= size)
    taken = (out.trace.confidence[: len(blocks) * size, 0] > 0).any(-1).sum()
    assert taken + stored == case["n_forward"]


def steps_of(case, out, row):
    """Pairs the steps of a trajectory with the positions that ours writes in them."""
    length, size = len(case["prompt"][0]), case["args"]["block_size"]
    written, last = [], {}
    for step in case["trajectory"]:
        if step.get("row", row) != row or step["rule"] == "next_token":
            continue
        block = step["block"] - length // size
        last[block] = last.get(block, -1) + 1
        at = block * size + last[block]
        before = out.trace.progress[at - 1, row] if at else np.zeros(out.progress.shape[1])
        places = np.asarray(step["positions"]) - length
        ours = np.flatnonzero((out.trace.progress[at, row] == 1) & (before < 1))
        # The first position of a block comes from the block before, so no step writes it.
        ours = [place for place in ours if (place + length) % size]
        if places.max() < out.tokens.shape[1]:
            assert ours == places.tolist()
            written.append((step | {"at": at}, places))
    assert written
    return written


@pytest.mark.slow
@pytest.mark.parametrize("rule", [MaskPrediction(cfg_scale=0.5), Flow(), Editing()])
def test_the_first_token_of_a_block_is_the_likeliest_after_the_block_before(rule):
    lm, size, prompts = golden_lm("fastdllm2_tiny"), 4, [[20, 21, 22, 23, 24], [30, 31]]
    out = generate(lm, prompts, rule, 11, steps_per_block=4, block_length=size, trace=True)
    plain = generate(lm, prompts, rule, 11, steps_per_block=4, block_length=size, cache=False)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    for row, prompt in enumerate(prompts):
        places = [i for i in range(11) if (i + len(prompt)) % size == 0]
        # EOS is repeated behind the end of a response.
        row_tokens = out.tokens[row].tolist()
        end = row_tokens.index(lm.config.eos_id) if lm.config.eos_id in row_tokens else 11
        places = [place for place in places if place <= end]
        assert places and (out.trace.progress[-1, row, places] == 1).all()
        if getattr(rule, "cfg_scale", 0):
            continue
        logits = lm.logits([[*prompt, *out.tokens[row]]], block_length=size)[0]
        wanted = np.asarray(logits).argmax(-1)[np.asarray(places) + len(prompt) - 1]
        np.testing.assert_array_equal(out.tokens[row, places], wanted)


# --- the flow


def flow_case(checkpoint, number):
    folder = directory(checkpoint).parent / f"flow_{checkpoint}"
    cases = json.loads((folder / "flow_golden.json").read_text())["cases"]
    return cases[number], read_arrays(folder / "flow_golden.npz")


FLOWS = [
    *(("llada21_tiny", number) for number in range(2)),
    *(("lladamoe_tiny", number) for number in range(3)),
    *(("dream_tiny", number) for number in range(4)),
    *(("sdar_tiny", number) for number in range(3)),
]


@pytest.mark.parametrize(
    "checkpoint, number",
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1] else []) for case in FLOWS],
)
def test_flow_equals_the_reference(checkpoint, number):
    case, golden = flow_case(checkpoint, number)
    g = {key.partition("_")[2]: golden[key] for key in golden if key.startswith(f"case{number}_")}
    rule = Flow(
        power=2.0, revise_committed=case["revise_committed"], commit=case.get("commit", True)
    )
    mask = g.get("prompt_mask", np.ones_like(g["prompt"])).astype(bool)
    rows = [row[real].tolist() for row, real in zip(g["prompt"], mask, strict=True)]
    block = case.get("block_length")
    lengths = {"steps": case["steps"]} if block is None else {"steps_per_block": case["steps"]}
    out = generate(
        golden_lm(checkpoint),
        rows,
        rule,
        case["gen_length"],
        block_length=block,
        trace=True,
        **lengths,
    )
    n, steps = case["gen_length"], len(g["t"])
    np.testing.assert_array_equal(out.tokens, g["tokens"][:, :n])
    np.testing.assert_array_equal(out.trace.tokens[:steps], g["predicted"][..., :n])
    np.testing.assert_array_equal(out.trace.reedited[:steps], g["reedited"][..., :n])
    for ours, name in (
        (out.trace.progress, "t"),
        (out.trace.confidence, "c"),
        (out.trace.step_fraction, "a"),
    ):
        np.testing.assert_allclose(ours[:steps], g[name][..., :n], rtol=0, atol=2e-3)
