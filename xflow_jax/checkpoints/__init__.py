"""Checkpoints: Hugging Face safetensors and sharded Orbax directories, in both directions."""

from xflow_jax.checkpoints import huggingface, orbax_checkpoint, safetensors_reader
from xflow_jax.checkpoints.atomic_write import refuse_existing, release_memory, write_atomic
from xflow_jax.checkpoints.hf_export import MAX_SHARD, parse_size, write_hf, write_tensors
from xflow_jax.checkpoints.huggingface import download_from_hub, flatten
from xflow_jax.checkpoints.orbax_checkpoint import (
    PartialCheckpoint,
    abstract_model,
    is_checkpoint,
    make_record,
    read_leaf,
    read_record,
    save_params,
)
from xflow_jax.checkpoints.weight_map import WeightMapping, map_weights

__all__ = [
    "MAX_SHARD",
    "PartialCheckpoint",
    "WeightMapping",
    "abstract_model",
    "download_from_hub",
    "flatten",
    "huggingface",
    "is_checkpoint",
    "make_record",
    "map_weights",
    "orbax_checkpoint",
    "parse_size",
    "read_leaf",
    "read_record",
    "refuse_existing",
    "release_memory",
    "safetensors_reader",
    "save_params",
    "write_atomic",
    "write_hf",
    "write_tensors",
]
