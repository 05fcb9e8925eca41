"""Every family against the numbers of its original code, and in equivalent computations."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_hf, to_hf
from tests.family_helpers import (
    GOLDEN_MODELS,
    directory,
    golden_arrays,
    golden_config,
    golden_lm,
)
from tests.helpers import apply, eight
from tests.hf_helpers import random_params, tensors_of
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.decoding.stream import stream
from xflow_jax.errors import UserError
from xflow_jax.lm import BUNDLED, LM, load
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.llada2 import Block
from xflow_jax.models.lora import LoraConfig, lora_init
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel import path_name

NAMES = list(GOLDEN_MODELS)
ONLY_BLOCKS = [("fastdllm2_tiny", "block_ids_0")]  # no golden of it has full attention
# Published parameters in billions.
SIZES = {
    "llada-8b": 8.02,
    "illada-8b": 7.62,
    "llada2-mini": 16.3,
    "llada2-flash": 102.9,
    "llada2.1-mini": 16.3,
    "llada2.1-flash": 102.9,
    "llada-moe-7b": 7.4,
    "dream-7b": 7.6,
    "fast-dllm-v2-7b": 7.62,
    "fast-dllm-v2-1.5b": 1.54,
    "sdar-1.7b": 2.03,
    "sdar-4b": 4.4,
    "sdar-8b": 8.2,
}


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


@pytest.mark.parametrize(
    "name, key",
    [
        pytest.param(*case.values, marks=[] if case.values in ONLY_BLOCKS else [pytest.mark.slow])
        for case in cases_of("block_ids_")
    ],
)
def test_block_causal_logits(name, key):
    golden = golden_arrays(name)
    size = int(golden[key.replace("ids", "size")])
    logits = golden_lm(name).logits(golden[key], block_length=size)
    close(name, logits, golden[key.replace("ids", "logits")])


@pytest.mark.parametrize("name", [name for name in NAMES if "embeds" in golden_arrays(name)])
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


def test_the_router_and_the_experts_of_llada_moe():
    name = "lladamoe_tiny"
    lm, golden = golden_lm(name), golden_arrays(name)
    layer = jax.tree.map(lambda a: a[int(golden["router_layer"])], lm.params["blocks"])
    block = Block(lm.config, sparse=True)
    x = jnp.asarray(golden["router_input"])
    experts, weights = block.apply({"params": layer}, x, method="route")
    np.testing.assert_array_equal(experts, golden["router_experts"])
    np.testing.assert_allclose(weights, golden["router_weights"], rtol=0, atol=1e-5)
    y = block.apply({"params": layer}, x, method="mlp")
    np.testing.assert_allclose(y, golden["moe_output"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_llada_moe_as_released_ignores_padding():
    name = "lladamoe_tiny"
    lm, golden = golden_lm(name), golden_arrays(name)
    mask = golden["ragged_attention_mask"].astype(bool)
    released = dataclasses.replace(lm, model=build(lm.config, as_released=True))
    ours = released.logits(golden["ragged_ids"], mask)
    close(name, ours, golden["ragged_logits_as_released"])


@pytest.mark.slow
def test_every_shape_of_llada_moe_travels(tmp_path):
    """Dense layers first, a shared expert, a bias of the router, clipped queries and biases."""
    config = dataclasses.replace(
        golden_lm("lladamoe_tiny").config,
        hf="",
        moe_layer_freq=(0, 1, 1),
        shared_expert_intermediate_size=24,
        moe_router_enable_expert_bias=True,
        clip_qkv=0.5,
        attention_bias=True,
        num_key_value_heads=2,
    )
    params = random_params(config)
    write_hf(tmp_path / "hf", params, config)
    names = tensors_of(tmp_path / "hf")
    for name in ("shared_expert.up_proj.weight", "mlp.expert_bias", "self_attn.o_proj.bias"):
        assert f"model.layers.1.{name}" in names
    lm = load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, lm.params, params)
    tokens = np.arange(12).reshape(2, 6)
    free = dataclasses.replace(config, clip_qkv=None)
    clipped, plain = (np.asarray(apply(build(c), params, tokens)) for c in (config, free))
    assert np.abs(clipped - plain).max() > 1e-2


@pytest.mark.parametrize(
    "config, weights", [("lladamoe_tiny", "../llada_tiny"), ("../llada_tiny", "lladamoe_tiny")]
)
def test_weights_of_another_family_are_refused(tmp_path, config, weights):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in [directory(config) / "config.json", *directory(weights).glob("*.safetensors*")]:
        shutil.copy(file, folder)
    with pytest.raises(UserError, match="is missing, but a llada[a-z]* model of this config.json"):
        load(folder)


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


def test_every_released_preset_has_a_published_size():
    assert PRESETS.keys() - SIZES.keys() == {"llada2-20m"}


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
        # A row that is done skips steps alone, but not in a batch whose other rows need them.
        own, shared = alone.trace.confidence[:, 0], together.trace.confidence[:, row]
        np.testing.assert_allclose(own[own > 0], shared[own > 0], atol=2e-3)


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
@pytest.mark.parametrize("name", [n for n in NAMES if golden_config(n).is_block_causal])
def test_the_exact_cache_changes_nothing(name):
    lm, ids = golden_lm(name), prompts_of(name)
    for rule in ("flow", "mask", "edit"):
        cached, plain = (decode(lm, ids, RULES[rule](), cache=cache) for cache in (True, False))
        np.testing.assert_array_equal(cached.tokens, plain.tokens)
        np.testing.assert_allclose(cached.trace.confidence, plain.trace.confidence, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_to_attention_and_the_mlps_that_there_are(name):
    params = abstract_params(golden_lm(name).model)
    lora = jax.eval_shape(lambda: lora_init(jax.random.key(0), params, LoraConfig(rank=2)))
    parts = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(lora)}
    for part in ("q_proj", "k_proj", "v_proj", "attn_out"):
        assert any(f"blocks/{part}/" in path for path in parts)
    has_mlp = any("/up_proj/" in path_name(path) for path in paths_of(params))
    assert has_mlp == any("/up_proj/" in path for path in parts)
    assert not any("experts" in path for path in parts)


def paths_of(tree):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


# --- tokenizers


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_code_beside_a_tokenizer_never_runs(tmp_path, file):
    """Dream's tokenizer has a Python class of its own. tokenizer.json is enough, if it is there."""
    folder = shutil.copytree(directory("dream_tiny"), tmp_path / "dream")
    witness = tmp_path / "witness"
    code = f"open({str(witness)!r}, 'w').close()\nclass DreamTokenizer: pass\n"
    (folder / "tokenization_dream.py").write_text(code)
    about = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": "{{ messages[0]['content'] }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    shutil.copy(BUNDLED["tiny"] / "tokenizer.json", folder / file)
    lm = load(folder)
    if file == "tokenizer.json":
        assert lm.tokenizer is not None and lm.tokenizer.encode("1")
    else:
        assert lm.tokenizer is None
        with pytest.raises(UserError) as error:
            generate(lm, ["1"], RULES["flow"](), gen_length=8, steps=4)
        assert str(error.value) == (
            "the model's directory has no tokenizer.json, so prompts must be lists of token ids"
        )
    assert not witness.exists()


# --- the exact cache on models of all shapes


def random_block_causal(seed):
    """Draws a tiny block-causal model with its block length."""
    rng = np.random.default_rng(seed)
    name = [n for n in NAMES if golden_config(n).is_block_causal][seed % 3]
    config = golden_lm(name).config
    heads = int(rng.choice([2, 4]))
    changes = {
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([1, heads])),
        "head_dim": int(rng.choice([8, 12])),
        "rope_theta": float(rng.choice([1e3, 1e6])),
        "hf": "",
    }
    changed = dataclasses.replace(config, **changes)
    params = jax.tree.map(lambda x: x * 0.3, random_params(changed, seed))
    return LM(build(changed), changed, params, None), int(rng.integers(2, 7)), rng


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_exact_cache_changes_nothing_in_random_models(seed):
    lm, size, rng = random_block_causal(seed)
    prompts = [rng.integers(20, 290, int(n)).tolist() for n in rng.integers(1, 14, 3)]
    rule = RULES[("flow", "mask", "edit")[int(rng.integers(3))]]()
    n = int(rng.integers(size, 3 * size + 1))
    cached, plain = (
        generate(
            lm, prompts, rule, n, steps_per_block=3, block_length=size, trace=True, cache=cache
        )
        for cache in (True, False)
    )
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_allclose(cached.trace.confidence, plain.trace.confidence, atol=2e-3)
    np.testing.assert_allclose(cached.progress, plain.progress, atol=2e-3)


# --- rows at their own block and step, as a server has them


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_ends_with_the_tokens_of_generate(name):
    lm, prompts, rule = golden_lm(name), prompts_of(name)[:2], RULES["threshold"]()
    options = {"gen_length": 8, "steps": 4, "block_length": 4}
    *_, last = stream(lm, prompts, rule, every=2, **options)
    np.testing.assert_array_equal(last.tokens, generate(lm, prompts, rule, **options).tokens)
