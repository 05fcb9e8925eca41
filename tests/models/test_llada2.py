"""LLaDA2.0 against the numbers of the original code, and in several equivalent computations."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import apply, eight, logits, read_arrays
from tests.llada2_helpers import TINY2, random_params
from xflow_jax.errors import UserError
from xflow_jax.models.config import model_config
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.llada2 import Block
from xflow_jax.models.logical_axes import AXES, shardings
from xflow_jax.models.moe import KERNELS, Router, route
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import batch_sharding, path_name

DIR = Path(__file__).parents[1] / "goldens" / "llada2_tiny"
HF = json.loads((DIR / "config.json").read_text())
TOLERANCE = 5e-4


@pytest.fixture(autouse=True)
def true_float32():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def config():
    return model_config(HF)


@pytest.fixture(scope="module")
def golden():
    return read_arrays(DIR / "golden.npz")


@pytest.fixture(scope="module")
def params(config):
    """Parameters of the golden checkpoint, assembled by hand."""
    tensors = {}
    for file in DIR.glob("*.safetensors"):
        tensors |= {
            name.removeprefix("model."): a.astype(np.float32) for name, a in load_file(file).items()
        }

    def matrices(names):
        return np.stack([tensors[name + ".weight"].T for name in names])

    def stack(layers):
        def scale(name):
            return {"scale": np.stack([tensors[f"layers.{i}.{name}.weight"] for i in layers])}

        qkv = matrices(f"layers.{i}.attention.query_key_value" for i in layers)
        q, k, v = np.split(qkv, [4 * 32, 6 * 32], axis=-1)
        return {
            "attn_norm": scale("input_layernorm"),
            "ff_norm": scale("post_attention_layernorm"),
            "q_norm": scale("attention.query_layernorm"),
            "k_norm": scale("attention.key_layernorm"),
            "q_proj": {"kernel": q},
            "k_proj": {"kernel": k},
            "v_proj": {"kernel": v},
            "attn_out": {"kernel": matrices(f"layers.{i}.attention.dense" for i in layers)},
        }

    def mlp(where, layers):
        names = {"ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj"}
        return {
            ours: {"kernel": matrices(f"layers.{i}.{where}.{its}" for i in layers)}
            for ours, its in names.items()
        }

    def experts(name, layers):
        return np.stack(
            [matrices(f"layers.{i}.mlp.experts.{e}.{name}_proj" for e in range(16)) for i in layers]
        )

    dense, sparse = range(1), range(1, 4)
    return {
        "wte": {"embedding": tensors["word_embeddings.weight"]},
        "dense": stack(dense) | mlp("mlp", dense),
        "blocks": stack(sparse)
        | {
            "router": {
                "kernel": matrices(f"layers.{i}.mlp.gate" for i in sparse),
                "bias": np.stack([tensors[f"layers.{i}.mlp.gate.expert_bias"] for i in sparse]),
            },
            "experts": {name: experts(name, sparse) for name in ("gate", "up", "down")},
            "shared": mlp("mlp.shared_experts", sparse),
        },
        "ln_f": {"scale": tensors["norm.weight"]},
        "ff_out": {"kernel": tensors["lm_head.weight"].T},
    }


def close(ours, golden):
    np.testing.assert_allclose(ours, golden, rtol=0, atol=TOLERANCE)


def test_the_parameters_are_the_abstract_ones(config, params):
    ours = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(build(config)))
    assert ours == jax.tree.map(lambda x: (x.shape, x.dtype), params)


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_logits(config, params, golden, case):
    close(
        apply(build(config), params, golden[f"full_ids_{case}"]),
        golden[f"full_logits_{case}"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", range(2))
def test_block_causal_logits(config, params, golden, case):
    ids, size = golden[f"block_ids_{case}"], int(golden[f"block_size_{case}"])
    close(logits(config, params, ids, block_length=size), golden[f"block_logits_{case}"])
    length = ids.shape[1]
    allowed = np.broadcast_to(
        golden[f"block_allowed_{case}"].reshape(-1, length, length)[:1], (*ids.shape, length)
    )
    close(logits(config, params, ids, allowed=allowed), golden[f"block_logits_{case}"])


@pytest.mark.slow
def test_embeddings_instead_of_tokens(config, params, golden):
    close(logits(config, params, x=golden["embeds"]), golden["embeds_logits"])
    table = params["wte"]["embedding"]
    mixed = np.einsum(
        "blk,blke->ble", golden["embeds_mix_weights"], table[golden["embeds_mix_ids"]]
    )
    np.testing.assert_allclose(mixed, golden["embeds"], atol=1e-6)


@pytest.mark.slow
def test_hidden_states(config, params, golden):
    wanted = golden["full_hidden_0"]
    model = build(config)
    x = apply(model, params, golden["full_ids_0"], method="embed")
    close(x, wanted[0])
    close(apply(model, params, x, method="hidden"), wanted[-1])
    for layers in (1, 2, 3):
        # A shorter stack ends in the final norm, so the golden states are normed too.
        cut = dataclasses.replace(config, num_hidden_layers=layers)
        few = {k: v for k, v in params.items() if k != "blocks"}
        if layers > 1:
            few["blocks"] = jax.tree.map(lambda a, n=layers: a[: n - 1], params["blocks"])
        y = wanted[layers]
        y = (
            y
            / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + config.rms_norm_eps)
            * params["ln_f"]["scale"]
        )
        close(apply(build(cut), few, x, method="hidden"), y)


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=[] if k == "tiles" else pytest.mark.slow) for k in KERNELS]
)
def test_router_and_experts(config, params, golden, kernel):
    layer = jax.tree.map(lambda a: a[int(golden["router_layer"]) - 1], params["blocks"])
    x = jnp.asarray(golden["router_input"])
    z, bias = Router(config.num_experts).apply({"params": layer["router"]}, x)
    np.testing.assert_allclose(
        z.reshape(golden["router_logits"].shape), golden["router_logits"], rtol=0, atol=1e-4
    )
    experts, weights = route(z, bias, config)
    np.testing.assert_array_equal(experts, golden["router_experts"])
    np.testing.assert_allclose(weights, golden["router_weights"], rtol=0, atol=1e-5)
    block = Block(config, sparse=True, experts_kernel=kernel)
    y = block.apply({"params": layer}, x, method="mlp")
    np.testing.assert_allclose(y, golden["moe_output"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_ragged_batch_is_its_rows_alone(config, params, golden):
    ids = np.array(golden["full_ids_0"])
    mask = np.arange(11)[None] >= np.array([[0], [4]])
    for block_length in (None, 4):
        ours = logits(config, params, ids, mask=mask, block_length=block_length)
        for row, real in enumerate(mask):
            close(
                ours[row, real],
                logits(config, params, ids[row : row + 1, real], block_length=block_length)[0],
            )


@pytest.mark.slow
def test_bfloat16_is_near(config, params, golden):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    half["blocks"]["router"]["bias"] = params["blocks"]["router"]["bias"]
    ours = logits(config, half, golden["full_ids_1"], dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert np.abs(ours.astype(jnp.float32) - golden["full_logits_1"]).max() < 5
    assert np.mean(np.argmax(ours, -1) == np.argmax(golden["full_logits_1"], -1)) > 0.85


def test_the_bias_of_the_router_is_float32_always(config):
    tree = abstract_params(build(config, jnp.bfloat16, param_dtype=jnp.bfloat16))
    wide = {
        path_name(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.dtype == jnp.float32
    }
    assert wide == {"blocks/router/bias"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, present",
    [
        ({"first_k_dense_replace": 0}, {"blocks"}),
        ({"first_k_dense_replace": 9}, {"dense"}),
        ({"num_experts": None}, {"dense"}),
        (
            {"num_shared_experts": 0, "use_qkv_bias": True, "tie_word_embeddings": True},
            {"dense", "blocks"},
        ),
        ({"num_shared_experts": 2, "use_bias": True, "head_dim": 0}, {"dense", "blocks"}),
    ],
)
def test_every_shape_of_the_family(changes, present):
    config = dataclasses.replace(TINY2, **changes)
    tokens = jnp.arange(12).reshape(2, 6)
    model = build(config)
    params = random_params(model)
    chex.assert_tree_all_finite(jax.grad(lambda p: (apply(model, p, tokens) ** 2).mean())(params))
    assert set(params) & {"dense", "blocks"} == present
    assert ("ff_out" in params) != config.tie_word_embeddings
    for stack in present:
        assert ("bias" in params[stack]["q_proj"]) == config.use_qkv_bias
        assert ("bias" in params[stack]["attn_out"]) == config.use_bias
    if "blocks" in present:
        width = (config.num_shared_experts or 0) * config.moe_intermediate_size
        shared = params["blocks"].get("shared")
        sparse = config.num_layers - config.num_dense_layers
        assert shared["ff_out"]["kernel"].shape == (sparse, width, 32) if width else shared is None
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert paths <= set(AXES["llada2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}, {"experts_kernel": "ragged"}]
)
def test_ways_to_compute_agree(fields):
    params = random_params(build(TINY2))
    tokens = jnp.arange(14).reshape(2, 7)

    def loss_and_grads(model):
        return jax.jit(
            jax.value_and_grad(lambda p: (model.apply({"params": p}, tokens) ** 2).mean())
        )(params)

    ours, plain = loss_and_grads(build(TINY2, **fields)), loss_and_grads(build(TINY2))
    chex.assert_trees_all_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@eight
@pytest.mark.parametrize("spec", ["1,8,1", "2,2,2"])
def test_sharded_is_unsharded(spec):
    model = build(dataclasses.replace(TINY2, num_key_value_heads=4))
    params = random_params(model)
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 40)
    mask = jnp.arange(6)[None] >= jnp.arange(8)[:, None] % 3

    def loss(p, tokens, mask):
        return (model.apply({"params": p}, tokens, mask, 2) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    mesh = make_mesh(spec)
    placed = jax.device_put(params, shardings(params, mesh, "llada2"))
    assert placed["blocks"]["experts"]["up"].sharding.spec == jax.P(None, "tensor", "fsdp", None)
    data = jax.device_put((tokens, mask), batch_sharding(mesh))
    wanted = step(params, tokens, mask)
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(step(placed, *data), wanted, atol=1e-4, rtol=1e-4)
    if spec == "2,2,2":
        chex.assert_trees_all_close(step(placed, *data), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@eight
def test_a_batch_that_the_mesh_does_not_divide_still_runs():
    model = build(TINY2)
    params, tokens, mesh = random_params(model), jnp.arange(18).reshape(3, 6), make_mesh("1,2,2")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh, "llada2"))
        ours = jax.jit(model.apply)({"params": placed}, tokens)
    np.testing.assert_allclose(ours, jax.jit(model.apply)({"params": params}, tokens), atol=1e-4)


@pytest.mark.slow
@eight
def test_each_device_computes_its_own_experts():
    model = build(TINY2)
    mesh, abstract = make_mesh("1,1,2"), abstract_params(model)
    placed = shardings(abstract, mesh, "llada2")
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    with jax.set_mesh(mesh):
        text = (
            jax.jit(model.apply)
            .lower({"params": abstract}, jnp.zeros((2, 6), jnp.int32))
            .compile()
            .as_text()
        )
    assert "f32[8,32,24]" not in text and "f32[4,32,24]" in text


def test_config():
    config = model_config(HF)
    assert (config.family, config.hidden_size, config.num_layers, config.max_length) == (
        "llada2",
        64,
        4,
        16384,
    )
    assert (config.vocab_size, config.vocab_rows, config.mask_token_id) == (320, 320, None)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim) == (2, 32, 16)
    assert (config.num_dense_layers, config.shared_mlp_dim, config.pad_id, config.eos_id) == (
        1,
        32,
        300,
        300,
    )
    assert json.dumps(config.to_hf()) == json.dumps(HF)
    assert dataclasses.replace(config, topk_group=1).to_hf() == HF | {"topk_group": 1}
    assert model_config(HF | {"num_key_value_heads": 0}).num_kv_heads == 4
    assert model_config(HF | {"head_dim": None}).head_dim == 16
    assert model_config(HF | {"eos_token_id": 7, "mask_token_id": 310}).eos_id == 7
    assert model_config(HF | {"model_type": "llada2_moe_veomni"}).family == "llada2"


@pytest.mark.parametrize("value", [None, 0, 16, "missing"])
def test_head_dim_is_an_integer_and_its_key_survives(value):
    hf = {k: v for k, v in HF.items() if k != "head_dim"}
    hf = hf if value == "missing" else hf | {"head_dim": value}
    config = model_config(hf)
    assert config.head_dim == 16
    assert json.dumps(config.to_hf()) == json.dumps(hf)
    assert dataclasses.replace(config, topk_group=1).to_hf() == hf | {"topk_group": 1}
    assert dataclasses.replace(config, head_dim=32).to_hf() == hf | {"head_dim": 32}


def test_the_mask_token_is_told_or_known():
    with pytest.raises(UserError, match="has no mask_token_id, and no tokenizer"):
        _ = model_config(HF).mask_id
    assert model_config(HF | {"mask_token_id": 310}).mask_id == 310
    assert model_config(HF | {"vocab_size": 157184}).mask_id == 156895


def test_presets():
    mini, flash = PRESETS["llada2-mini"], PRESETS["llada2-flash"]
    for config, billions in ((mini, 16.26), (flash, 102.9)):
        tree = abstract_params(build(config))
        assert sum(x.size for x in jax.tree.leaves(tree)) / 1e9 == pytest.approx(billions, abs=0.05)
        assert {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} <= set(
            AXES["llada2"]
        )
    assert (mini.mask_id, mini.eos_id, mini.rotary_dim) == (156895, 156892, 64)
    hf = mini.to_hf()
    assert hf["model_type"] == "llada2_moe" and hf["score_function"] == "sigmoid"
    assert dataclasses.replace(model_config(json.loads(json.dumps(hf))), hf="") == mini


@pytest.mark.parametrize(
    "changes, part",
    [
        (
            {"score_function": "softmax"},
            'score_function is "softmax", which is not implemented. It must be "sigmoid"',
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            'rope_scaling is {"type": "linear"}, which is not implemented',
        ),
        (
            {"hidden_act": "gelu"},
            'hidden_act is "gelu", which is not implemented. It must be "silu"',
        ),
        ({"use_qk_norm": False}, "use_qk_norm is false"),
        ({"num_experts": 18}, "n_group 4 does not divide num_experts 18"),
        ({"num_experts": 0}, "num_experts is 0, but it must be positive"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok is 9, but the groups that are kept hold 8 experts",
        ),
        ({"num_shared_experts": -1}, "num_shared_experts is -1, but it must not be negative"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        (
            {"head_dim": None, "hidden_size": 66},
            "num_attention_heads 4 does not divide hidden_size 66",
        ),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 of 32 dims is 9"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor 2.0 of 32 dims is 64"),
        ({"intermediate_size": None}, "intermediate_size is null, but it must be positive, since"),
        ({"moe_intermediate_size": None}, "the key moe_intermediate_size is missing"),
        ({"hidden_size": "64"}, 'hidden_size is "64", but it must be an integer'),
        ({"mask_token_id": 320}, "mask_token_id is 320, but the ids go from 0 to 319"),
        ({"pad_token_id": None}, "the key pad_token_id is missing"),
    ],
)
def test_impossible_configurations(changes, part):
    with pytest.raises(UserError) as error:
        model_config(HF | changes, "dir/config.json")
    sentence = str(error.value)
    assert sentence.startswith("dir/config.json: ") and part in sentence and "\n" not in sentence
