"""The mesh, the table of logical axes of every parameter, and shardings of a tree from the two.

Nothing here is needed on one device: a program that makes no mesh makes no call of this module.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xflow_jax.strict import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# logical axis -> axis of the mesh, None = not sharded
LOGICAL: dict[str, str | None] = {
    "layer": None,
    "norm": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "tensor",
    "rank": None,
}

_LLADA2_ATTENTION: dict[str, tuple[str, ...]] = {
    "attn_norm/scale": ("layer", "norm"),
    "q_proj/kernel": ("layer", "embed", "heads"),
    "q_proj/bias": ("layer", "heads"),
    "k_proj/kernel": ("layer", "embed", "kv_heads"),
    "k_proj/bias": ("layer", "kv_heads"),
    "v_proj/kernel": ("layer", "embed", "kv_heads"),
    "v_proj/bias": ("layer", "kv_heads"),
    "q_norm/scale": ("layer", "norm"),
    "k_norm/scale": ("layer", "norm"),
    "attn_out/kernel": ("layer", "heads", "embed"),
    "attn_out/bias": ("layer", "norm"),
    "ff_norm/scale": ("layer", "norm"),
}
_LLADA2_MLP: dict[str, tuple[str, ...]] = {
    "ff_proj/kernel": ("layer", "embed", "mlp"),
    "up_proj/kernel": ("layer", "embed", "mlp"),
    "ff_out/kernel": ("layer", "mlp", "embed"),
}

# family -> path of a parameter -> logical axis of each dimension
AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "llada": {
        "wte/embedding": ("vocab", "embed"),
        "blocks/attn_norm/scale": ("layer", "norm"),
        "blocks/q_proj/kernel": ("layer", "embed", "heads"),
        "blocks/q_proj/bias": ("layer", "heads"),
        "blocks/k_proj/kernel": ("layer", "embed", "kv_heads"),
        "blocks/k_proj/bias": ("layer", "kv_heads"),
        "blocks/v_proj/kernel": ("layer", "embed", "kv_heads"),
        "blocks/v_proj/bias": ("layer", "kv_heads"),
        "blocks/attn_out/kernel": ("layer", "heads", "embed"),
        "blocks/attn_out/bias": ("layer", "norm"),
        "blocks/ff_norm/scale": ("layer", "norm"),
        "blocks/ff_proj/kernel": ("layer", "embed", "mlp"),
        "blocks/ff_proj/bias": ("layer", "mlp"),
        "blocks/up_proj/kernel": ("layer", "embed", "mlp"),
        "blocks/up_proj/bias": ("layer", "mlp"),
        "blocks/ff_out/kernel": ("layer", "mlp", "embed"),
        "blocks/ff_out/bias": ("layer", "norm"),
        "ln_f/scale": ("norm",),
        "ff_out/kernel": ("embed", "vocab"),
        "ff_out/bias": ("vocab",),
    },
    "llada2": {
        "wte/embedding": ("vocab", "embed"),
        **{f"dense/{path}": axes for path, axes in (_LLADA2_ATTENTION | _LLADA2_MLP).items()},
        **{f"blocks/{path}": axes for path, axes in _LLADA2_ATTENTION.items()},
        "blocks/router/kernel": ("layer", "embed", "norm"),
        "blocks/router/bias": ("layer", "norm"),
        "blocks/experts/gate": ("layer", "expert", "embed", "norm"),
        "blocks/experts/up": ("layer", "expert", "embed", "norm"),
        "blocks/experts/down": ("layer", "expert", "norm", "embed"),
        **{f"blocks/shared/{path}": axes for path, axes in _LLADA2_MLP.items()},
        "ln_f/scale": ("norm",),
        "ff_out/kernel": ("embed", "vocab"),
    },
}


def make_mesh(spec: str | None = None, devices: list[Any] | None = None) -> Mesh:
    """The mesh of axes data, fsdp and tensor, all of type Auto; the only place where a mesh is made.

    spec: their sizes, like "1,8,1"; None = all devices on fsdp. Fewer devices than there are may be asked for by a
    single process. Of several TPU slices only `data` crosses the network between them. Raises UserError for anything
    but three positive integers, for more devices than there are, and for slices that do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    try:
        shape = (1, len(devices), 1) if spec is None else tuple(int(size) for size in spec.split(","))
    except ValueError:
        shape = ()
    if len(shape) != len(MESH_AXES) or min(shape) < 1:
        raise UserError(f"mesh {spec!r} must be three positive sizes, of {', '.join(MESH_AXES)}, like 1,8,1")
    wanted = math.prod(shape)
    if wanted > len(devices) or (wanted < len(devices) and jax.process_count() > 1):
        near = f"{shape[0]},{max(len(devices) // (shape[0] * shape[2]), 1)},{shape[2]}"
        fits = math.prod(int(n) for n in near.split(",")) == len(devices)
        hint = f"use {near if fits else f'1,{len(devices)},1'}"
        raise UserError(f"mesh {spec} needs {wanted} devices, but there are {len(devices)}; {hint}")
    # Stated, since Explicit axes may become the default, under which a gather from a sharded vocabulary fails.
    types = (AxisType.Auto,) * len(shape)
    slices = {getattr(device, "slice_index", None) for device in devices[:wanted]} - {None}
    if len(slices) > 1:
        return Mesh(over_slices(shape, devices[:wanted], len(slices)), MESH_AXES, axis_types=types)
    # An axis of the mesh may need half of one of the torus, which jax.make_mesh does not cut.
    array = mesh_utils.create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=types)


def over_slices(shape: tuple[int, int, int], devices: list[Any], slices: int) -> np.ndarray:
    """The devices of several slices as an array of the mesh's shape: only `data` crosses the network between them.

    Raises UserError where the slices do not divide `data`.
    """
    data, *rest = shape
    if data % slices:
        near = max(data // slices, 1) * slices
        raise UserError(f"the mesh axis data of {data} does not divide over {slices} slices; the nearest is {near}")
    return mesh_utils.create_hybrid_device_mesh((data // slices, *rest), (slices, 1, 1), devices)


def check_heads(config: Any, mesh: Mesh) -> None:
    """UserError where the tensor axis of a mesh would cut through a head of the model."""
    heads = config.num_attention_heads if config.family == "llada2" else config.n_heads
    parts = mesh.shape["tensor"]
    if heads % parts:
        raise UserError(
            f"the mesh axis tensor of {parts} does not divide the model's {heads} heads; "
            f"the nearest size that does is {_nearest_divisor(heads, parts)}"
        )


def _nearest_divisor(size: int, parts: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - parts), n))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, ...]: the batch over data and fsdp, all else whole."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, P())


def shardings(abstract: Any, mesh: Mesh, family: str) -> Any:
    """The NamedSharding of each leaf of a tree of parameters (arrays or jax.ShapeDtypeStruct), as a tree like it.

    Trees of adapters (models/lora.py) are sharded as their matrices are. Raises KeyError for a path that the family's
    table lacks, UserError for a dimension that the mesh does not divide.
    """

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = path_name(path)
        axes = _axes(name, family)
        if axes is None:
            raise KeyError(f"no logical axes for the {family} parameter {name}")
        return _sharding(name, x.shape, axes, mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _axes(name: str, family: str) -> tuple[str, ...] | None:
    """The logical axes of a parameter, or of the part a [.., in, rank] or b [.., rank, out] of its adapter."""
    table = AXES[family]
    matrix, _, part = name.rpartition("/")
    if name in table or matrix not in table:
        return table.get(name)
    *leading, fan_in, fan_out = table[matrix]
    return {"a": (*leading, fan_in, "rank"), "b": (*leading, "rank", fan_out)}.get(part)


def state_shardings(abstract: Any, mesh: Mesh, family: str) -> Any:
    """As `shardings`, of a training state: leaves whose path ends like a parameter's are sharded like that parameter.

    That is what optimisers keep for a parameter (moments, averages); all else (counters, reduced statistics) is whole.
    """

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        # The longest end first: blocks/ff_out/kernel is not ff_out/kernel.
        for start in range(len(parts)):
            axes = _axes("/".join(parts[start:]), family)
            if axes is not None:
                like = len(axes) == len(x.shape)  # a sum over rows or columns is not
                return _sharding("/".join(parts), x.shape, axes, mesh) if like else replicated(mesh)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] sharded over the batch where a mesh is set (`jax.set_mesh`) that divides it.

    Without it the compiler follows the parameters' sharding instead, and every device computes the whole batch.
    """
    return jax.lax.with_sharding_constraint(x, P(BATCH)) if divides(x.shape[0], BATCH) else x


def constrain_lookup(x: jax.Array) -> jax.Array:
    """Activations [B, L, E] just read from the embedding table, moved to the batch's sharding in a cheap way.

    The rows come out sharded over E, as the table is; saying so makes the step from there one all-to-all. Left alone,
    the compiler replicates the activations or gathers the whole table.
    """
    if divides(x.shape[0], BATCH) and divides(x.shape[-1], (LOGICAL["embed"],)):
        x = jax.lax.with_sharding_constraint(x, P("data", None, LOGICAL["embed"]))
    return constrain_batch(x)


def divides(size: int, axes: tuple[str, ...]) -> bool:
    """Whether there is a mesh set (`jax.set_mesh`) whose axes of these names divide a dimension of `size`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(axes) <= set(mesh.axis_names) and size % math.prod(mesh.shape[a] for a in axes) == 0


def platform() -> str:
    """What programs are being made for: the platform of the mesh that is set, whose devices need not be here, or else
    the default backend: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or not device.platform else device.platform


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sharding(name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> NamedSharding:
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, but the table has the axes {axes}")
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        target = LOGICAL[axis]
        parts = 1 if target is None else mesh.shape[target]
        if size % parts:
            near = _nearest_divisor(size, parts)
            raise UserError(
                f"the mesh axis {target} of {parts} does not divide the {axis} dimension of {name}, which is {size}; "
                f"the nearest size that does is {near}"
            )
        spec.append(target)
    return NamedSharding(mesh, P(*spec))
