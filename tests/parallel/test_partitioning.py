"""Mesh, logical axes, and equal results of sharded and unsharded models."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.helpers import apply, eight
from xflow_jax.errors import UserError
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import abstract_params, build, init_params
from xflow_jax.models.logical_axes import AXES, check_heads, shardings, state_shardings
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import (
    arrange_slices,
    computation_scope,
    default_mesh,
    make_mesh,
    platform,
)
from xflow_jax.parallel.partitioning import (
    BATCH,
    LOGICAL,
    batch_sharding,
    divides,
    path_name,
    replicated,
)

CONFIG = LLaDAConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=40,
    mlp_hidden_size=48,
    mask_token_id=39,
    eos_token_id=1,
)


def paths(tree):
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_table_is_the_tree():
    """Compares the paths of a model with every bias and an untied head."""
    tree = abstract_params(build(dataclasses.replace(CONFIG, include_bias=True)))
    assert paths(tree) == set(AXES["llada"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert len(AXES["llada"][path_name(path)]) == leaf.ndim


def test_every_logical_axis_has_a_place():
    assert {axis for table in AXES.values() for axes in table.values() for axis in axes} <= set(
        LOGICAL
    )


def test_one_device():
    mesh = make_mesh("1,1,1")
    params = init_params(build(CONFIG), jax.random.key(0))
    placed = jax.device_put(params, shardings(params, mesh, "llada"))
    chex.assert_trees_all_equal(placed, params)


def test_an_unknown_path_is_an_error():
    tree = {"blocks": {"q_porj": {"kernel": jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)}}}
    with pytest.raises(
        KeyError, match="no logical axes for the llada parameter blocks/q_porj/kernel"
    ):
        shardings(tree, make_mesh("1,1,1"), "llada")


@pytest.mark.parametrize("spec", ["1,1", "a,1,1", "1,1,1,1", "0,1,1", "-1,1,1", "", "1.5,1,1"])
def test_bad_meshes(spec):
    with pytest.raises(
        UserError, match="must be three positive sizes, of data, fsdp, tensor, like 1,8,1"
    ):
        make_mesh(spec)


def test_too_few_devices():
    with pytest.raises(UserError, match="mesh 1,64,64 needs 4096 devices, but there are"):
        make_mesh("1,64,64")


@eight
def test_meshes():
    mesh = make_mesh("2,2,2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert make_mesh("1,2,1").size == 2
    assert make_mesh("1,2,1", jax.devices()[2:4]).devices.ravel().tolist() == jax.devices()[2:4]


@eight
def test_specs():
    mesh = make_mesh("2,2,2")
    tree = shardings(abstract_params(build(CONFIG)), mesh, "llada")
    assert tree["blocks"]["q_proj"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert tree["blocks"]["ff_out"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert tree["ff_out"]["kernel"].spec == P("fsdp", "tensor")
    assert tree["wte"]["embedding"].spec == P("tensor", "fsdp")
    assert tree["ln_f"]["scale"].spec == P(None)
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert replicated(mesh).is_fully_replicated


@eight
def test_a_mesh_that_does_not_divide():
    with pytest.raises(UserError) as error:
        shardings(
            abstract_params(build(dataclasses.replace(CONFIG, vocab_size=42))),
            make_mesh("1,1,8"),
            "llada",
        )
    assert str(error.value) == (
        "the mesh axis tensor of 8 does not divide the vocab dimension of ff_out/kernel, "
        "which is 42. The nearest size that does is 7."
    )


@pytest.mark.slow
@eight
@pytest.mark.parametrize("spec", ["1,8,1", "2,4,1", "1,4,2", "2,2,2"])
def test_sharded_is_unsharded(spec):
    model = build(CONFIG)
    params = init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 40)
    mask = jnp.arange(6)[None] >= jnp.arange(8)[:, None] % 3

    def loss(p, tokens, mask):
        return (model.apply({"params": p}, tokens, mask, 2) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    mesh = make_mesh(spec)
    placed = jax.device_put(params, shardings(params, mesh, "llada"))
    data = jax.device_put((tokens, mask), batch_sharding(mesh))
    wanted = step(params, tokens, mask)
    chex.assert_trees_all_close(step(placed, *data), wanted, atol=1e-6)
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(step(placed, *data), wanted, atol=1e-6)


@eight
def test_a_batch_that_the_mesh_does_not_divide_still_runs():
    model = build(CONFIG)
    params = init_params(model, jax.random.key(0))
    mesh = make_mesh("1,8,1")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh, "llada"))
        tokens = jnp.zeros((3, 6), jnp.int32)
        ours = jax.jit(model.apply)({"params": placed}, tokens)
    chex.assert_trees_all_close(ours, apply(model, params, tokens), atol=1e-6)


@eight
def test_layers_gather_weights_not_activations():
    """Under fsdp the weights of each layer are gathered, and never activations [B, L, E]."""
    model = build(dataclasses.replace(CONFIG, n_layers=3))
    mesh = make_mesh("1,8,1")
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_params(model),
        shardings(abstract_params(model), mesh, "llada"),
    )
    tokens = jax.ShapeDtypeStruct((16, 6), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda p, t: model.apply({"params": p}, t)).lower(abstract, tokens).compile()
        )
    assert compiled.output_shardings.spec == P("fsdp")
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    assert gathered and all(not shape.startswith("16,6,32") for shape in gathered)
    assert "all-reduce" not in compiled.as_text()


@eight
def test_optimiser_state_is_sharded_like_its_parameters():
    mesh = make_mesh("1,4,2")
    abstract = abstract_params(build(CONFIG))
    tree = state_shardings(jax.eval_shape(optax.adam(1e-3).init, abstract), mesh, "llada")
    assert tree[0].mu == tree[0].nu == shardings(abstract, mesh, "llada")
    assert tree[0].count.is_fully_replicated
    # Adafactor keeps sums over a stack of matrices. Those of blocks/ff_out/kernel must not be
    # taken for ff_out/kernel.
    sums = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    tree = state_shardings(jax.eval_shape(sums.init, abstract), make_mesh("1,8,1"), "llada")
    assert all(x.is_fully_replicated for x in jax.tree.leaves(tree[0].v_row))


@eight
def test_the_preset_divides_over_a_pod_slice():
    config = PRESETS["llada-8b"]
    tree = shardings(abstract_params(build(config)), make_mesh("1,4,2"), "llada")
    assert tree["blocks"]["ff_proj"]["kernel"].shard_shape((32, 4096, 12288)) == (32, 1024, 6144)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Fake device of several slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_only_data_crosses_slices():
    devices = [Chip(n, n // 4) for n in range(8)]
    array = arrange_slices((4, 1, 2), devices, 2)
    assert array.shape == (4, 1, 2)
    assert [[d.slice_index for d in row] for row in array[:, 0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(
        UserError, match="data of 1 does not divide over 2 slices. The nearest size that does is 2"
    ):
        arrange_slices((1, 4, 2), devices, 2)


@eight
def test_a_mesh_that_cuts_through_heads():
    with pytest.raises(UserError) as error:
        check_heads(CONFIG, make_mesh("1,1,8"))
    assert str(error.value) == (
        "the mesh axis tensor of 8 does not divide the model's 4 heads. "
        "The nearest size that does is 4."
    )
    check_heads(CONFIG, make_mesh("2,1,4"))


@pytest.mark.parametrize("spec, near", [("2,8,1", "2,4,1"), ("16,1,1", "1,8,1")])
@eight
def test_more_devices_than_there_are(spec, near):
    with pytest.raises(
        UserError, match=f"mesh {spec} needs 16 devices, but there are 8. Use {near}"
    ):
        make_mesh(spec)


def test_platform():
    assert platform() == "cpu"
    with jax.set_mesh(make_mesh("1,1,1")):
        assert platform() == "cpu"


@eight
def test_the_default_mesh_is_all_devices_on_fsdp():
    assert default_mesh() == make_mesh() and default_mesh().shape["fsdp"] == jax.device_count()
    assert default_mesh("2,2,1") == make_mesh("2,2,1")
    with pytest.raises(UserError, match="must be three positive sizes"):
        default_mesh("8")


def test_a_single_device_has_no_default_mesh(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    assert default_mesh() is None
    assert default_mesh("1,1,1") == make_mesh("1,1,1")


def traced_product():
    """Returns the program of a matrix product, traced here."""
    return str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, np.dtype("float32")])
def test_float32_programs_have_exact_products(dtype):
    with jax.default_matmul_precision("bfloat16"):
        with computation_scope(None, dtype):
            assert "Precision.HIGHEST" in traced_product()
            assert jax.sharding.get_abstract_mesh().empty
        assert "Precision.HIGHEST" not in traced_product()


def test_bfloat16_programs_keep_the_precision_of_the_caller():
    with jax.default_matmul_precision("bfloat16"), computation_scope(None, jnp.bfloat16):
        assert "Precision.HIGHEST" not in traced_product()


@eight
def test_the_scope_sets_the_mesh_and_restores_it():
    mesh = make_mesh("1,4,2")
    with pytest.raises(ZeroDivisionError), computation_scope(mesh, jnp.bfloat16):
        assert dict(jax.sharding.get_abstract_mesh().shape) == dict(mesh.shape)
        assert divides(8, BATCH) and not divides(6, BATCH)
        raise ZeroDivisionError
    assert jax.sharding.get_abstract_mesh().empty and not divides(8, BATCH)
