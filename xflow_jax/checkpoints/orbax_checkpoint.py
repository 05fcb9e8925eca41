"""Converted checkpoints: parameters in Orbax, which load in shards.

A converted checkpoint is an Orbax composite checkpoint. Each parameter is an item, so that they can
be written one by one. The item is named like the path with dots ("blocks.q_proj.kernel") and is a
tree of the one leaf "value". The record below is the checkpoint's custom metadata. files.json is
written last and lists the sizes and checksums of all others. The directory is built as NAME.partial
and renamed when it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.atomic_write import CONVERTED, exists
from xflow_jax.checkpoints.checksums import (
    CHECKSUM_FILE,
    Listed,
    compares_large_files,
    first_damage,
    list_files,
)
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.hf_export import check_shapes
from xflow_jax.checkpoints.leaf_shards import LeafShards
from xflow_jax.checkpoints.orbax_logging import quiet_orbax
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files import absolute, file_inside, is_cloud, read_json, to_path
from xflow_jax.models import INT8, SCALE, abstract_weights, model_config, quantize, shardings
from xflow_jax.types import ModelConfig

FORMAT = "xflow-jax parameters, version 1"
ORBAX_METADATA = CONVERTED  # Orbax writes the time of the commit into it at last


@dataclass(frozen=True)
class CheckpointRecord:
    """Metadata of a converted checkpoint.

    `convert.to_hf` uses the last two to write the tensors as they were in the source.

    Attributes:
        config: the dict of config.json.
        provenance: origin of the parameters.
        leaves: path of a parameter -> [dtype, *shape].
        variant: variant of the weight table that the source used, or None without a source.
        dtypes: name of a tensor in the source -> its dtype, or None without a source. "" stands for
            all tensors without an entry.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    leaves: dict[str, list[Any]]
    variant: str | None = None
    dtypes: dict[str, str] | None = None

    @property
    def is_int8(self) -> bool:
        """True if the layers' matrices are int8, with scales."""
        return any(np.dtype(dtype) == INT8 for dtype, *_ in self.leaves.values())


def is_checkpoint(directory: str | Path) -> bool:
    """Returns True for a converted checkpoint, complete or not."""
    with disk_errors(directory, reading=True):
        return exists(to_path(directory) / ORBAX_METADATA)


def read_record(
    directory: str | Path, large: bool = False, always: bool = False
) -> CheckpointRecord:
    """Reads the record of a complete checkpoint.

    The sizes of all files are compared with those of files.json, and the checksums.

    Args:
        directory: the checkpoint.
        large: True compares the checksums of large files as well, unless XFLOW_VERIFY is 0. False
            suits programs that read no parameters.
        always: compare all checksums whatever XFLOW_VERIFY is.

    Raises:
        UserError: if the checkpoint is incomplete, damaged or of another format.
    """
    directory = absolute(directory)
    record = read_partial_record(directory)
    incomplete = UserError(
        f"{directory}: an incomplete checkpoint. Run the program that makes it to its end."
    )
    if not (directory / CHECKSUM_FILE).exists():
        raise incomplete
    try:
        listed = cast("Listed", read_json(directory / CHECKSUM_FILE))
        reads = always or (large and compares_large_files(directory))
        damage = first_damage(directory, listed, reads, shared=True)
    except (OSError, ValueError, TypeError, AttributeError):
        raise incomplete from None
    if damage is not None:
        name, state = damage
        raise UserError(
            f"{directory / name}: the file {state}. Copy or convert the checkpoint again."
        )
    return record


def read_leaf(
    directory: str | Path,
    record: CheckpointRecord,
    path: str,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> jax.Array | np.ndarray:
    """Reads one parameter of a converted checkpoint.

    Args:
        directory: the checkpoint.
        record: its record.
        path: path of the parameter.
        dtype: dtype to cast it to.
        sharding: its sharding, or None for a NumPy array.

    Returns:
        The parameter. With a sharding, each process reads its own shards.

    Raises:
        UserError: if it cannot be read.
    """
    if sharding is None:
        restore_args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    else:
        shape = tuple(record.leaves[path][1:])
        restore_args = ocp.ArrayRestoreArgs(dtype=dtype, sharding=sharding, global_shape=shape)
    item = absolute(directory) / item_name(path)
    args = ocp.args.PyTreeRestore({"value": 0}, restore_args={"value": restore_args})
    try:
        with quiet_orbax():
            return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(item, args)["value"]
    except Exception as error:  # Orbax and tensorstore raise bare Exceptions
        raise UserError(
            f"{item}: cannot be read ({type(error).__name__}). Convert the checkpoint again."
        ) from error


def load_params(
    directory: str | Path, dtype: DTypeLike, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the parameters of a converted checkpoint.

    Args:
        directory: the checkpoint.
        dtype: dtype of the parameters, as in `models.abstract_weights`.
        mesh: mesh to shard them over, or None for the default device.

    Returns:
        (configuration, parameters).

    Raises:
        UserError: if the checkpoint is incomplete, damaged or not supported.
    """
    record = read_record(directory, large=True)
    config, abstract = abstract_model(directory, record, dtype)
    placement = {}
    if mesh is not None:
        placement = flatten_dict(shardings(abstract, mesh, config.family), sep="/")
    require(
        not record.is_int8 or np.dtype(dtype) == INT8,
        f"{directory}: its matrices are int8, so its dtype must be int8, not {np.dtype(dtype)}",
    )
    leaves: dict[str, jax.Array] = {}
    for path, x in flatten_dict(abstract, sep="/").items():
        if path in leaves:  # scales, which came with their matrix
            continue
        read: dict[str, jax.Array | np.ndarray]
        if x.dtype == INT8 and not record.is_int8:
            read = {**_read_int8(directory, record, path, placement)}
        else:
            read = {path: read_leaf(directory, record, path, x.dtype, placement.get(path))}
        for name, leaf in read.items():
            if not is_finite(leaf):
                raise UserError(
                    f"{directory}: {path} holds NaN or infinity in {np.dtype(x.dtype).name}. "
                    "The weights are damaged, or too large for this dtype."
                )
            leaves[name] = jnp.asarray(leaf)
    return config, unflatten_dict(leaves, sep="/")


def _read_int8(
    directory: str | Path, record: CheckpointRecord, path: str, placement: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Reads a matrix and rounds it to int8.

    Each process reads the complete matrix, since the scales are those of complete columns.
    """
    values = np.asarray(read_leaf(directory, record, path, np.dtype(record.leaves[path][0])))
    leaves = {}
    for name, part in zip((path, path + SCALE), quantize(values), strict=True):
        shards = LeafShards(part.shape, part.dtype, placement.get(name))
        shards.copy((), part)
        leaves[name] = shards.place()
    return leaves


def abstract_model(
    directory: str | Path, record: CheckpointRecord, dtype: DTypeLike = jnp.float32
) -> tuple[ModelConfig, dict[str, Any]]:
    """Builds the configuration and the abstract parameters of a record.

    Args:
        directory: the checkpoint, for messages.
        record: its record.
        dtype: dtype of the parameters, as in `models.abstract_weights`. It need not be that of
            the record.

    Returns:
        (configuration, tree of jax.ShapeDtypeStruct).

    Raises:
        UserError: if the parameters in the record do not belong to its configuration.
    """
    config = model_config(record.config, str(directory))
    abstract = stored = abstract_weights(config, dtype)
    if record.is_int8 != (np.dtype(dtype) == INT8):
        stored = abstract_weights(config, INT8 if record.is_int8 else jnp.float32)
    try:
        check_shapes(stored, {path: tuple(shape) for path, (_, *shape) in record.leaves.items()})
    except ValueError as error:
        raise UserError(f"{directory}: {error}. Convert the checkpoint again.") from None
    return config, abstract


def read_partial_record(directory: Path) -> CheckpointRecord:
    """Reads the record of a checkpoint that may be incomplete.

    Args:
        directory: the checkpoint, as an absolute path.

    Returns:
        The record.

    Raises:
        UserError: if it is no converted checkpoint, or damaged.
    """
    _check_files(directory)
    try:
        with quiet_orbax():
            metadata = (
                ocp.Checkpointer(ocp.CompositeCheckpointHandler())
                .metadata(directory)
                .custom_metadata
            )
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(
            f"{directory}: not a converted checkpoint of this version. "
            "Make one with python -m convert.from_hf."
        )
    try:
        record = CheckpointRecord(**{k: v for k, v in metadata.items() if k != "format"})
        for dtype, *shape in record.leaves.values():
            require(bool(np.dtype(dtype)) and all(type(n) is int for n in shape), "")
    except (TypeError, ValueError, AttributeError, UserError):
        raise UserError(f"{directory}: its metadata are damaged. Convert it again.") from None
    return record


def _check_files(directory: Path) -> None:
    """Raises UserError for pipes, devices, links out, and damaged metadata.

    Orbax would wait for a pipe, and read a device for ever.
    """
    require_orbax(directory)
    for file in () if is_cloud(directory) else list_files(directory):
        place = file_inside(directory, str(file.relative_to(directory)))
        require(
            place.is_file(),
            f"{file}: it is no regular file. Copy or convert the checkpoint again.",
        )
    if (directory / ORBAX_METADATA).exists():
        read_json(directory / ORBAX_METADATA)


def require_orbax(place: str | Path) -> None:
    """Raises UserError for storage that Orbax cannot write to."""
    text = str(place)
    if is_cloud(text) and not text.startswith("gs://"):
        raise UserError(
            f"{text}: converted checkpoints and runs are on a disk or on gs://. Models in the "
            "Hugging Face format, data and results may be on s3://."
        )


def item_name(path: str) -> str:
    """Returns the name of a parameter's item."""
    return path.replace("/", ".")
