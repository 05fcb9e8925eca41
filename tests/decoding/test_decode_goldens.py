"""The decoder against the trajectories of the official decoders and of the flow's reference."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.helpers import GOLDENS, decode_golden, llada_tiny, read_arrays
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.policy_io import load_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.models.factory import build

OFFICIAL = {c["name"]: c for c in decode_golden()["llada_official_generate"]}
FAST_DLLM = {c["name"]: c for c in decode_golden()["fast_dllm_generate"]}
CACHE_OF = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}
FLOW = json.loads((GOLDENS / "flow" / "flow_golden.json").read_text())["cases"]


def unpadded(case):
    mask = np.asarray(case.get("attention_mask") or np.ones_like(case["prompt"]), bool)
    return [row[real].tolist() for row, real in zip(np.asarray(case["prompt"]), mask, strict=True)]


def check_golden(lm, case, rule, cache="none"):
    """Checks all tokens, and the positions, tokens and confidences that each step writes."""
    args, rows = case["args"], unpadded(case)
    out = generate(
        lm,
        rows,
        rule,
        args["gen_length"],
        args["steps"],
        block_length=args["block_length"],
        trace=True,
        cache=cache,
    )
    wanted = np.asarray(case["output"])[:, -args["gen_length"] :]
    np.testing.assert_array_equal(out.tokens, wanted)
    if "trajectory" not in case:
        return out
    prompt = len(case["prompt"][0])
    steps_per_block = args["steps"] * args["block_length"] // args["gen_length"]
    done = np.zeros(wanted.shape, bool)
    # Fast-dLLM lists the forward passes, not the steps.
    ran = np.flatnonzero(out.trace.confidence.any((1, 2)))
    for number, step in enumerate(case["trajectory"]):
        at = step.get("step", ran[number])
        if "positions_in_window" in step:
            first = prompt + args["gen_length"] - step["window_length"]
            if cache == "dual" and first:
                first = prompt + at // steps_per_block * args["block_length"]
            step = {"positions": [[first + i for i in step["positions_in_window"]]]} | {
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
def test_mask_prediction_equals_the_official_decoder(name):
    case = OFFICIAL[name]
    switches = {
        k: case["args"][k] for k in ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
    }
    out = check_golden(llada_tiny(), case, MaskPrediction(**switches))
    np.testing.assert_array_equal(out.forward_passes, case["n_forward"])


@pytest.mark.parametrize("name", list(FAST_DLLM))
def test_every_cache_equals_fast_dllm(name):
    """Their version runs a second pass of a block that the first one fills. No case has one."""
    case = FAST_DLLM[name]
    tau, cache = case["args"].get("threshold"), CACHE_OF[case["function"]]
    rule = MaskPrediction() if tau is None else Threshold(tau)
    out = check_golden(llada_tiny(), case, rule, cache)
    np.testing.assert_array_equal(out.forward_passes, case["nfe"])


def test_masks_in_the_prompt_are_context():
    """Masks in the prompt are never written, unlike in the official loop.

    There they compete with the masks of the response. Here the schedule is of the response alone.
    """
    case = OFFICIAL["quirk_mask_token_inside_prompt"]
    args = case["args"]
    assert args["mask_id"] in case["prompt"][0]
    assert args["mask_id"] in case["output"][0][-args["gen_length"] :]
    out = generate(
        llada_tiny(),
        case["prompt"],
        MaskPrediction(),
        args["gen_length"],
        args["steps"],
        block_length=6,
    )
    assert args["mask_id"] not in out.tokens
    assert (out.progress == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["quirk_mask_token_inside_prompt", "quirk_model_predicts_the_mask_token"]
)
def test_infill_leaves_masks_to_later_blocks_as_the_official_loop_does(name):
    """A mask that no step writes has the last prediction here, and stays a mask there."""
    case, lm = OFFICIAL[name], llada_tiny()
    args, (prompt,) = case["args"], case["prompt"]
    config = dataclasses.replace(lm.config, mask_token_id=args["mask_id"])
    lm = dataclasses.replace(lm, config=config, model=build(config))
    lengths = {"steps": args["steps"], "block_length": args["block_length"]}
    out = generate(lm, [prompt], MaskPrediction(), args["gen_length"], **lengths, infill=True)
    tokens = np.where(out.progress < 1, args["mask_id"], out.tokens)
    np.testing.assert_array_equal([[*out.prompts[0], *tokens[0]]], case["output"])


def test_a_predicted_mask_token_gives_way_to_the_last_prediction():
    """The end of a block commits the last predictions, as for every other rule.

    The official loop leaves such masks in its response. In later blocks they compete again.
    """
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
    # Without predictions of the mask token every position is committed.
    np.testing.assert_array_equal(
        generate(lm, case["prompt"], MaskPrediction(suppress_mask=True), 12, 6).progress, 1
    )


@pytest.mark.parametrize("number", range(len(FLOW)))
def test_flow_equals_the_reference(number):
    case, golden = FLOW[number], read_arrays(GOLDENS / "flow" / "flow_golden.npz")
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
