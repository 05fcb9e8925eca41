"""LoRA: a low-rank update x A B * alpha / rank beside a frozen matrix.

Adapters are a tree of their own that mirrors the tree of parameters: at the path of each adapted matrix there is an
`Adapter`. A model reads it as the collection "lora", so gradients over it alone are

    jax.grad(lambda lora: loss(model.apply({"params": params, "lora": lora}, ...)))(lora)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.errors import require
from xflow_jax.parallel import path_name

STACKS = ("dense", "blocks")


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices of the layers get an adapter, and of what rank and strength (alpha / rank).

    targets: names in the matrices' paths; by default attention and the dense and shared MLPs. "experts" adds those of
    the routed experts.
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


@struct.dataclass
class Adapter:
    """The update of one matrix, or of a stack of them: a [..., in, rank], b [..., rank, out], times `scale`."""

    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)


def adapted(x: jax.Array, adapter: Adapter) -> jax.Array:
    """What an adapter adds to the product of x [..., in] and its matrix: [..., out], in the dtype of x."""
    return (x @ adapter.a.astype(x.dtype)) @ adapter.b.astype(x.dtype) * adapter.scale


def lora_init(key: jax.Array, params: Any, config: LoraConfig) -> dict[str, Any]:
    """Fresh adapters, float32, for parameters (arrays or jax.ShapeDtypeStruct): b is zero, so they add nothing.

    Raises UserError for a target that names no matrix of the layers, with those that there are.
    """
    leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    matrices = {path: x for path, x in leaves.items() if _adaptable(path)}
    names = {name for path in matrices for name in _names(path)}
    for target in config.targets:
        require(
            target in names,
            f"LoRA target {target!r} is no matrix of this model's layers; {_known(names)}",
        )
    tree: dict[str, Any] = {}
    for number, (path, x) in enumerate(sorted(matrices.items())):
        if not _names(path) & set(config.targets):
            continue
        *leading, fan_in, fan_out = x.shape
        bound = fan_in**-0.5
        shape = (*leading, fan_in, config.rank)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*leading, config.rank, fan_out), jnp.float32)
        _put(tree, path, Adapter(a, b, config.alpha / config.rank))
    return tree


def merge(params: Any, lora: Any) -> Any:
    """Plain parameters, in their dtypes, with the adapters' updates added in float32, one layer at a time."""

    def one(args: tuple[jax.Array, jax.Array, jax.Array], scale: float) -> jax.Array:
        w, a, b = args
        update = jnp.matmul(a, b, precision="highest") * scale
        return (w.astype(jnp.float32) + update).astype(w.dtype)

    def walk(tree: Any, adapters: Any) -> Any:
        if isinstance(adapters, Adapter):
            return jax.lax.map(
                lambda args: one(args, adapters.scale), (tree, adapters.a, adapters.b)
            )
        return {
            name: walk(sub, adapters[name]) if name in adapters else sub
            for name, sub in tree.items()
        }

    return walk(params, lora)


def _adaptable(path: str) -> bool:
    parts = path.split("/")
    return (
        parts[0] in STACKS
        and "router" not in parts
        and (parts[-1] == "kernel" or "experts" in parts)
    )


def _names(path: str) -> set[str]:
    """What a target may say for a matrix: the parts of its path below the stack."""
    return set(path.split("/")[1:]) - {"kernel"}


def _known(names: set[str]) -> str:
    return f"there are {', '.join(sorted(names))}"


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
