"""LoRA: low-rank updates A B * alpha / rank beside frozen matrices.

Adapters are a tree of their own that mirrors the tree of parameters. At the path of each adapted
matrix there is an `Adapter`. A model reads it as the collection "lora", so gradients over it alone
are

    jax.grad(lambda lora: loss(model.apply({"params": params, "lora": lora}, ...)))(lora)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from xflow_jax.errors import require
from xflow_jax.models.quantization import is_layer_matrix, require_float
from xflow_jax.types import Array, Float, Key, Params


@dataclass(frozen=True)
class LoraConfig:
    """Selection and strength of adapters.

    Attributes:
        rank: width between A and B.
        alpha: the update is scaled by alpha / rank.
        targets: names in the matrices' paths. The default is attention with the dense and shared
            MLPs, as far as the model has them. "experts" adds the routed experts.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "attn_out",
        "ff_proj",
        "up_proj",
        "ff_out",
    )

    def __post_init__(self) -> None:
        require(self.rank > 0, f"the rank of LoRA is {self.rank}, but it must be positive")
        require(self.alpha > 0, f"the alpha of LoRA is {self.alpha}, but it must be positive")
        require(bool(self.targets), "LoRA has no targets")


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class Adapter:
    """Update of one matrix, or of a stack of them.

    Attributes:
        a: [..., in, rank].
        b: [..., rank, out].
        scale: factor of the update.
    """

    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)


def adapted(x: Float[Array, "*B E"], adapter: Adapter) -> Float[Array, "*B F"]:
    """Computes an adapter's update of the product of x and its matrix.

    Args:
        x: [..., in].
        adapter: the adapter.

    Returns:
        [..., out] in the dtype of x.
    """
    return (x @ adapter.a.astype(x.dtype)) @ adapter.b.astype(x.dtype) * adapter.scale


def lora_init(key: Key[Array, ""], params: Params, config: LoraConfig) -> dict[str, Any]:
    """Draws fresh adapters in float32. They add nothing, since b is zero.

    Args:
        key: the random key.
        params: the parameters, as arrays or jax.ShapeDtypeStruct.
        config: the selection of matrices, and the rank.

    Returns:
        The tree of adapters.

    Raises:
        UserError: if a target names no matrix of the layers, or if these are int8.
    """
    require_float(params, "LoRA")
    leaves = flatten_dict(params, sep="/")
    matrices = {path: x for path, x in leaves.items() if is_layer_matrix(path)}
    names = {name for path in matrices for name in _target_names(path)}
    # The default has MLPs that some mixtures of experts lack.
    for target in config.targets if config.targets != LoraConfig.targets else ():
        require(
            target in names,
            f"LoRA target {target!r} is no matrix of this model's layers. "
            f"They are {', '.join(sorted(names))}.",
        )
    adapters = {}
    for number, (path, x) in enumerate(sorted(matrices.items())):
        if not _target_names(path) & set(config.targets):
            continue
        *leading, fan_in, fan_out = x.shape
        bound = fan_in**-0.5
        shape = (*leading, fan_in, config.rank)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*leading, config.rank, fan_out), jnp.float32)
        adapters[path] = Adapter(a, b, config.alpha / config.rank)
    return unflatten_dict(adapters, sep="/")


def merge(params: Params, lora: Params) -> dict[str, Any]:
    """Adds the adapters' updates to the matrices.

    The sums are computed in float32, one layer at a time.

    Args:
        params: the parameters.
        lora: the tree of adapters.

    Returns:
        Plain parameters in their own dtypes.

    Raises:
        UserError: if the matrices are int8.
    """
    require_float(params, "LoRA")
    merged = flatten_dict(params, sep="/")
    for path, adapter in flatten_dict(lora, sep="/").items():
        merged[path] = _merge_matrix(merged[path], adapter)
    return unflatten_dict(merged, sep="/")


def _merge_matrix(matrices: Float[Array, "*L E F"], adapter: Adapter) -> Float[Array, "*L E F"]:
    def add_update(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        w, a, b = layer
        update = jnp.matmul(a, b, precision="highest") * adapter.scale
        return (w.astype(jnp.float32) + update).astype(w.dtype)

    return jax.lax.map(add_update, (matrices, adapter.a, adapter.b))


def _target_names(path: str) -> set[str]:
    """Returns the targets that select a matrix: parts of its path."""
    return set(path.split("/")[1:]) - {"kernel"}
