"""LLaDA2.0 in the Hugging Face format: separate or stacked experts, round trips, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_hf, to_hf
from tests.helpers import eight, read_arrays
from tests.hf_helpers import GOLDEN2, edited, random_params, tensors_of
from tests.llada2_helpers import TINY2
from xflow_jax.checkpoints import huggingface, weight_map
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.presets import PRESETS

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
QKV = "model.layers.0.attention.query_key_value.weight"
BIAS = "model.layers.3.mlp.gate.expert_bias"


def stack(tensors):
    """Merges the experts of each layer into one tensor, as in some checkpoints."""
    for layer in range(1, 4):
        for name in ("gate", "up", "down"):
            where = f"model.layers.{layer}.mlp.experts"
            parts = [tensors.pop(f"{where}.{expert}.{name}_proj.weight") for expert in range(16)]
            tensors[f"{where}.{name}_proj"] = np.stack(parts)


def test_the_mapping_names_every_tensor():
    config = huggingface.read_hf_config(GOLDEN2)
    mapping = weight_map.map_weights(config, abstract_params(build(config)))
    assert mapping.tensors == {name: shape for name, (_, shape, _) in tensors_of(GOLDEN2).items()}
    # The parts of a parameter, by hand.
    assert [piece.rows for piece in mapping.slices["dense/k_proj/kernel"]] == [(128, 192)]
    assert mapping.slices["blocks/experts/up"][16 + 5] == weight_map.TensorSlice(
        EXPERT, (1, 5), (0, 32), True
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(None, id="single"),
        pytest.param(stack, id="stacked", marks=pytest.mark.slow),
    ],
)
def test_round_trip_bit_for_bit(tmp_path, change):
    source = edited(tmp_path / "source", change, golden=GOLDEN2)
    from_hf.convert(source, tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(source)
    assert (tensors_of(source) == tensors_of(GOLDEN2)) == (change is None)
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", GOLDEN2)
    ]
    assert list(configs[0].items()) == list(configs[1].items())
    ours, golden = load(source), load(tmp_path / "orbax")
    jax.tree.map(np.testing.assert_array_equal, ours.params, golden.params)


def test_logits_of_the_golden_checkpoint():
    lm, golden = load(GOLDEN2), read_arrays(GOLDEN2 / "golden.npz")
    logits = lm.logits(golden["block_ids_1"], block_length=int(golden["block_size_1"]))
    np.testing.assert_allclose(logits, golden["block_logits_1"], rtol=0, atol=5e-4)


@pytest.mark.slow
def test_logits_of_all_kinds():
    lm, golden = load(GOLDEN2), read_arrays(GOLDEN2 / "golden.npz")
    for case in range(2):
        size = int(golden[f"block_size_{case}"])
        full, blocks = (
            lm.logits(golden[f"full_ids_{case}"]),
            lm.logits(golden[f"block_ids_{case}"], block_length=size),
        )
        np.testing.assert_allclose(full, golden[f"full_logits_{case}"], rtol=0, atol=5e-4)
        np.testing.assert_allclose(blocks, golden[f"block_logits_{case}"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(
        lm.logits_from_embeddings(golden["embeds"]), golden["embeds_logits"], rtol=0, atol=5e-4
    )


@eight
@pytest.mark.slow
def test_sharded_parameters_are_the_same(tmp_path):
    from_hf.convert(GOLDEN2, tmp_path / "orbax", mesh="1,2,2")
    complete = load(GOLDEN2).params
    for source in (GOLDEN2, tmp_path / "orbax"):
        sharded = load(source, mesh="1,2,2").params
        assert sharded["blocks"]["experts"]["up"].sharding.spec == jax.P(
            None, "tensor", "fsdp", None
        )
        jax.tree.map(np.testing.assert_array_equal, sharded, complete)


@pytest.mark.slow
def test_the_bias_of_the_router_stays_float32(tmp_path):
    """Holds for every requested dtype. A checkpoint's own dtype is restored on export."""
    thirds = {}

    def change(tensors):
        tensors.update({name: x.astype(np.float32) / 3 for name, x in tensors.items()})
        thirds[BIAS] = tensors[BIAS]

    wide = edited(tmp_path / "wide", change, golden=GOLDEN2)
    half = load(wide, "bfloat16").params
    assert half["blocks"]["router"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["blocks"]["router"]["bias"][2], thirds[BIAS])
    from_hf.convert(wide, tmp_path / "narrow", "bfloat16")
    to_hf.convert(tmp_path / "narrow", tmp_path / "hf")
    from_hf.convert(wide, tmp_path / "kept")
    to_hf.convert(tmp_path / "kept", tmp_path / "asked", "bfloat16")
    write_hf(tmp_path / "written", load(wide).params, load(wide).config, dtype=jnp.bfloat16)
    for folder in ("hf", "asked", "written"):
        ours = tensors_of(tmp_path / folder)
        assert ours[BIAS] == (np.dtype("float32"), (16,), thirds[BIAS].tobytes())
        assert {str(dtype) for name, (dtype, *_) in ours.items() if "expert_bias" not in name} == {
            "bfloat16"
        }
    rounded = edited(
        tmp_path / "rounded",
        lambda t: t.update({BIAS: t[BIAS].astype(jnp.bfloat16)}),
        golden=GOLDEN2,
    )
    assert load(rounded, "bfloat16").params["blocks"]["router"]["bias"].dtype == jnp.float32
    from_hf.convert(rounded, tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "same")
    assert tensors_of(tmp_path / "same") == tensors_of(rounded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "first_k_dense_replace": 0,
            "num_shared_experts": 0,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
        },
        {"first_k_dense_replace": 2, "num_shared_experts": 2, "use_bias": True},
        {"num_experts": None},
    ],
)
def test_every_shape_of_model_travels(tmp_path, changes):
    config = dataclasses.replace(TINY2, **changes)
    params = random_params(config)
    write_hf(tmp_path / "hf", params, config)
    from_hf.convert(tmp_path / "hf", tmp_path / "orbax")
    for folder in (tmp_path / "hf", tmp_path / "orbax"):
        lm = load(folder)
        jax.tree.map(np.testing.assert_array_equal, lm.params, params)
        assert lm.config.to_hf() == config.to_hf()


def test_fresh_parameters_are_written_as_their_code_reads_them(tmp_path):
    folder = edited(
        tmp_path / "stacked", stack, {"model_type": "llada2_moe_veomni"}, golden=GOLDEN2
    )
    lm = load(folder)
    write_hf(tmp_path / "again", lm.params, lm.config, dtype=jnp.bfloat16)
    assert tensors_of(tmp_path / "again") == tensors_of(folder)


def test_the_preset_is_its_tensors():
    """Both variants have the 16 billion parameters of LLaDA2.0-mini. None is in memory."""
    config = PRESETS["llada2-mini"]
    abstract = abstract_params(build(config))
    count = sum(x.size for x in jax.tree.leaves(abstract))
    for variant, tensors in (("experts", 14813), ("stacked", 278)):
        mapping = weight_map.map_weights(config, abstract, variant=variant)
        assert sum(int(np.prod(shape)) for shape in mapping.tensors.values()) == count
        assert len(mapping.tensors) == tensors
    assert count == 16_255_643_392


def without(name):
    return lambda tensors: tensors.pop(name)


BAD = {
    "missing expert": (
        without(EXPERT),
        {},
        f"{{dir}}: the tensor {EXPERT} is missing, but {{kind}} has it",
    ),
    "fewer experts": (
        None,
        {"num_experts": 20},
        "{dir}: the layers have 16 experts, but {kind} has 20",
    ),
    "more experts": (
        None,
        {"num_experts": 8},
        "{dir}: the layers have 16 experts, but {kind} has 8",
    ),
    "another count of stacked experts": (
        stack,
        {"num_experts": 20},
        "{dir}: the layers have 16 experts, but {kind} has 20",
    ),
    "a stack that is missing": (
        lambda tensors: (stack(tensors), tensors.pop("model.layers.2.mlp.experts.up_proj")),
        {},
        "{dir}: the tensor model.layers.2.mlp.experts.up_proj is missing, but {kind} has it",
    ),
    "more layers": (
        None,
        {"num_hidden_layers": 3},
        f"{{dir}}/model.safetensors: the tensor {BIAS} (and 58 more) is no part of {{kind}}",
    ),
    "other heads": (
        None,
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        f"{{dir}}/model.safetensors: the tensor {QKV} has the shape [256, 64], "
        "but {kind} has [128, 64] there",
    ),
    "unknown score function": (
        None,
        {"score_function": "softmax"},
        '{dir}/config.json: score_function is "softmax", which is not implemented. '
        'It must be "sigmoid"',
    ),
    "unknown rope scaling": (
        None,
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        '{dir}/config.json: rope_scaling is {{"type": "yarn", "factor": 4.0}}, '
        "which is not implemented",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    change, config, sentence = BAD[case]
    folder = edited(tmp_path / "source", change, config, golden=GOLDEN2)
    sentence = sentence.format(dir=folder, kind="a llada2 model of this config.json")
    for read in (load, lambda path: from_hf.convert(path, tmp_path / "orbax")):
        with pytest.raises(UserError, match="^" + re.escape(sentence)) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    assert [file.name for file in Path(tmp_path).iterdir()] == ["source"]
