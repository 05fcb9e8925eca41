"""Loaded models: golden logits from both formats, on any mesh, compiled once per shape."""

import dataclasses
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xflow_jax as xf
import xflow_jax.lm as lm_module
from convert import from_hf
from tests.helpers import eight, read_arrays
from tests.hf_helpers import GOLDEN
from xflow_jax.errors import UserError
from xflow_jax.lm import LM, load
from xflow_jax.parallel.mesh import make_mesh

TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def golden():
    return read_arrays(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "orbax"
    from_hf.convert(GOLDEN, path)
    return path


@pytest.fixture(scope="module", params=["hf", "converted"])
def lm(request):
    return load(GOLDEN if request.param == "hf" else request.getfixturevalue("converted"))


def close(ours, golden):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", range(4))
def test_golden_logits(lm, golden, case):
    close(lm.logits(golden[f"ids_{case}"]), golden[f"logits_{case}"])


def test_golden_padding_embeddings_and_blocks(lm, golden):
    close(lm.logits(golden["ragged_ids"], golden["ragged_attention_mask"]), golden["ragged_logits"])
    close(lm.logits_from_embeddings(golden["embeds"]), golden["embeds_logits"])
    close(lm.logits(golden["bias_ids"], block_length=4), golden["bias_logits"])
    x = lm.embed(golden["ragged_ids"])
    assert x.shape == (3, 20, 64) and x.dtype == jnp.float32
    again = lm.logits_from_embeddings(x, golden["ragged_attention_mask"] == 1, block_length=4)
    close(again, lm.logits(golden["ragged_ids"], golden["ragged_attention_mask"], block_length=4))


@pytest.mark.slow
@eight
@pytest.mark.parametrize("mesh", ["1,8,1", "2,2,2", "1,1,4"])
def test_golden_logits_on_a_mesh(converted, golden, mesh):
    sharded = load(converted, mesh=mesh)
    assert sharded.mesh == make_mesh(mesh)
    close(sharded.logits(golden["ids_2"]), golden["logits_2"])
    close(
        sharded.logits(golden["ragged_ids"], golden["ragged_attention_mask"]),
        golden["ragged_logits"],
    )
    ids = np.tile(golden["ids_1"], (8, 1))
    close(sharded.logits(ids), np.tile(golden["logits_1"], (8, 1, 1)))
    close(
        sharded.logits_from_embeddings(sharded.embed(ids)), np.tile(golden["logits_1"], (8, 1, 1))
    )


def test_bfloat16(converted, golden):
    for path in (GOLDEN, converted):
        half = load(path, "bfloat16")
        assert {x.dtype for x in jax.tree.leaves(half.params)} == {
            jnp.dtype("bfloat16")
        } and half.dtype == jnp.bfloat16
        assert half.embed(golden["ids_1"]).dtype == jnp.bfloat16
        ours = half.logits(golden["ids_1"])
        assert ours.dtype == jnp.float32
        assert np.abs(ours - golden["logits_1"]).max() < 1.5
        assert np.mean(np.argmax(ours, -1) == np.argmax(golden["logits_1"], -1)) > 0.9
    assert (
        load(GOLDEN, jnp.bfloat16).dtype == load(GOLDEN, np.dtype(jnp.bfloat16)).dtype == half.dtype
    )


def test_one_compilation_per_shape(lm):
    """Holds for ids of any array type, and for later loads of the same model."""
    programs = (lm_module._logits, lm_module._embed, lm_module._logits_from_embeddings)
    for program in programs:
        program.clear_cache()
    again = load(GOLDEN)
    for ids in (np.ones((2, 5), np.int32), jnp.ones((2, 5), jnp.int32), [[1] * 5] * 2):
        for model in (lm, again):
            model.logits(np.asarray(ids, np.int32))
            model.logits_from_embeddings(model.embed(np.asarray(ids, np.int32)))
    assert [program._cache_size() for program in programs] == [1, 1, 1]
    lm.logits(np.ones((2, 6), np.int32))
    lm.logits(np.ones((2, 5), np.int32), block_length=4)
    assert lm_module._logits._cache_size() == 3


@pytest.mark.slow
def test_within_other_programs(lm, golden):
    """Works under jit and grad like any function of JAX."""
    ids = golden["ids_0"]
    chex.assert_trees_all_close(jax.jit(lm.logits)(ids), lm.logits(ids), atol=1e-5)
    grad = jax.grad(lambda x: lm.logits_from_embeddings(x).sum())(lm.embed(ids))
    assert grad.shape == (2, 7, 64) and bool(jnp.isfinite(grad).all())


def test_the_parts(lm):
    assert (
        lm.family == "llada"
        and lm.config.mask_id == 490
        and lm.mesh is None
        and lm.dtype == np.float32
    )
    assert lm.tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == 490
    assert "'wte'" not in repr(lm), "a notebook shows no arrays"
    with pytest.raises(dataclasses.FrozenInstanceError):
        lm.mesh = None


def test_public_names():
    assert xf.load is load and xf.LM is LM
    with pytest.raises(AttributeError, match="has no attribute 'Flwo'"):
        xf.Flwo  # noqa: B018


def test_public_names_are_imported_on_first_use():
    program = (
        "import sys, xflow_jax\n"
        "assert 'Flow' in dir(xflow_jax) and 'jax' not in sys.modules\n"
        "assert xflow_jax.Flow.__name__ == 'Flow' and 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_float32_is_true_float32(lm):
    """Holds on devices that multiply at lower precision by default, as TPUs and newer GPUs do."""
    with jax.default_matmul_precision("bfloat16"), lm.scope():
        assert "Precision.HIGHEST" in str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tokens": [1, 2]}, "tokens must be integers [B, L], not int64 [2]"),
        ({"tokens": [[0.5]]}, "tokens must be integers [B, L], not float64 [1, 1]"),
        ({"tokens": [[3, 520]]}, "tokens hold the id 520, but the vocabulary has ids 0 to 519"),
        ({"tokens": [[-1]]}, "tokens hold the id -1, but the vocabulary has ids 0 to 519"),
        (
            {"tokens": [[3, 4]], "mask": [[True]]},
            "the mask must be [1, 2] like the tokens, not [1, 1]",
        ),
        ({"tokens": [[3]], "block_length": 0}, "block_length must be at least 1, not 0"),
    ],
)
def test_bad_arguments(lm, arguments, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        lm.logits(**arguments)


def test_bad_embeddings(lm):
    with pytest.raises(UserError, match=r"^embeddings must be \[B, L, 64\], not \[1, 2, 63\]$"):
        lm.logits_from_embeddings(np.ones((1, 2, 63)))


@pytest.mark.parametrize("dtype", ["float16", "int32", "fp8"])
def test_bad_dtype(dtype):
    with pytest.raises(
        UserError, match=f"^dtype is '{dtype}', but it must be float32, bfloat16 or int8$"
    ):
        load(GOLDEN, dtype)


def test_the_bundled_model_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(lm_module.BUNDLED, "tiny", tmp_path)
    with pytest.raises(
        UserError,
        match=f"^{tmp_path}: the weights of the bundled model are missing. Install the package",
    ):
        load("tiny")


def test_the_bundled_model():
    lm = load("tiny")
    assert sum(x.size for x in jax.tree.leaves(lm.params)) < 4e6 and lm.tokenizer is not None
