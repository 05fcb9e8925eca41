"""The mesh, the table of logical axes of every parameter, and shardings of a tree from the two.

Nothing here is needed on one device: a program that makes no mesh makes no call of this module.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from xflow_jax.errors import UserError
from xflow_jax.parallel import leaf_sharding, nearest_divisor, path_name, replicated

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


def check_heads(config: Any, mesh: Mesh) -> None:
    """UserError where the tensor axis of a mesh would cut through a head of the model."""
    heads = config.num_heads
    parts = mesh.shape["tensor"]
    if heads % parts:
        raise UserError(
            f"the mesh axis tensor of {parts} does not divide the model's {heads} heads; "
            f"the nearest size that does is {nearest_divisor(heads, parts)}"
        )


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
        return leaf_sharding(name, x.shape, axes, mesh)

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
                return (
                    leaf_sharding("/".join(parts), x.shape, axes, mesh)
                    if like
                    else replicated(mesh)
                )
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)
