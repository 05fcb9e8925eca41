"""Matrices in int8: rounding, products, shardings and refusals, in both families."""

import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from tests.helpers import eight, read_arrays
from tests.hf_helpers import GOLDEN, TOY, random_params
from tests.llada2_helpers import TINY2
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_weights, build
from xflow_jax.models.layers import Linear
from xflow_jax.models.logical_axes import shardings
from xflow_jax.models.lora import LoraConfig, lora_init, merge
from xflow_jax.models.moe import KERNELS, apply_experts
from xflow_jax.models.quantization import (
    SCALE,
    is_layer_matrix,
    is_quantized,
    quantize,
    quantize_params,
)
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.training.state import TrainState

CONFIGS = {"llada": TOY, "llada2": TINY2}


def dequantized(params):
    """Multiplies the matrices by their scales."""
    leaves = flatten_dict(params, sep="/")
    return unflatten_dict(
        {
            path: x * leaves[path + SCALE][..., None, :] if path + SCALE in leaves else x
            for path, x in leaves.items()
            if not path.endswith(SCALE)
        },
        sep="/",
    )


def test_rounding_by_hand():
    matrix = np.array([[127, 0, -1, 1e-3], [-63.5, 0, 2.54, 0], [62.4, 0, 0.05, 0]], np.float32)
    rounded, scale = quantize(matrix)
    np.testing.assert_allclose(scale, [1, 0, 0.02, 1e-3 / 127], rtol=1e-6)
    # Halves go to the even neighbour, and a column of zeros stays zero.
    assert rounded.T.tolist() == [[127, -64, 62], [0, 0, 0], [-50, 127, 2], [127, 0, 0]]
    assert rounded.dtype == np.int8 and scale.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "float16"])
def test_the_error_is_at_most_half_a_step(dtype):
    rng = np.random.default_rng(0)
    stack = (rng.normal(size=(2, 3, 40, 7)) * rng.uniform(0.01, 9, 7)).astype(dtype)
    rounded, scale = quantize(stack)
    assert rounded.shape == stack.shape and scale.shape == (2, 3, 7)
    error = np.abs(rounded * scale[..., None, :] - stack.astype(np.float32))
    assert (error <= 0.5001 * scale[..., None, :]).all()
    assert (np.abs(rounded).max(axis=-2) == 127).all(), "each column uses the range"
    # A transposed view, as tensors are read, gives the same.
    view = np.ascontiguousarray(stack.swapaxes(-1, -2)).swapaxes(-1, -2)
    for ours, wanted in zip(quantize(view), (rounded, scale), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_visible_in_the_scale(bad):
    matrix = np.ones((4, 3), np.float32)
    matrix[2, 1] = bad
    assert np.isfinite(quantize(matrix)[1]).tolist() == [True, False, True]


@pytest.mark.parametrize("family", CONFIGS)
def test_devices_round_as_the_host_does(family):
    config = CONFIGS[family]
    params = random_params(config)
    ours = flatten_dict(jax.jit(quantize_params)(params), sep="/")
    abstract = flatten_dict(abstract_weights(config, "int8"), sep="/")
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in abstract.items()}
    for path, x in flatten_dict(params, sep="/").items():
        if path + SCALE not in ours:
            np.testing.assert_array_equal(ours[path], x)
            assert abstract[path].dtype == (
                jnp.float32 if path.endswith("router/bias") else jnp.bfloat16
            )
            assert not is_layer_matrix(path) or "router" in path
            continue
        for name, wanted in zip((path, path + SCALE), quantize(np.asarray(x)), strict=True):
            np.testing.assert_array_equal(ours[name], wanted)
            assert ours[name].dtype == abstract[name].dtype
    assert ("wte/embedding" + SCALE) not in ours and ("ff_out/kernel" + SCALE) not in ours
    assert ("blocks/attn_out/kernel" + SCALE) in ours


def test_a_linear_map_multiplies_by_the_scales():
    rng = np.random.default_rng(0)
    x, w, bias = (rng.normal(size=n).astype(np.float32) for n in ((2, 3, 8), (8, 5), (5,)))
    kernel, scale = quantize(w)
    layer = Linear(5, use_bias=True)
    ours = layer.apply(
        {"params": {"kernel": kernel, "kernel_scale": scale, "bias": bias}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(ours, x @ (kernel * scale) + bias, atol=1e-5)


@pytest.mark.parametrize("family", ["llada", pytest.param("llada2", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_rounded_matrices(family):
    config = CONFIGS[family]
    model = build(config)
    params = quantize_params(jax.tree.map(lambda x: 0.1 * x, random_params(config)))
    tokens = jnp.arange(12).reshape(2, 6)
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens))
    np.testing.assert_allclose(apply(params), apply(dequantized(params)), atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_multiply_by_their_own_scales(kernel):
    """All layers' experts at once, of which this is the second, and a half of them."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (3, 6, 8, 5), "up": (3, 6, 8, 5), "down": (3, 6, 5, 8)}
    stack, plain = {}, {}
    for name, shape in shapes.items():
        sizes = rng.uniform(0.1, 5, (3, 6, 1, 1))
        stack[name], stack[name + SCALE] = quantize(rng.normal(size=shape) * sizes)
        plain[name] = stack[name] * stack[name + SCALE][..., None, :]
    x = jnp.asarray(rng.normal(size=(1, 9, 8)), jnp.float32)
    experts = jnp.asarray([[rng.permutation(6)[:2] for _ in range(9)]], jnp.int32)
    weights = jnp.asarray(rng.uniform(size=experts.shape), jnp.float32)

    def total(m, first, layer):
        m = {name: jnp.asarray(x[:, first:]) for name, x in m.items()}
        if layer is None:
            m = {name: x[1] for name, x in m.items()}
        return apply_experts(x, experts, weights, m, {}, first, KERNELS[kernel], layer)

    wanted = total(plain, 2, None)
    np.testing.assert_allclose(total(stack, 2, None), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(total(stack, 2, jnp.int32(1)), wanted, rtol=1e-4, atol=1e-3)


@eight
@pytest.mark.parametrize("family", CONFIGS)
def test_scales_are_sharded_like_the_columns(family):
    abstract = abstract_weights(CONFIGS[family], "int8")
    placed = flatten_dict(shardings(abstract, make_mesh("1,4,2"), family), sep="/")
    assert placed["blocks/q_proj/kernel_scale"].spec == P(None, "tensor")
    assert placed["blocks/attn_out/kernel_scale"].spec == P(None, "fsdp")
    if family == "llada2":
        assert placed["blocks/experts/down_scale"].spec == P(None, "tensor", "fsdp")


def test_training_needs_float_matrices():
    params = quantize_params(random_params(TOY))
    assert is_quantized(params) and not is_quantized(dequantized(params))
    sentence = "needs float32 or bfloat16 parameters, but the matrices of these are int8"
    for user, call in (
        ("LoRA", lambda: lora_init(jax.random.key(0), params, LoraConfig())),
        ("LoRA", lambda: merge(params, {})),
        ("training", lambda: TrainState.create(params, optax.sgd(0.1))),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(user)} {sentence}$"):
            call()


def test_the_model_computes_in_bfloat16():
    lm = load(GOLDEN, "int8")
    assert lm.dtype == jnp.bfloat16 and lm.weight_dtype == np.int8
    chex.assert_trees_all_equal_shapes_and_dtypes(lm.params, abstract_weights(lm.config, "int8"))
    golden = read_arrays(GOLDEN / "golden.npz")
    ours = np.asarray(lm.logits(golden["ids_1"]))
    assert np.std(ours - golden["logits_1"]) < 0.12 * np.std(golden["logits_1"])
    assert np.mean(ours.argmax(-1) == golden["logits_1"].argmax(-1)) > 0.8
