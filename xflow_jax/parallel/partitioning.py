"""The mesh, the table of logical axes of every parameter, and shardings of a tree from the two.

Nothing here is needed on one device: a program that makes no mesh makes no call of this module.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xflow_jax.errors import UserError
from xflow_jax.parallel.mesh import nearest_divisor

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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, ...]: the batch over data and fsdp, all else whole."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, P())


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
    return (
        not mesh.empty
        and set(axes) <= set(mesh.axis_names)
        and size % math.prod(mesh.shape[a] for a in axes) == 0
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_sharding(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh
) -> NamedSharding:
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, but the table has the axes {axes}")
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        target = LOGICAL[axis]
        parts = 1 if target is None else mesh.shape[target]
        if size % parts:
            near = nearest_divisor(size, parts)
            raise UserError(
                f"the mesh axis {target} of {parts} does not divide the {axis} dimension of {name}, which is {size}; "
                f"the nearest size that does is {near}"
            )
        spec.append(target)
    return NamedSharding(mesh, P(*spec))
