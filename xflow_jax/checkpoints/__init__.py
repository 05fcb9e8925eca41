"""Checkpoints: Hugging Face safetensors and sharded Orbax directories, in both directions."""

from xflow_jax.checkpoints.atomic_write import (
    append_text,
    atomic_file,
    close_text,
    delete_directory,
    exists,
    make_directory,
    move_directory,
    refuse_existing,
    release_memory,
    write_atomic,
)
from xflow_jax.checkpoints.checksums import CHECKSUM_FILE, find_damage, write_checksums
from xflow_jax.checkpoints.hf_export import MAX_SHARD, parse_size, write_hf, write_tensors
from xflow_jax.checkpoints.huggingface import (
    check_companions,
    download_from_hub,
    find_hf_directory,
    read_hf_config,
    read_hf_params,
    read_stored,
)
from xflow_jax.checkpoints.mask_token import resolve_mask_id
from xflow_jax.checkpoints.orbax_checkpoint import (
    ORBAX_METADATA,
    abstract_model,
    is_checkpoint,
    load_params,
    read_leaf,
    read_record,
    require_orbax,
)
from xflow_jax.checkpoints.orbax_logging import quiet_orbax, release_tasks
from xflow_jax.checkpoints.orbax_writer import PartialCheckpoint, make_record, save_params
from xflow_jax.checkpoints.run_lock import (
    destination_lock,
    folder_lock,
    locked_by_first_process,
)
from xflow_jax.checkpoints.safetensors_reader import CONFIG_FILE, SafetensorsSource, read_hf_leaf
from xflow_jax.checkpoints.stop_tokens import resolve_stop_ids
from xflow_jax.checkpoints.weight_map import WeightMapping, map_weights

__all__ = [
    "CHECKSUM_FILE",
    "CONFIG_FILE",
    "MAX_SHARD",
    "ORBAX_METADATA",
    "PartialCheckpoint",
    "SafetensorsSource",
    "WeightMapping",
    "abstract_model",
    "append_text",
    "atomic_file",
    "destination_lock",
    "check_companions",
    "close_text",
    "delete_directory",
    "download_from_hub",
    "exists",
    "find_damage",
    "find_hf_directory",
    "folder_lock",
    "is_checkpoint",
    "load_params",
    "locked_by_first_process",
    "make_directory",
    "make_record",
    "map_weights",
    "move_directory",
    "parse_size",
    "quiet_orbax",
    "read_hf_config",
    "read_hf_leaf",
    "read_hf_params",
    "read_leaf",
    "read_record",
    "read_stored",
    "refuse_existing",
    "require_orbax",
    "resolve_mask_id",
    "resolve_stop_ids",
    "release_memory",
    "release_tasks",
    "save_params",
    "write_atomic",
    "write_checksums",
    "write_hf",
    "write_tensors",
]
