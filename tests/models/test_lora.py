"""LoRA: adapters beside frozen matrices, in both families."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import eight
from tests.hf_helpers import GOLDEN2, tensors_of
from tests.llada2_helpers import TINY2, random_params
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.layers import Linear
from xflow_jax.models.logical_axes import shardings, state_shardings
from xflow_jax.models.lora import Adapter, LoraConfig, adapted, lora_init, merge
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import path_name

LLADA = LLaDAConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    vocab_size=40,
    mlp_hidden_size=48,
    mask_token_id=39,
    eos_token_id=1,
)
CONFIGS = {"llada": LLADA, "llada2": TINY2}
# Experts take minutes to compile.
FAMILIES = ["llada", pytest.param("llada2", marks=pytest.mark.slow)]
TOKENS = jnp.arange(12).reshape(2, 6)
DEFAULT = LoraConfig(rank=4, alpha=8.0)
ALL = dataclasses.replace(DEFAULT, targets=(*DEFAULT.targets, "experts"))


def trained(lora, seed=1):
    """Adapters with an effect."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), lora)


def paths(lora):
    leaves = jax.tree_util.tree_leaves_with_path(lora, is_leaf=lambda x: isinstance(x, Adapter))
    return {path_name(path) for path, _ in leaves}


@jax.jit(static_argnums=0)
def logits(model, params, lora):
    return model.apply({"params": params, "lora": lora}, TOKENS)


@pytest.mark.slow
def test_targets():
    attention = {f"blocks/{name}/kernel" for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    mlp = {f"blocks/{name}/kernel" for name in ("ff_proj", "up_proj", "ff_out")}
    tree = abstract_params(build(LLADA))
    assert paths(lora_init(jax.random.key(0), tree, DEFAULT)) == attention | mlp
    tree = abstract_params(build(TINY2))
    default = attention | {path.replace("blocks", "dense") for path in attention | mlp}
    default |= {path.replace("blocks", "blocks/shared") for path in mlp}
    assert paths(lora_init(jax.random.key(0), tree, DEFAULT)) == default
    experts = {f"blocks/experts/{name}" for name in ("gate", "up", "down")}
    assert paths(lora_init(jax.random.key(0), tree, ALL)) == default | experts
    assert paths(lora_init(jax.random.key(0), tree, LoraConfig(targets=("gate", "shared")))) == {
        "blocks/experts/gate",
        *(path.replace("blocks", "blocks/shared") for path in mlp),
    }


def test_shapes_and_strength():
    lora = lora_init(
        jax.random.key(0), abstract_params(build(TINY2, param_dtype=jnp.bfloat16)), ALL
    )
    q, up = lora["blocks"]["q_proj"]["kernel"], lora["blocks"]["experts"]["up"]
    assert (q.a.shape, q.b.shape, q.scale) == ((2, 32, 4), (2, 4, 64), 2.0)
    assert (up.a.shape, up.b.shape) == ((2, 8, 32, 4), (2, 8, 4, 24))
    assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    assert not jnp.any(q.b) and float(jnp.abs(q.a).max()) < 32**-0.5 and jnp.std(q.a) > 0.08
    assert not np.allclose(q.a[0], q.a[1]) and not np.allclose(
        q.a, lora["blocks"]["k_proj"]["kernel"].a
    )


@pytest.mark.parametrize("rank, alpha", [(1, 3.0), (2, 3.0), (4, 1.0)])
def test_the_update_is_a_b_x_times_alpha_over_rank(rank, alpha):
    """Checks a layer with an adapter, and the merged matrix, by NumPy."""
    rng = np.random.default_rng(rank)
    w, a, b = (rng.normal(size=n).astype(np.float32) for n in ((6, 5), (6, rank), (rank, 5)))
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    base = {"blocks": {"q_proj": {"kernel": jnp.asarray(w)[None]}}}
    config = LoraConfig(rank, alpha, ("q_proj",))
    (drawn,) = lora_init(jax.random.key(0), base, config)["blocks"]["q_proj"].values()
    adapter = Adapter(jnp.asarray(a), jnp.asarray(b), drawn.scale)
    wanted = x @ (w + a @ b * alpha / rank)
    layer = Linear(5)
    ours = layer.apply(
        {"params": {"kernel": jnp.asarray(w)}, "lora": {"kernel": adapter}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: leaf[None], adapter)
    merged = merge(base, {"blocks": {"q_proj": {"kernel": stacked}}})
    np.testing.assert_allclose(
        x @ merged["blocks"]["q_proj"]["kernel"][0], wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_at_zero_it_is_the_base(family):
    model = build(CONFIGS[family])
    params = random_params(model)
    targets = ALL if family == "llada2" else DEFAULT
    lora = lora_init(jax.random.key(0), params, targets)
    # The update is exactly zero. Two compilations may still round the rest differently.
    assert not jnp.any(
        adapted(jnp.ones((2, 32)), jax.tree.map(lambda x: x[0], lora["blocks"]["q_proj"]["kernel"]))
    )
    np.testing.assert_allclose(logits(model, params, lora), logits(model, params, {}), atol=1e-6)
    chex.assert_trees_all_equal(merge(params, lora), params)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_adapted(family):
    model = build(CONFIGS[family])
    params = random_params(model)
    lora = trained(lora_init(jax.random.key(0), params, ALL if family == "llada2" else DEFAULT))
    ours = logits(model, params, lora)
    assert float(jnp.abs(ours - logits(model, params, {})).max()) > 0.1
    merged = jax.jit(merge)(params, lora)
    np.testing.assert_allclose(logits(model, merged, {}), ours, atol=2e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    w, by = params["blocks"]["q_proj"]["kernel"][1], lora["blocks"]["q_proj"]["kernel"]
    np.testing.assert_allclose(
        merged["blocks"]["q_proj"]["kernel"][1], w + 2 * by.a[1] @ by.b[1], atol=1e-5
    )
    chex.assert_trees_all_equal(merged["wte"], params["wte"])


@pytest.mark.slow
def test_merged_goes_out_in_the_hugging_face_format(tmp_path):
    """The written model is the adapted one. Tensors without an adapter keep their bytes."""
    base = load(GOLDEN2)
    lora = trained(lora_init(jax.random.key(0), base.params, ALL))
    write_hf(tmp_path / "merged", merge(base.params, lora), base.config, dtype=jnp.float32)
    back = load(tmp_path / "merged")
    assert back.config.to_hf() == base.config.to_hf()
    np.testing.assert_allclose(
        back.logits(TOKENS), logits(base.model, base.params, lora), atol=5e-4
    )
    assert float(jnp.abs(back.logits(TOKENS) - base.logits(TOKENS)).max()) > 0.1
    half = load(GOLDEN2, "bfloat16")
    write_hf(tmp_path / "half", merge(half.params, lora), half.config)
    ours, source = tensors_of(tmp_path / "half"), tensors_of(GOLDEN2)
    touched = ("_proj.weight", "query_key_value.weight", "attention.dense.weight")
    assert {name for name in source if ours[name] != source[name]} == {
        n for n in source if n.endswith(touched)
    }


@pytest.mark.slow
def test_merging_keeps_the_parameters_dtype():
    model = build(LLADA, jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = random_params(model)
    merged = merge(params, trained(lora_init(jax.random.key(0), params, DEFAULT)))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_adapters_learn(family):
    """Gradients are those of merged matrices by the chain rule, and only adapters change."""
    model = build(CONFIGS[family], remat="full")
    params = random_params(model)
    lora = trained(lora_init(jax.random.key(0), params, ALL if family == "llada2" else DEFAULT))

    def loss(params, lora):
        return (model.apply({"params": params, "lora": lora}, TOKENS) ** 2).mean()

    ours = jax.jit(jax.grad(loss, argnums=1))(params, lora)
    wanted = jax.jit(jax.grad(lambda lora: loss(merge(params, lora), {})))(lora)
    chex.assert_trees_all_close(ours, wanted, atol=1e-4, rtol=1e-3)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(ours))
    tx = optax.adam(1e-2)
    updates, _ = tx.update(ours, tx.init(lora))
    after = optax.apply_updates(lora, updates)
    assert after["blocks"]["q_proj"]["kernel"].scale == 2.0
    assert loss(params, after) < loss(params, lora)


@pytest.mark.slow
@eight
def test_sharded_like_the_matrices():
    mesh = make_mesh("1,2,2")
    model = build(TINY2, jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = random_params(model)
    lora = trained(lora_init(jax.random.key(0), params, ALL))
    where = shardings(lora, mesh, "llada2")
    assert where["blocks"]["q_proj"]["kernel"].a.spec == jax.P(None, "fsdp", None)
    assert where["blocks"]["q_proj"]["kernel"].b.spec == jax.P(None, None, "tensor")
    assert where["blocks"]["experts"]["down"].a.spec == jax.P(None, "tensor", None, None)
    moments = state_shardings(jax.eval_shape(optax.adam(1e-3).init, lora), mesh, "llada2")
    assert moments[0].mu == where
    wanted = logits(model, params, lora)
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(params, shardings(params, mesh, "llada2")),
            jax.device_put(lora, where),
        )
        ours = logits(model, *placed)
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.3)


@pytest.mark.parametrize(
    "fields, part",
    [
        (
            {"targets": ("q_porj",)},
            "LoRA target 'q_porj' is no matrix of this model's layers. They are attn_out, ff_out",
        ),
        ({"targets": ("experts",)}, "LoRA target 'experts' is no matrix of this model's layers"),
        ({"targets": ("wte",)}, "LoRA target 'wte'"),
        ({"targets": ()}, "LoRA has no targets"),
        ({"rank": 0}, "the rank of LoRA is 0, but it must be positive"),
        ({"alpha": 0.0}, "the alpha of LoRA is 0.0, but it must be positive"),
    ],
)
def test_mistakes(fields, part):
    with pytest.raises(UserError) as error:
        lora_init(
            jax.random.key(0), abstract_params(build(LLADA)), dataclasses.replace(DEFAULT, **fields)
        )
    assert part in str(error.value)
