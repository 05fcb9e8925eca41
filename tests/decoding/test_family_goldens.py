"""The decoders of the families' authors, and the flow around each model, against their goldens."""

import numpy as np
import pytest

from tests.family_helpers import decode_cases, golden_lm, unpadded
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction

OFFICIAL = ["illada_tiny"]  # decoded by LLaDA's own loop


def first_quick(kind, checkpoints):
    """Lists (checkpoint, case). The first case of each checkpoint is quick."""
    return [
        pytest.param(checkpoint, name, marks=[pytest.mark.slow] if number else [])
        for checkpoint in checkpoints
        for number, name in enumerate(decode_cases(kind, checkpoint))
    ]


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
    )
    np.testing.assert_array_equal(out.tokens, np.asarray(case["output"])[:, -args["gen_length"] :])
    np.testing.assert_array_equal(out.forward_passes, case["n_forward"])
