"""Mapping between Hugging Face tensors and parameters, with one table per family.

The same table serves reading and writing. It holds no shapes: these follow from the tree of
parameters (`models.abstract_params`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

import jax
import numpy as np

from xflow_jax.models import LLaDA2Config, LLaDAMoEConfig
from xflow_jax.parallel import path_name
from xflow_jax.types import ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Tensors that make up one parameter.

    Parameters with the same `tensor` share it. Its output rows belong to them one after the other,
    in the order of the table.

    Attributes:
        tensor: name of the tensors. {layer} and {expert} in it count along the leading axes of the
            parameter, in this order.
        transpose: True if matrices are [out, in] in the tensor. Parameters are [in, out].
        first_layer: number of the first layer.
    """

    tensor: str
    transpose: bool = False
    first_layer: int = 0


WeightTable = dict[str, TensorSource]  # path of a parameter -> its tensors


def _llada(config: ModelConfig) -> WeightTable:
    top, block = "model.transformer.", "model.transformer.blocks.{layer}."
    weights = {"wte/embedding": TensorSource(top + "wte.weight")}
    for norm in ("attn_norm", "ff_norm"):
        weights[f"blocks/{norm}/scale"] = TensorSource(f"{block}{norm}.weight")
    for linear in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
        weights[f"blocks/{linear}/kernel"] = TensorSource(f"{block}{linear}.weight", transpose=True)
        weights[f"blocks/{linear}/bias"] = TensorSource(f"{block}{linear}.bias")
    weights["ln_f/scale"] = TensorSource(top + "ln_f.weight")
    weights["ff_out/kernel"] = TensorSource(top + "ff_out.weight", transpose=True)
    weights["ff_out/bias"] = TensorSource(top + "ff_out.bias")
    return weights


_MLP = {"ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj"}

# Llama and its kin: parameter of a layer -> tensor of a layer.
_LLAMA_ATTENTION = {
    "attn_norm/scale": "input_layernorm.weight",
    "ff_norm/scale": "post_attention_layernorm.weight",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    **{
        f"{ours}/{part}": f"self_attn.{its}.{theirs}"
        for ours, its in (
            ("q_proj", "q_proj"),
            ("k_proj", "k_proj"),
            ("v_proj", "v_proj"),
            ("attn_out", "o_proj"),
        )
        for part, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
_LLAMA_MLP = {
    f"{ours}/{part}": f"mlp.{its}.{theirs}"
    for ours, its in _MLP.items()
    for part, theirs in (("kernel", "weight"), ("bias", "bias"))
}


_LLAMA_ENDS: WeightTable = {
    "wte/embedding": TensorSource("model.embed_tokens.weight"),
    "ln_f/scale": TensorSource("model.norm.weight"),
    "ff_out/kernel": TensorSource("lm_head.weight", transpose=True),
}


def _llama(config: ModelConfig) -> WeightTable:
    return _LLAMA_ENDS | _layers("blocks", _LLAMA_ATTENTION | _LLAMA_MLP)


def _layers(stack: str, names: dict[str, str], first: int = 0) -> WeightTable:
    """Builds the entries of a stack from those of one layer."""
    return {
        f"{stack}/{path}": TensorSource(
            "model.layers.{layer}." + tensor,
            path.endswith("/kernel") or path.startswith("experts/"),
            first,
        )
        for path, tensor in names.items()
    }


# LLaDA2.0: parameter of a layer -> tensor of a layer. q, k and v are one tensor, in this order.
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


# One tensor [X, out, in] for all experts of a layer, as inclusionAI/dFactory's moe_convertor.py
# merges them.
_LLADA2_STACKED = {f"experts/{name}": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}


def _llada2(config: LLaDA2Config, experts: dict[str, str] = _LLADA2_EXPERTS) -> WeightTable:
    weights = {"wte/embedding": TensorSource("model.word_embeddings.weight")}
    weights |= _layers("dense", _LLADA2_ATTENTION | _LLADA2_DENSE)
    weights |= _layers("blocks", _LLADA2_ATTENTION | experts, config.num_dense_layers)
    weights["ln_f/scale"] = TensorSource("model.norm.weight")
    weights["ff_out/kernel"] = TensorSource("lm_head.weight", transpose=True)
    return weights


# The shared expert stands beside the MLP, not in it.
_LLADAMOE_EXPERTS = _LLADA2_EXPERTS | {
    "router/bias": "mlp.expert_bias",
    **{f"shared/{ours}/kernel": f"shared_expert.{its}.weight" for ours, its in _MLP.items()},
}


def _lladamoe(config: LLaDAMoEConfig) -> WeightTable:
    first = config.num_dense_layers
    dense = _layers("dense", _LLAMA_ATTENTION | _LLADA2_DENSE)
    return _LLAMA_ENDS | dense | _layers("blocks", _LLAMA_ATTENTION | _LLADAMOE_EXPERTS, first)


# family -> variant -> function from the configuration to its table. Variants are different tensors
# for the same parameters. A table may name parameters that a configuration lacks, such as biases.
WEIGHT_TABLES: dict[str, dict[str, Callable[..., WeightTable]]] = {
    "llada": {"llada": _llada},
    "illada": {"llama": _llama},
    "dream": {"llama": _llama},
    "sdar": {"llama": _llama},
    "fast_dllm": {"llama": _llama},
    "lladamoe": {"experts": _lladamoe},
    "llada2": {
        "experts": _llada2,
        "stacked": partial(_llada2, experts=_LLADA2_EXPERTS | _LLADA2_STACKED),
    },
}


# model_type of a config.json -> the variant that its original code reads. For other model types it
# is the first variant of the family.
ORIGINAL_VARIANTS: dict[str, str] = {"llada2_moe_veomni": "stacked"}


_LLAMA_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

# family -> tensors that hold no parameters and are skipped: buffers that the code computes itself.
IGNORED_TENSORS: dict[str, str] = {
    "llada": r"model\.transformer\.(blocks\.\d+\.)?rotary_emb\.inv_freq",
    "llada2": r"model\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
    "illada": _LLAMA_BUFFERS,
    "dream": _LLAMA_BUFFERS,
    "sdar": _LLAMA_BUFFERS,
    "fast_dllm": _LLAMA_BUFFERS,
    "lladamoe": _LLAMA_BUFFERS,
}


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """A tensor, or some of its output rows, for a parameter.

    Attributes:
        tensor: name of the tensor.
        index: position of the part along the leading axes of the parameter.
        rows: (start, stop) of the output rows of the tensor.
        transpose: True if the part is transposed.
    """

    tensor: str
    index: tuple[int, ...]
    rows: tuple[int, int]
    transpose: bool

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the tensor in the layout of the parameter's part.

        Args:
            tensor: the complete tensor.

        Returns:
            A view, to read from or to write to.
        """
        rows = slice(*self.rows)
        part = tensor[rows] if tensor.ndim < 3 else tensor[:, rows]
        return part.swapaxes(-1, -2) if self.transpose else part


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """A weight table applied to the parameters of one configuration.

    Attributes:
        family: name of the family.
        variant: name of the variant.
        slices: path of a parameter -> its parts.
        tensors: name of a tensor -> its shape.
        copies: tensor that a checkpoint may have beside these -> the tensor that it must equal: the
            head of a model whose embedding table is the head.
    """

    family: str
    variant: str
    slices: dict[str, list[TensorSlice]]
    tensors: dict[str, tuple[int, ...]]
    copies: dict[str, str] = dataclasses.field(default_factory=dict)

    def ignores(self, tensor: str) -> bool:
        """Returns True for a tensor that holds no parameter."""
        return re.fullmatch(IGNORED_TENSORS.get(self.family, r"(?!)"), tensor) is not None

    def groups(self) -> Iterator[list[str]]:
        """Yields the paths of parameters, those that share tensors together."""
        seen: set[str] = set()
        for path, parts in self.slices.items():
            if path not in seen:
                group = [
                    p for p, other in self.slices.items() if other[0].tensor == parts[0].tensor
                ]
                seen.update(group)
                yield group


def map_weights(
    config: ModelConfig,
    abstract: Params,
    names: Collection[str] = (),
    variant: str | None = None,
) -> WeightMapping:
    """Maps the parameters of a configuration to tensors.

    Args:
        config: configuration of the model.
        abstract: tree of parameters. Only their shapes are read.
        names: names of the tensors in a checkpoint, if there is one.
        variant: variant of the family's table. None selects the one that fits `names` best, or
            without names the one that the original code of the configuration reads.

    Returns:
        The mapping.

    Raises:
        KeyError: for a parameter that the table lacks.
    """
    variants = WEIGHT_TABLES[config.family]
    if variant is None and not names:
        variant = ORIGINAL_VARIANTS.get(config.to_hf()["model_type"], next(iter(variants)))
    if variant is not None:
        return _map_variant(config, variant, abstract)
    mappings = (_map_variant(config, name, abstract) for name in variants)
    return max(mappings, key=lambda mapping: len(mapping.tensors.keys() & set(names)))


def _map_variant(config: ModelConfig, variant: str, abstract: Params) -> WeightMapping:
    weight_table = WEIGHT_TABLES[config.family][variant](config)
    shapes = {
        path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(abstract)
    }
    if unknown := shapes.keys() - weight_table.keys():
        raise KeyError(f"no tensors for the {config.family} parameter {sorted(unknown)[0]}")
    mapping = WeightMapping(config.family, variant, {path: [] for path in shapes}, {})
    if "ff_out/kernel" in weight_table.keys() - shapes.keys():
        mapping.copies[weight_table["ff_out/kernel"].tensor] = weight_table["wte/embedding"].tensor
    for path, source in weight_table.items():
        if path in shapes:
            _add_slices(mapping, path, source, shapes[path])
    return mapping


def _add_slices(
    mapping: WeightMapping, path: str, source: TensorSource, shape: tuple[int, ...]
) -> None:
    """Adds the parts of one parameter to a mapping."""
    counters = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in source.tensor]
    leading, part = shape[: len(counters)], shape[len(counters) :]
    if source.transpose:
        part = (*part[:-2], part[-1], part[-2])
    axis = max(len(part) - 2, 0)  # of the output rows
    for index in np.ndindex(*leading):
        counts = dict(zip(counters, index, strict=True))
        if "layer" in counts:
            counts["layer"] += source.first_layer
        name = source.tensor.format(**counts)
        start = mapping.tensors[name][axis] if name in mapping.tensors else 0
        rows = (start, start + part[axis])
        mapping.tensors[name] = (*part[:axis], rows[1], *part[axis + 1 :])
        mapping.slices[path].append(TensorSlice(name, index, rows, source.transpose))
