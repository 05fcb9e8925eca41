"""Logical axes of every parameter, and shardings on a mesh.

A program on one device needs nothing of this module.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from xflow_jax.errors import UserError
from xflow_jax.models.quantization import SCALE
from xflow_jax.parallel import leaf_sharding, nearest_divisor, path_name, replicated
from xflow_jax.types import ModelConfig, PyTree

_ATTENTION: dict[str, tuple[str, ...]] = {
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
_MLP: dict[str, tuple[str, ...]] = {
    "ff_proj/kernel": ("layer", "embed", "mlp"),
    "up_proj/kernel": ("layer", "embed", "mlp"),
    "ff_out/kernel": ("layer", "mlp", "embed"),
}
# Dense layers, with every bias and norm that a family has.
_DENSE: dict[str, tuple[str, ...]] = {
    "wte/embedding": ("vocab", "embed"),
    **{f"blocks/{path}": axes for path, axes in (_ATTENTION | _MLP).items()},
    "blocks/ff_proj/bias": ("layer", "mlp"),
    "blocks/up_proj/bias": ("layer", "mlp"),
    "blocks/ff_out/bias": ("layer", "norm"),
    "ln_f/scale": ("norm",),
    "ff_out/kernel": ("embed", "vocab"),
}
_SPARSE: dict[str, tuple[str, ...]] = {
    "wte/embedding": ("vocab", "embed"),
    **{f"dense/{path}": axes for path, axes in (_ATTENTION | _MLP).items()},
    **{f"blocks/{path}": axes for path, axes in _ATTENTION.items()},
    "blocks/router/kernel": ("layer", "embed", "norm"),
    "blocks/router/bias": ("layer", "norm"),
    "blocks/experts/gate": ("layer", "expert", "embed", "norm"),
    "blocks/experts/up": ("layer", "expert", "embed", "norm"),
    "blocks/experts/down": ("layer", "expert", "norm", "embed"),
    **{f"blocks/shared/{path}": axes for path, axes in _MLP.items()},
    "ln_f/scale": ("norm",),
    "ff_out/kernel": ("embed", "vocab"),
}
_HEAD_NORMS = ("blocks/q_norm/scale", "blocks/k_norm/scale")
# family -> path of a parameter -> logical axis of each dimension
AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "llada": {
        **{path: axes for path, axes in _DENSE.items() if path not in _HEAD_NORMS},
        "ff_out/bias": ("vocab",),
    },
    "illada": _DENSE,
    "dream": _DENSE,
    "sdar": _DENSE,
    "fast_dllm": _DENSE,
    "llada2": _SPARSE,
    "lladamoe": _SPARSE,
}


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError if the mesh axis `tensor` would split a head."""
    heads, parts = config.num_heads, mesh.shape["tensor"]
    if heads % parts:
        raise UserError(
            f"the mesh axis tensor of {parts} does not divide the model's {heads} heads. "
            f"The nearest size that does is {nearest_divisor(heads, parts)}."
        )


def shardings(abstract: PyTree, mesh: Mesh, family: str) -> PyTree:
    """Places a tree of parameters or adapters on a mesh.

    Adapters (lora.py) and scales (quantization.py) are sharded like their matrices.

    Args:
        abstract: the tree, of arrays or jax.ShapeDtypeStruct.
        mesh: the mesh.
        family: family of the model.

    Returns:
        The NamedSharding of each leaf, as a tree like the given one.

    Raises:
        KeyError: if the family's table lacks a path.
        UserError: if the mesh does not divide a dimension.
    """

    def leaf(path: KeyPath, x: ArrayLike | jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        axes = _axes(name, family)
        if axes is None:
            raise KeyError(f"no logical axes for the {family} parameter {name}")
        return leaf_sharding(name, jnp.shape(x), axes, mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _axes(name: str, family: str) -> tuple[str, ...] | None:
    """Returns the axes of a parameter, an adapter or scales."""
    table = AXES[family]
    if name.endswith(SCALE) and name.removesuffix(SCALE) in table:
        *leading, _, fan_out = table[name.removesuffix(SCALE)]
        return (*leading, fan_out)
    matrix, _, part = name.rpartition("/")
    if name in table or matrix not in table:
        return table.get(name)
    *leading, fan_in, fan_out = table[matrix]
    return {"a": (*leading, fan_in, "rank"), "b": (*leading, "rank", fan_out)}.get(part)


def state_shardings(abstract: PyTree, mesh: Mesh, family: str) -> PyTree:
    """Places a training state on a mesh.

    A leaf whose path ends like a parameter's is sharded like that parameter. These are what
    optimizers keep for a parameter (moments, averages). Everything else (counters, reduced
    statistics) is replicated.

    Args:
        abstract: the state, of arrays or jax.ShapeDtypeStruct.
        mesh: the mesh.
        family: family of the model.

    Returns:
        The NamedSharding of each leaf, as a tree like the given one.

    Raises:
        UserError: if the mesh does not divide a dimension.
    """

    def leaf(path: KeyPath, x: ArrayLike | jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        parts, shape = name.split("/"), jnp.shape(x)
        # The longest end first: blocks/ff_out/kernel is not ff_out/kernel.
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        axes = next(filter(None, (_axes(end, family) for end in ends)), None)
        # A sum over rows or columns has fewer dimensions than its parameter.
        if axes is None or len(axes) != len(shape):
            return replicated(mesh)
        return leaf_sharding(name, shape, axes, mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)
