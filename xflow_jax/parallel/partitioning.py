"""Sharding of arrays: logical axes, and constraints inside programs.

The logical axes of each parameter are in models/logical_axes.py.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xflow_jax.errors import UserError
from xflow_jax.parallel.mesh import nearest_divisor

BATCH = ("data", "fsdp")  # axes of the mesh that share the batch


# logical axis -> axis of the mesh, or None if it is not sharded
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [B, ...] over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations sharded over the batch.

    Without the constraint the compiler follows the sharding of the parameters, and every device
    computes the complete batch.

    Args:
        x: activations [B, ...].

    Returns:
        x, constrained if a mesh is set (`jax.set_mesh`) that divides B.
    """
    return jax.lax.with_sharding_constraint(x, P(BATCH)) if divides(x.shape[0], BATCH) else x


def constrain_lookup(x: jax.Array) -> jax.Array:
    """Moves activations of an embedding lookup to the sharding of the batch.

    A lookup returns rows that are sharded over E, as the embedding table is. A constraint to that
    sharding makes the move one all-to-all. Without it the compiler replicates the activations or
    gathers the complete table.

    Args:
        x: activations [B, L, E].

    Returns:
        x, constrained if a mesh is set (`jax.set_mesh`) that divides B.
    """
    embed = LOGICAL["embed"]
    if embed and divides(x.shape[0], BATCH) and divides(x.shape[-1], (embed,)):
        x = jax.lax.with_sharding_constraint(x, P("data", None, embed))
    return constrain_batch(x)


def divides(size: int, axes: tuple[str, ...]) -> bool:
    """Returns True if axes of the current mesh divide `size`.

    Without a mesh (`jax.set_mesh`) it is False.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (
        not mesh.empty
        and set(axes) <= set(mesh.axis_names)
        and size % math.prod(mesh.shape[a] for a in axes) == 0
    )


def count_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the parts of a batch on a mesh, 1 without one.

    Args:
        mesh: the mesh, or None for one device.
    """
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)


def batch_shards(size: int) -> int:
    """Returns the parts of a batch on the current mesh.

    It is 1 without a mesh (`jax.set_mesh`), or if the mesh does not divide the batch.

    Args:
        size: rows of the batch.
    """
    return count_shards(jax.sharding.get_abstract_mesh()) if divides(size, BATCH) else 1


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Returns a key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_sharding(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh
) -> NamedSharding:
    """Returns the sharding of a parameter with the given logical axes.

    Args:
        name: path of the parameter, for error messages.
        shape: its shape.
        axes: the logical axis of each dimension.
        mesh: the mesh.

    Returns:
        The sharding.

    Raises:
        ValueError: if `axes` and `shape` have different lengths.
        UserError: if the mesh does not divide a dimension.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, but the table has the axes {axes}")
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        target = LOGICAL[axis]
        parts = 1 if target is None else mesh.shape[target]
        if size % parts:
            raise UserError(
                f"the mesh axis {target} of {parts} does not divide the {axis} dimension of "
                f"{name}, which is {size}. "
                f"The nearest size that does is {nearest_divisor(size, parts)}."
            )
        spec.append(target)
    return NamedSharding(mesh, P(*spec))
