"""Which tensors of a Hugging Face checkpoint make which parameter: a table per family, read in both directions.

The shapes are not here: they follow from the tree of parameters (`models.abstract_params`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from xflow_jax.parallel import path_name


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """What one parameter is made of.

    tensor: the tensors' name; {layer} and {expert} in it count along the parameter's leading axes, in this order,
    layers from `first_layer` on. transpose: matrices are [out, in] there, [in, out] here. Parameters with the same
    `tensor` share it: its output rows are theirs, one after the other in the table's order.
    """

    tensor: str
    transpose: bool = False
    first_layer: int = 0


WeightTable = dict[str, TensorSource]


def _llada(config: Any) -> WeightTable:
    top, block = "model.transformer.", "model.transformer.blocks.{layer}."
    table = {"wte/embedding": TensorSource(top + "wte.weight")}
    for norm in ("attn_norm", "ff_norm"):
        table[f"blocks/{norm}/scale"] = TensorSource(f"{block}{norm}.weight")
    for linear in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
        table[f"blocks/{linear}/kernel"] = TensorSource(f"{block}{linear}.weight", transpose=True)
        table[f"blocks/{linear}/bias"] = TensorSource(f"{block}{linear}.bias")
    table["ln_f/scale"] = TensorSource(top + "ln_f.weight")
    table["ff_out/kernel"] = TensorSource(top + "ff_out.weight", transpose=True)
    table["ff_out/bias"] = TensorSource(top + "ff_out.bias")
    return table


_MLP = {"ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj"}


# Of LLaDA2.0, parameters of a layer -> tensors of a layer; q, k and v are one tensor, in this order.
_LLADA2_ATTENTION = {
    "attn_norm/scale": "input_layernorm.weight",
    "ff_norm/scale": "post_attention_layernorm.weight",
    "q_norm/scale": "attention.query_layernorm.weight",
    "k_norm/scale": "attention.key_layernorm.weight",
    **{
        f"{name}/kernel": "attention.query_key_value.weight"
        for name in ("q_proj", "k_proj", "v_proj")
    },
    **{f"{name}/bias": "attention.query_key_value.bias" for name in ("q_proj", "k_proj", "v_proj")},
    "attn_out/kernel": "attention.dense.weight",
    "attn_out/bias": "attention.dense.bias",
}


_LLADA2_DENSE = {f"{ours}/kernel": f"mlp.{its}.weight" for ours, its in _MLP.items()}


_LLADA2_EXPERTS = {
    "router/kernel": "mlp.gate.weight",
    "router/bias": "mlp.gate.expert_bias",
    **{
        f"experts/{name}": f"mlp.experts.{{expert}}.{name}_proj.weight"
        for name in ("gate", "up", "down")
    },
    **{f"shared/{ours}/kernel": f"mlp.shared_experts.{its}.weight" for ours, its in _MLP.items()},
}


# A layer's experts in one tensor [X, out, in], as inclusionAI/dFactory's moe_convertor.py merges them.
_LLADA2_STACKED = {f"experts/{name}": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}


def _llada2(config: Any, experts: dict[str, str] = _LLADA2_EXPERTS) -> WeightTable:
    table = {"wte/embedding": TensorSource("model.word_embeddings.weight")}
    for stack, first, names in (
        ("dense", 0, _LLADA2_DENSE),
        ("blocks", config.num_dense_layers, experts),
    ):
        for path, tensor in (_LLADA2_ATTENTION | names).items():
            matrix = path.endswith("/kernel") or path.startswith("experts/")
            table[f"{stack}/{path}"] = TensorSource("model.layers.{layer}." + tensor, matrix, first)
    table["ln_f/scale"] = TensorSource("model.norm.weight")
    table["ff_out/kernel"] = TensorSource("lm_head.weight", transpose=True)
    return table


# family -> variant -> configuration -> table: it may name more parameters than a configuration has (biases). Variants
# are other tensors for the same parameters.
WEIGHT_TABLES: dict[str, dict[str, Callable[[Any], WeightTable]]] = {
    "llada": {"llada": _llada},
    "llada2": {
        "experts": _llada2,
        "stacked": partial(_llada2, experts=_LLADA2_EXPERTS | _LLADA2_STACKED),
    },
}


# model_type in a config.json -> the variant that its code reads; of all others it is the family's first.
WRITTEN: dict[str, str] = {"llada2_moe_veomni": "stacked"}


# family -> tensors that carry no parameters (buffers that the code computes by itself) and are passed over when read.
IGNORED: dict[str, str] = {
    "llada": r"model\.transformer\.(blocks\.\d+\.)?rotary_emb\.inv_freq",
    "llada2": r"model\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
}


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """A tensor, or some of its output rows, as the part at `index` of a parameter's leading axes."""

    tensor: str
    index: tuple[int, ...]
    rows: tuple[int, int]
    transpose: bool

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The view of the whole tensor that is this part of the parameter: to read from, or to write to."""
        rows = slice(*self.rows)
        part = tensor[rows] if tensor.ndim < 3 else tensor[:, rows]
        return part.swapaxes(-1, -2) if self.transpose else part


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """A table applied to a tree of parameters: each parameter's pieces, and the shape of each tensor."""

    family: str
    variant: str
    leaves: dict[str, list[TensorSlice]]
    tensors: dict[str, tuple[int, ...]]

    def ignores(self, tensor: str) -> bool:
        """Whether a checkpoint may hold this tensor though no parameter is made of it."""
        return re.fullmatch(IGNORED.get(self.family, r"(?!)"), tensor) is not None

    def groups(self) -> Iterator[list[str]]:
        """The parameters, those that share tensors together."""
        seen: set[str] = set()
        for path, pieces in self.leaves.items():
            if path not in seen:
                group = [
                    p for p, other in self.leaves.items() if other[0].tensor == pieces[0].tensor
                ]
                seen.update(group)
                yield group


def map_weights(
    config: Any, abstract: Any, names: Collection[str] = (), variant: str | None = None
) -> WeightMapping:
    """The plan for a tree of parameters (anything with shapes) of a configuration's family.

    The variant, where it is not given, is the one that fits the names of the tensors at hand best, or without names the
    one that the configuration's own code reads. Raises KeyError for a parameter that the table does not know.
    """
    variants = WEIGHT_TABLES[config.family]
    if variant is None and not names:
        variant = WRITTEN.get(config.to_hf()["model_type"], next(iter(variants)))
    if variant is not None:
        return _map_variant(config, variant, abstract)
    plans = (_map_variant(config, name, abstract) for name in variants)
    return max(plans, key=lambda plan: len(plan.tensors.keys() & set(names)))


def _map_variant(config: Any, variant: str, abstract: Any) -> WeightMapping:
    table = WEIGHT_TABLES[config.family][variant](config)
    shapes = {
        path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(abstract)
    }
    if unknown := shapes.keys() - table.keys():
        raise KeyError(f"no tensors for the {config.family} parameter {sorted(unknown)[0]}")
    plan = WeightMapping(config.family, variant, {path: [] for path in shapes}, {})
    for path, leaf in table.items():
        if path not in shapes:
            continue
        stacked = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in leaf.tensor]
        leading, part = shapes[path][: len(stacked)], shapes[path][len(stacked) :]
        if leaf.transpose:
            part = (*part[:-2], part[-1], part[-2])
        axis = max(len(part) - 2, 0)  # of the output rows
        for index in np.ndindex(*leading):
            counts = dict(zip(stacked, index, strict=True))
            if "layer" in counts:
                counts["layer"] += leaf.first_layer
            name = leaf.tensor.format(**counts)
            before = plan.tensors[name][axis] if name in plan.tensors else 0
            rows = (before, before + part[axis])
            plan.tensors[name] = (*part[:axis], rows[1], *part[axis + 1 :])
            plan.leaves[path].append(TensorSlice(name, index, rows, leaf.transpose))
    return plan
