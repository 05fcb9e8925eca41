"""Every family against the numbers of its original code, and in equivalent computations."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from convert import from_hf, to_hf
from tests.family_helpers import GOLDEN_MODELS, directory, golden_arrays, golden_lm
from tests.helpers import eight
from tests.hf_helpers import tensors_of
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.presets import PRESETS

NAMES = list(GOLDEN_MODELS)
# Published parameters in billions.
SIZES = {"illada-8b": 7.62, "llada2.1-mini": 16.3, "llada2.1-flash": 102.9}


def close(name, ours, golden, where=slice(None)):
    tolerance = GOLDEN_MODELS[name].tolerance
    np.testing.assert_allclose(np.asarray(ours)[where], golden[where], rtol=0, atol=tolerance)


def cases_of(pattern):
    """Lists (checkpoint, key of its inputs). The first one of each is quick."""
    found = []
    for name in NAMES:
        keys = sorted(key for key in golden_arrays(name) if key.startswith(pattern))
        found += [
            pytest.param(name, key, marks=[pytest.mark.slow] if number else [])
            for number, key in enumerate(keys)
        ]
    return found


@pytest.mark.parametrize("name, key", cases_of("ids_") + cases_of("full_ids_"))
def test_logits(name, key):
    golden = golden_arrays(name)
    close(name, golden_lm(name).logits(golden[key]), golden[key.replace("ids", "logits")])


@pytest.mark.slow
@pytest.mark.parametrize("name, key", cases_of("block_ids_"))
def test_block_causal_logits(name, key):
    golden = golden_arrays(name)
    size = int(golden[key.replace("ids", "size")])
    logits = golden_lm(name).logits(golden[key], block_length=size)
    close(name, logits, golden[key.replace("ids", "logits")])


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_instead_of_tokens(name):
    golden = golden_arrays(name)
    close(name, golden_lm(name).logits_from_embeddings(golden["embeds"]), golden["embeds_logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name, key", cases_of("ragged_ids"))
def test_ragged_batches(name, key):
    golden = golden_arrays(name)
    mask = golden["ragged_attention_mask"].astype(bool)
    size = golden.get("ragged_block_size")
    size = None if size is None else int(size)
    logits = golden_lm(name).logits(golden[key], mask, block_length=size)
    close(name, logits, golden["ragged_logits"], mask)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_bit_for_bit(name, tmp_path):
    from_hf.convert(directory(name), tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(directory(name))
    texts = [
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "hf", directory(name))
    ]
    assert list(texts[0].items()) == list(texts[1].items())
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "orbax").params, golden_lm(name).params
    )


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_the_published_size(preset):
    leaves = jax.tree.leaves(abstract_params(build(PRESETS[preset])))
    total = sum(int(np.prod(x.shape)) for x in leaves)
    assert total == pytest.approx(SIZES[preset] * 1e9, rel=0.006)
    hf = PRESETS[preset].to_hf()
    again = type(PRESETS[preset]).from_hf(json.loads(json.dumps(hf)))
    assert dataclasses.replace(again, hf="") == PRESETS[preset]


# --- decoding


def prompts_of(name):
    rng = np.random.default_rng(3)
    return [rng.integers(20, 290, n).tolist() for n in (9, 3, 6)]


def decode(lm, prompts, rule, **options):
    block = 4 if lm.config.is_block_causal else None
    arguments = {"gen_length": 8, "steps": 4, "block_length": block, "trace": True} | options
    return generate(lm, prompts, rule, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_runs_and_rows_do_not_depend_on_their_batch(name, rule):
    lm, prompts = golden_lm(name), prompts_of(name)
    together = decode(lm, prompts, RULES[rule]())
    assert np.isfinite(together.progress).all()
    for row in (0, 1):
        alone = decode(lm, [prompts[row]], RULES[rule]())
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(
            alone.trace.confidence[:, 0], together.trace.confidence[:, row], atol=2e-3
        )


@eight
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1,4,2", "2,2,2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_changes_nothing(name, mesh):
    sharded, ids = golden_lm(name, mesh), prompts_of(name)
    tokens = np.asarray([row[:3] for row in ids])
    close(name, sharded.logits(tokens), np.asarray(golden_lm(name).logits(tokens)))
    ours = decode(sharded, ids, RULES["flow"]())
    np.testing.assert_array_equal(ours.tokens, decode(golden_lm(name), ids, RULES["flow"]()).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if golden_lm(n).config.is_block_causal])
def test_the_exact_cache_changes_nothing(name):
    lm, ids = golden_lm(name), prompts_of(name)
    for rule in ("flow", "mask", "edit"):
        cached, plain = (decode(lm, ids, RULES[rule](), cache=cache) for cache in (True, False))
        np.testing.assert_array_equal(cached.tokens, plain.tokens)
        np.testing.assert_allclose(cached.trace.confidence, plain.trace.confidence, atol=2e-3)
