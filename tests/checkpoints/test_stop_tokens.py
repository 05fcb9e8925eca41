"""Tokens beside EOS that end a text."""

import json
import shutil

import numpy as np
import pytest

from convert import from_hf, to_hf
from tests.family_helpers import directory, golden_lm
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.lm import LM, load, read_model_config
from xflow_jax.models.config import model_config
from xflow_jax.models.presets import PRESETS


def stops(folder):
    return read_model_config(folder)[1].stop_ids


def test_the_generation_settings_name_them():
    assert stops(directory("sdar_tiny")) == (300, 301)
    assert stops(directory("dream_tiny")) == (300,)


def test_the_tokenizer_names_them(tmp_path):
    folder = shutil.copytree(directory("lladamoe_tiny"), tmp_path / "moe")
    tokens = [{"id": 301, "content": "<|role_end|>"}, {"id": 302, "content": "<|im_end|>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert stops(folder) == (300, 301)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens[1:]}))
    assert stops(folder) == (300,)


def test_config_json_may_name_several_and_keeps_them():
    hf = json.loads((directory("dream_tiny") / "config.json").read_text())
    config = model_config(hf | {"eos_token_id": [300, 302]})
    assert (config.eos_id, config.stop_ids) == (300, (300, 302))
    assert config.to_hf()["eos_token_id"] == [300, 302]
    assert "more_stop_ids" not in config.with_stop_ids({5}).to_hf()
    assert PRESETS["dream-7b"].with_stop_ids({151645}).to_hf() == PRESETS["dream-7b"].to_hf()


@pytest.mark.slow
def test_conversions_keep_them(tmp_path):
    from_hf.convert(directory("sdar_tiny"), tmp_path / "orbax")
    assert load(tmp_path / "orbax").config.stop_ids == (300, 301)
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert stops(tmp_path / "hf") == (300, 301)


@pytest.mark.slow
def test_a_decode_ends_at_any_of_them():
    lm = golden_lm("sdar_tiny")

    def with_stops(*ids):
        config = lm.config.with_stop_ids(ids)
        return LM(lm.model.clone(config=config), config, lm.params, None)

    free = with_stops()
    rule, options = MaskPrediction(order="sequential"), {"steps_per_block": 4, "block_length": 4}
    out = generate(free, [[20, 21, 22]], rule, 13, **options)
    # A token that the decode writes in its second block becomes a stop token.
    token = int(out.tokens[0, 2])
    short = generate(with_stops(token), [[20, 21, 22]], rule, 13, **options)
    first = out.tokens[0].tolist().index(token)
    np.testing.assert_array_equal(short.tokens[0, : first + 1], out.tokens[0, : first + 1])
    assert (short.tokens[0, first + 1 :] == lm.config.eos_id).all()
    assert short.forward_passes[0] < out.forward_passes[0]
