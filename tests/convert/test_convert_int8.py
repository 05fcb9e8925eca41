"""Conversion to int8: the same bits as on the fly, whole or not at all, and never back."""

import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from convert import from_hf, to_hf
from tests.convert.test_convert import stop_at
from tests.family_helpers import GOLDEN_MODELS, directory, golden_arrays
from tests.helpers import eight
from tests.hf_helpers import GOLDEN, GOLDEN2, Q2, edited
from xflow_jax.checkpoints import SafetensorsSource, orbax_checkpoint
from xflow_jax.checkpoints.huggingface import read_hf_params
from xflow_jax.errors import UserError
from xflow_jax.lm import load, read_model_config
from xflow_jax.models.factory import abstract_weights
from xflow_jax.models.quantization import quantize


def equal(ours, theirs):
    """Compares two trees of parameters bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "orbax"
    from_hf.convert(GOLDEN, path, "int8")
    return path


@pytest.mark.parametrize(
    "golden",
    [
        pytest.param(GOLDEN, id="llada"),
        pytest.param(GOLDEN2, id="llada2", marks=pytest.mark.slow),
    ],
)
def test_converted_and_on_the_fly_are_equal(tmp_path, golden, converted):
    """From the original, from its float32 form, and from a conversion to int8."""
    wanted = read_hf_params(golden, np.int8)[1]
    if golden == GOLDEN2:
        from_hf.convert(golden, converted := tmp_path / "int8", "int8")
    from_hf.convert(golden, tmp_path / "float", "float32")
    for path in (converted, tmp_path / "float"):
        equal(orbax_checkpoint.load_params(path, np.int8)[1], wanted)
    kernel = wanted["blocks"]["q_proj"]
    if golden == GOLDEN:
        q = next(t[Q2] for f in golden.glob("*.safetensors") if Q2 in (t := load_file(f))).astype(
            np.float32
        )
        for x, y in zip((kernel["kernel"], kernel["kernel_scale"]), quantize(q.T), strict=True):
            np.testing.assert_array_equal(x[2], y)
    assert wanted["wte"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "dream_tiny" else [])
        for name in GOLDEN_MODELS
    ],
)
def test_further_families_are_equal_too(tmp_path, name):
    from_hf.convert(directory(name), tmp_path / "int8", "int8")
    config, params = orbax_checkpoint.load_params(tmp_path / "int8", np.int8)
    equal(params, read_hf_params(directory(name), np.int8)[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_weights(config, "int8"))


# Error of the logits in standard deviations, beside bfloat16: twice what was measured.
LARGEST_ERROR = {
    "illada_tiny": 0.06,
    "dream_tiny": 0.06,
    "sdar_tiny": 0.08,
    "lladamoe_tiny": 0.4,
    "llada21_tiny": 0.17,
    "fastdllm2_tiny": 0.06,
}


@pytest.mark.parametrize(
    "name",
    [
        "dream_tiny",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in GOLDEN_MODELS
            if name != "dream_tiny"
        ),
    ],
)
def test_logits_of_further_families(name):
    golden = golden_arrays(name)
    keys = [key for key in golden if re.match("(full_|block_)?ids_", key)]
    key = min(keys, key=lambda key: (key.startswith("block_"), key))
    size = golden.get(key.replace("ids", "size"))
    lm = load(directory(name), "int8", mask_id=GOLDEN_MODELS[name].mask_id)
    wanted = golden[key.replace("ids", "logits")]
    logits = lm.logits(golden[key], block_length=None if size is None else int(size))
    assert 0 < np.std(logits - wanted) < LARGEST_ERROR[name] * np.std(wanted)


@eight
def test_a_mesh_holds_the_same_parameters(converted):
    wanted = read_hf_params(GOLDEN, np.int8)[1]
    for path in (GOLDEN, converted):
        lm = load(path, "int8", "1,2,2")
        equal(lm.params, wanted)
        matrix = lm.params["blocks"]["q_proj"]
        assert matrix["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        assert matrix["kernel_scale"].sharding.spec == P(None, "tensor")


@eight
@pytest.mark.slow
@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN2], ids=["llada", "llada2"])
def test_all_ways_onto_a_mesh(tmp_path, golden):
    lm = load(golden, "int8")
    from_hf.convert(golden, tmp_path / "int8", "int8", "1,2,2")
    from_hf.convert(golden, tmp_path / "keep")
    tokens = np.arange(24).reshape(4, 6)
    for path in (golden, tmp_path / "int8", tmp_path / "keep"):
        sharded = load(path, "int8", "1,2,2")
        equal(sharded.params, lm.params)
        error = np.asarray(sharded.logits(tokens)) - lm.logits(tokens)
        assert np.std(error) < 0.05 * np.std(lm.logits(tokens))


def test_each_tensor_is_read_once_and_no_parameter_is_whole(monkeypatch):
    """Host memory holds one tensor and int8."""
    reads, allocated = [], []
    plain = SafetensorsSource.read
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, name: reads.append(name) or plain(self, name)
    )
    from xflow_jax.checkpoints import leaf_shards

    empty = leaf_shards._empty_aligned
    monkeypatch.setattr(
        leaf_shards,
        "_empty_aligned",
        lambda shape, dtype: allocated.append((len(shape), np.dtype(dtype))) or empty(shape, dtype),
    )
    read_hf_params(GOLDEN, np.int8)
    assert len(reads) == len(set(reads))
    assert {dtype for rank, dtype in allocated if rank == 3} == {np.dtype(np.int8)}


def test_the_record(converted):
    record = orbax_checkpoint.read_record(converted)
    assert record.is_int8 and record.provenance["dtype"] == "int8"
    assert record.leaves["blocks/ff_out/kernel"] == ["int8", 3, 160, 64]
    assert record.leaves["blocks/ff_out/kernel_scale"] == ["float32", 3, 64]
    assert record.leaves["ff_out/kernel"][0] == "bfloat16"
    assert read_model_config(converted)[1] == load(GOLDEN).config


def test_a_stopped_conversion_goes_on(tmp_path, monkeypatch, converted):
    """It stops between a matrix and its scales."""
    leaves = [*orbax_checkpoint.read_record(converted).leaves]
    count = leaves.index("blocks/k_proj/kernel_scale")
    with monkeypatch.context() as patch:
        stop_at(patch, count, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            from_hf.convert(GOLDEN, tmp_path / "orbax", "int8")
    from_hf.convert(GOLDEN, tmp_path / "orbax", "int8")
    equal(load(tmp_path / "orbax", "int8").params, load(converted, "int8").params)


def test_a_column_of_zeros(tmp_path):
    def clear(tensors):
        tensors[Q2][3] = 0

    source = edited(tmp_path / "zeros", clear)
    params = load(source, "int8").params["blocks"]["q_proj"]
    assert params["kernel_scale"][2, 3] == 0 and not params["kernel"][2, :, 3].any()
    assert np.isfinite(load(source, "int8").logits([[1, 2, 3]])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    def spoil(tensors):
        tensors[Q2] = tensors[Q2].astype(np.float16)
        tensors[Q2][3, 5] = value

    source = edited(tmp_path / "bad", spoil)
    sentence = (
        f"{source}/model.safetensors: the tensor {Q2} holds NaN or infinity. "
        "Fetch it again, or train the model again."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load(source, "int8")
    if np.isnan(value):
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            from_hf.convert(source, tmp_path / "orbax", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_loads_as_int8_alone(converted, dtype):
    sentence = f"{converted}: its matrices are int8, so its dtype must be int8, not {dtype}"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load(converted, dtype)


def test_there_is_no_way_back(converted, tmp_path):
    sentence = (
        f"{converted}: its matrices are int8, which the original code cannot read. "
        "Convert back a float32 or bfloat16 checkpoint."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        to_hf.convert(converted, tmp_path / "hf")
    assert not [*tmp_path.iterdir()]


def test_bfloat16_is_what_the_rest_becomes(converted):
    golden = load(GOLDEN).params["wte"]["embedding"]
    ours = load(converted, "int8").params["wte"]["embedding"]
    np.testing.assert_array_equal(ours, np.asarray(golden).astype(ml_dtypes.bfloat16))
