"""LLaDA against the numbers of the original code, and in several equivalent computations."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import apply, logits, read_arrays
from xflow_jax.errors import UserError
from xflow_jax.models.attention import attend, attention_mask
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import abstract_params, build, init_params

DIR = Path(__file__).parents[1] / "goldens" / "llada_tiny"
TOLERANCE = 3e-4
TINY = LLaDAConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    vocab_size=40,
    mlp_hidden_size=48,
    mask_token_id=39,
    eos_token_id=1,
)


@pytest.fixture(autouse=True)
def true_float32():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def config():
    return LLaDAConfig.from_hf(json.loads((DIR / "config.json").read_text()))


@pytest.fixture(scope="module")
def golden():
    return read_arrays(DIR / "golden.npz")


@pytest.fixture(scope="module")
def params(config):
    tensors = {}
    for file in DIR.glob("*.safetensors"):
        tensors |= {
            name.removeprefix("model.transformer."): a.astype(np.float32)
            for name, a in load_file(file).items()
        }

    def stacked(name):
        return np.stack([tensors[f"blocks.{i}.{name}.weight"] for i in range(config.n_layers)])

    kernels = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    return {
        "wte": {"embedding": tensors["wte.weight"]},
        "blocks": {name: {"kernel": stacked(name).swapaxes(1, 2)} for name in kernels}
        | {name: {"scale": stacked(name)} for name in ("attn_norm", "ff_norm")},
        "ln_f": {"scale": tensors["ln_f.weight"]},
        "ff_out": {"kernel": tensors["ff_out.weight"].T},
    }


def close(ours, golden):
    np.testing.assert_allclose(ours, golden, rtol=0, atol=TOLERANCE)


def test_the_parameters_are_the_abstract_ones(config, params):
    ours = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(build(config)))
    assert ours == jax.tree.map(lambda x: (x.shape, x.dtype), params)


@pytest.mark.parametrize("case", range(4))
def test_logits(config, params, golden, case):
    close(apply(build(config), params, golden[f"ids_{case}"]), golden[f"logits_{case}"])


@pytest.mark.parametrize("kernel", ["einsum", "xla"])
def test_every_attention_kernel_is_the_golden_one(config, params, golden, kernel):
    model = build(config, attention=kernel)
    mask = golden["ragged_attention_mask"] == 1
    close(apply(model, params, golden["ragged_ids"], mask), golden["ragged_logits"])


def test_hidden_states_of_every_layer(config, params, golden):
    wanted = golden["hidden_0"]
    x = apply(build(config), params, golden["ids_0"], method="embed")
    close(x, wanted[0])
    for layers in (1, 2):
        # A shorter stack ends in the final norm, so the golden states are normed too.
        cut = dataclasses.replace(config, n_layers=layers)
        few = params | {"blocks": jax.tree.map(lambda a, n=layers: a[:n], params["blocks"])}
        close(
            apply(build(cut), few, x, method="hidden"),
            rms_norm(wanted[layers], config, params),
        )
    close(apply(build(config), params, x, method="hidden"), wanted[-1])


def rms_norm(x, config, params):
    return (
        x
        / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps)
        * params["ln_f"]["scale"]
    )


def test_input_embeddings(config, params, golden):
    close(logits(config, params, x=golden["embeds"]), golden["embeds_logits"])
    mixed = np.einsum(
        "blk,blke->ble",
        golden["embeds_mix_weights"],
        params["wte"]["embedding"][golden["embeds_mix_ids"]],
    )
    close(logits(config, params, x=mixed), golden["embeds_logits"])


def test_embeddings_of_tokens_are_the_tokens(config, params, golden):
    x = params["wte"]["embedding"][golden["ids_2"]]
    chex.assert_trees_all_equal(
        logits(config, params, x=x), logits(config, params, golden["ids_2"])
    )


def test_left_padding(config, params, golden):
    ids, mask = golden["ragged_ids"], golden["ragged_attention_mask"] == 1
    ours = logits(config, params, ids, mask=mask)
    close(ours, golden["ragged_logits"])
    for row, real in enumerate(mask):
        close(ours[row, real], logits(config, params, ids[row : row + 1, real])[0])


def test_a_mask_of_ones_is_no_mask(config, params, golden):
    ids = golden["ids_1"]
    ones = np.ones(ids.shape, bool)
    chex.assert_trees_all_close(
        logits(config, params, ids, mask=ones), logits(config, params, ids), atol=1e-5
    )


def test_explicit_permission(config, params, golden):
    allowed = golden["bias_allowed"][:, 0]
    close(logits(config, params, golden["bias_ids"], allowed=allowed), golden["bias_logits"])
    # The golden's permission is block-causal in blocks of 4.
    close(logits(config, params, golden["bias_ids"], block_length=4), golden["bias_logits"])


def test_block_grid_counts_from_each_rows_own_first_token(config, params, golden):
    ids, mask = golden["ragged_ids"], golden["ragged_attention_mask"] == 1
    ours = logits(config, params, ids, mask=mask, block_length=4)
    for row, real in enumerate(mask):
        alone = logits(config, params, ids[row : row + 1, real], block_length=4)[0]
        close(ours[row, real], alone)
    assert np.abs(ours - logits(config, params, ids, mask=mask)).max() > 0.1


def test_bfloat16_is_near(config, params, golden):
    ours = logits(config, params, golden["ids_1"], dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    wanted = golden["logits_1"]
    assert np.abs(ours.astype(jnp.float32) - wanted).max() < 1.5
    assert np.mean(np.argmax(ours, -1) == np.argmax(wanted, -1)) > 0.9
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    chex.assert_trees_all_equal(ours, logits(config, half, golden["ids_1"], dtype=jnp.bfloat16))


def test_compute_dtype_leaves_parameters_alone(config):
    types = {x.dtype for x in jax.tree.leaves(abstract_params(build(config, jnp.bfloat16)))}
    assert types == {jnp.dtype("float32")}
    types = {
        x.dtype for x in jax.tree.leaves(abstract_params(build(config, param_dtype=jnp.bfloat16)))
    }
    assert types == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_padded_queries_are_finite_and_so_are_gradients():
    model = build(TINY)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.zeros((2, 6), jnp.int32)
    mask = jnp.array([[False] * 6, [False] * 2 + [True] * 4])

    def total(p):
        return apply(model, p, tokens, mask, block_length=2).sum()

    value, grads = jax.value_and_grad(total)(params)
    chex.assert_tree_all_finite((value, grads))


def test_tied_head():
    tied = dataclasses.replace(TINY, weight_tying=True, embedding_size=48)
    params = init_params(build(tied), jax.random.key(0))
    assert "ff_out" not in params
    free = dataclasses.replace(tied, weight_tying=False)
    copy = params | {"ff_out": {"kernel": params["wte"]["embedding"].T}}
    tokens = jnp.arange(12).reshape(2, 6)
    chex.assert_trees_all_close(logits(tied, params, tokens), logits(free, copy, tokens), atol=1e-6)
    assert logits(tied, params, tokens).shape == (2, 6, 48)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["einsum", "xla"])
def test_grouped_heads_are_repeated_heads(kernel):
    grouped = dataclasses.replace(TINY, n_kv_heads=2)
    params = init_params(build(grouped), jax.random.key(0))

    def repeat(kernel):
        heads = kernel.reshape(TINY.n_layers, TINY.d_model, 2, -1)
        return jnp.repeat(heads, 2, axis=2).reshape(TINY.n_layers, TINY.d_model, -1)

    blocks = params["blocks"]
    full = params | {
        "blocks": blocks | {n: jax.tree.map(repeat, blocks[n]) for n in ("k_proj", "v_proj")}
    }
    tokens = jnp.arange(14).reshape(2, 7)
    mask = jnp.arange(7)[None] >= jnp.array([[0], [3]])
    ours = apply(build(grouped, attention=kernel), params, tokens, mask)
    chex.assert_trees_all_close(ours, apply(build(TINY), full, tokens, mask), atol=1e-5)


def test_biases():
    qkv = dataclasses.replace(TINY, include_qkv_bias=True)
    everywhere = dataclasses.replace(TINY, include_bias=True)
    tree = abstract_params(build(qkv))
    assert {n for n, leaf in tree["blocks"].items() if "bias" in leaf} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert "bias" not in tree["ff_out"]
    params = init_params(build(everywhere), jax.random.key(0))
    assert "bias" in params["ff_out"] and "bias" not in params["ln_f"]
    assert {n for n, leaf in params["blocks"].items() if "bias" not in leaf} == {
        "attn_norm",
        "ff_norm",
    }
    tokens = jnp.arange(6)[None]
    # Fresh biases are zero. A shift of the head's bias is a shift of the logits.
    plain = jax.tree_util.tree_map_with_path(
        lambda path, x: None if path[-1].key == "bias" else x, params
    )
    plain = {
        k: {n: v for n, v in sub.items() if v is not None}
        for k, sub in plain.items()
        if k != "blocks"
    } | {
        "blocks": {
            k: {n: v for n, v in sub.items() if v is not None} for k, sub in plain["blocks"].items()
        }
    }
    before = logits(everywhere, params, tokens)
    chex.assert_trees_all_equal(before, logits(TINY, plain, tokens))
    shifted = params | {"ff_out": params["ff_out"] | {"bias": jnp.ones(40)}}
    chex.assert_trees_all_close(logits(everywhere, shifted, tokens), before + 1, atol=1e-6)
    for name in ("q_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
        moved = params["blocks"] | {name: jax.tree.map(lambda x: x + 0.1, params["blocks"][name])}
        assert (
            np.abs(logits(everywhere, params | {"blocks": moved}, tokens) - before).max() > 1e-4
        ), name


def test_null_mlp_width_is_the_ratio():
    tree = abstract_params(build(dataclasses.replace(TINY, mlp_hidden_size=None, mlp_ratio=3)))
    assert tree["blocks"]["ff_proj"]["kernel"].shape == (2, 32, 96)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}, {"attention": "xla"}]
)
def test_ways_to_compute_agree(fields):
    params = init_params(build(TINY), jax.random.key(0))
    tokens = jnp.arange(14).reshape(2, 7)

    def loss_and_grads(model):
        return jax.jit(
            jax.value_and_grad(lambda p: (model.apply({"params": p}, tokens) ** 2).mean())
        )(params)

    chex.assert_trees_all_close(
        loss_and_grads(build(TINY)), loss_and_grads(build(TINY, **fields)), atol=1e-6
    )


def test_unknown_remat_is_refused():
    with pytest.raises(UserError, match="remat is 'half', but it must be full or dots"):
        abstract_params(build(TINY, remat="half"))


def test_no_mask_is_made_where_none_is_needed():
    assert attention_mask(8) is None
    assert attention_mask(8, mask=jnp.ones((3, 8), bool)).shape == (3, 1, 1, 8)
    assert attention_mask(8, block_length=4).shape == (1, 1, 8, 8)
    model = build(TINY)
    text = str(
        jax.make_jaxpr(lambda p, t: model.apply({"params": p}, t))(
            abstract_params(model), jnp.zeros((2, 8), int)
        )
    )
    assert "bool[2,1,8,8]" not in text and "select_n" not in text.split("scan")[1]


def test_attention_by_hand():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 5, heads, 8)) for i, heads in enumerate((4, 2, 2))
    )
    mask = attention_mask(5, jnp.array([[False, True, True, True, True]] * 2), block_length=2)
    out = np.zeros((2, 5, 4, 8))
    for b, i, h in np.ndindex(2, 5, 4):
        seen = [j for j in range(1, 5) if (j - 1) // 2 <= (i - 1) // 2]
        if seen:
            score = np.array([np.dot(q[b, i, h], k[b, j, h // 2]) for j in seen]) / np.sqrt(8)
            weight = np.exp(score) / np.exp(score).sum()
            out[b, i, h] = sum(w * v[b, j, h // 2] for w, j in zip(weight, seen, strict=True))
    for kernel in ("einsum", "xla"):
        np.testing.assert_allclose(attend(q, k, v, mask, kernel)[:, 1:], out[:, 1:], atol=1e-5)


def test_initialisation():
    config = dataclasses.replace(TINY, d_model=128, mlp_hidden_size=256, n_layers=4)
    params = init_params(build(config), jax.random.key(0))
    std = {
        name: float(leaf["kernel"].std())
        for name, leaf in params["blocks"].items()
        if "kernel" in leaf
    }
    for name, value in std.items():
        wanted = 0.02 / 8**0.5 if name in ("attn_out", "ff_out") else 0.02
        assert value == pytest.approx(wanted, rel=0.05), name
    kernel = params["blocks"]["q_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1]), "each layer draws its own"
    chex.assert_trees_all_equal(params["ln_f"]["scale"], jnp.ones(128))
