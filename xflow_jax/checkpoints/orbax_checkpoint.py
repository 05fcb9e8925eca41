"""Converted checkpoints: parameters in Orbax, which load in shards.

A converted checkpoint is an Orbax composite checkpoint. Each parameter is an item, so that they can
be written one by one. The item is named like the path with dots ("blocks.q_proj.kernel") and is a
tree of the one leaf "value". The record below is the checkpoint's custom metadata. files.json is
written last and lists the sizes and checksums of all others. The directory is built as NAME.partial
and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.atomic_write import copy_files, partial_path, refuse_existing
from xflow_jax.checkpoints.checksums import (
    FILES,
    compares_large_files,
    first_damage,
    list_files,
    write_checksums,
)
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.hf_export import check_shapes
from xflow_jax.checkpoints.huggingface import COMPANIONS
from xflow_jax.checkpoints.run_lock import destination_lock, locked_by_first_process
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files import file_inside, read_json
from xflow_jax.models import abstract_params, build, model_config, shardings
from xflow_jax.types import ModelConfig, Params

FORMAT = "xflow-jax parameters, version 1"
METADATA = "_CHECKPOINT_METADATA"  # written by Orbax
TEMPORARY = ".orbax-checkpoint-tmp*"  # what Orbax adds to a name until the directory is complete
# A host that reads a slice of a parameter decodes complete chunks of it. By default Orbax would
# write one chunk per shard.
CHUNK_BYTES = 2**24
JOIN_SECONDS = 10.0  # for each thread of a failed save


class ArrayLeaf(Protocol):
    """Anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DTypeLike: ...


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


def make_record(
    config: ModelConfig,
    provenance: Mapping[str, object] | None,
    leaves: Mapping[str, ArrayLeaf],
    variant: str | None = None,
    dtypes: dict[str, str] | None = None,
) -> CheckpointRecord:
    """Makes the record of parameters.

    Args:
        config: their configuration.
        provenance: origin of the parameters, of JSON types.
        leaves: path -> parameter. Only shapes and dtypes are read.
        variant: as in CheckpointRecord.
        dtypes: as in CheckpointRecord.

    Returns:
        The record.
    """
    described = {path: [str(np.dtype(x.dtype)), *x.shape] for path, x in leaves.items()}
    record = CheckpointRecord(config.to_hf(), dict(provenance or {}), described, variant, dtypes)
    # Converted to JSON and back, so that it equals the record that is read.
    return CheckpointRecord(**json.loads(json.dumps(asdict(record))))


class PartialCheckpoint:
    """A checkpoint that is being written, in `path`.partial.

    If a partial checkpoint with the same record exists, it is continued. Errors of the disk become
    UserErrors, and the partial directory then stays. All processes of a run make the same calls,
    while the first one holds the lock of the destination.
    """

    def __init__(self, path: str | Path, record: CheckpointRecord, note: str = ""):
        """Opens the partial checkpoint.

        Args:
            path: the destination.
            record: record of the checkpoint.
            note: a text that is added to messages about the disk, about the state of the work.

        Raises:
            UserError: if the destination exists, or a partial checkpoint with another record.
        """
        self.path, self.record = Path(path).absolute(), record
        self.partial, self.note = partial_path(self.path), note
        refuse_existing(self.path)
        with disk_errors(self.path, note):
            self._open()

    def _open(self) -> None:
        if self.partial.exists():
            if _read_record(self.partial) != self.record:
                raise UserError(
                    f"{self.partial}: begun from another source or with other options. Delete it, "
                    f"or choose another destination than {self.path}."
                )
            _in_first_process(self._delete_incomplete)
            return
        _in_first_process(self._make_parent)
        metadata = {"format": FORMAT, **asdict(self.record)}
        args = ocp.args.Composite(config=ocp.args.JsonSave(self.record.config))
        with quiet_orbax():
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()).save(
                self.partial, args, custom_metadata=metadata
            )

    def _make_parent(self) -> None:
        """Makes the parent directory, without the remains of a killed start."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for directory in self.path.parent.glob(f"{glob.escape(self.partial.name)}{TEMPORARY}"):
            shutil.rmtree(directory)

    def _delete_incomplete(self) -> None:
        """Deletes items that a stopped program did not complete."""
        for item in self.partial.glob(f"*{TEMPORARY}"):
            shutil.rmtree(item)

    def has(self, path: str) -> bool:
        """Returns True if a parameter is already written."""
        # Orbax gives an item its name when it is complete.
        return (self.partial / _item_name(path)).exists()

    def write(self, path: str, leaf: jax.Array | np.ndarray) -> None:
        """Writes one parameter. Each process writes its own shards.

        Args:
            path: path of the parameter.
            leaf: the parameter.

        Raises:
            ValueError: if its dtype or shape is not that of the record.
            UserError: for errors of the disk.
        """
        described = [str(np.dtype(leaf.dtype)), *leaf.shape]
        if described != self.record.leaves[path]:
            raise ValueError(
                f"{path} is {described}, but the record says {self.record.leaves[path]}"
            )
        args = ocp.args.PyTreeSave(
            {"value": leaf}, save_args={"value": ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)}
        )
        item = self.partial / _item_name(path)
        with disk_errors(self.path, self.note), quiet_orbax():
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(item, args)

    def discard(self) -> None:
        """Deletes the partial checkpoint."""
        if jax.process_index() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self, companions: str | Path | None = None) -> None:
        """Renames the checkpoint to its destination.

        Args:
            companions: directory whose tokenizer files are copied, or None.

        Raises:
            ValueError: if a parameter is missing.
            UserError: for errors of the disk.
        """
        if missing := [path for path in self.record.leaves if not self.has(path)]:
            raise ValueError(f"{missing[0]} was never written")

        def close() -> None:
            if companions is not None:
                copy_files(Path(companions), self.partial, COMPANIONS)
            (self.partial / FILES).unlink(missing_ok=True)
            write_checksums(self.partial, FILES)
            refuse_existing(self.path)
            self.partial.rename(self.path)

        with disk_errors(self.path, self.note):
            _in_first_process(close)


def save_params(
    path: str | Path,
    params: Params,
    config: ModelConfig,
    tokenizer_dir: str | Path | None = None,
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Writes parameters as a converted checkpoint that `xflow_jax.load` reads, atomically.

    A partial checkpoint at the same place is deleted first.

    Args:
        path: the directory to make.
        params: parameters, sharded or not.
        config: their configuration.
        tokenizer_dir: directory whose tokenizer files are copied, or None.
        provenance: origin of the parameters, of JSON types.

    Raises:
        UserError: if `path` exists or is being written, if the disk is full, or if a value is NaN
            or infinite.
        ValueError: if the parameters do not belong to the configuration.
    """
    leaves = flatten_dict(params, sep="/")
    check_shapes(abstract_params(build(config)), {name: x.shape for name, x in leaves.items()})
    record, partial = make_record(config, provenance, leaves), partial_path(Path(path).absolute())
    refuse_existing(Path(path))
    with locked_by_first_process(destination_lock(Path(path))):
        stale = partial.exists()
        if stale:
            _read_record(partial)  # deletes nothing that is not a converted checkpoint
        _in_first_process(lambda: None)  # all processes check before the first one deletes
        if stale:
            _in_first_process(lambda: shutil.rmtree(partial))
        try:
            checkpoint = PartialCheckpoint(path, record)
            for name, leaf in leaves.items():
                require(
                    is_finite(leaf),
                    f"{path}: {name} holds NaN or infinity. The training has diverged.",
                )
                checkpoint.write(name, leaf)
            checkpoint.finish(tokenizer_dir)
        except BaseException:
            if jax.process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def is_checkpoint(directory: str | Path) -> bool:
    """Returns True for a converted checkpoint, complete or not."""
    return os.path.lexists(Path(directory) / METADATA)


def read_record(directory: str | Path, large: bool = False) -> CheckpointRecord:
    """Reads the record of a complete checkpoint.

    The sizes of all files are compared with those of files.json, and the checksums.

    Args:
        directory: the checkpoint.
        large: True compares the checksums of large files as well, unless XFLOW_VERIFY is 0. False
            suits programs that read no parameters.

    Raises:
        UserError: if the checkpoint is incomplete, damaged or of another format.
    """
    directory = Path(directory).absolute()
    record = _read_record(directory)
    try:
        listed = json.loads((directory / FILES).read_text())
        damage = first_damage(directory, listed, large and compares_large_files(), shared=True)
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{directory}: an incomplete checkpoint. Run the program that makes it to its end."
        ) from None
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
    item = Path(directory).absolute() / _item_name(path)
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
        dtype: dtype of the parameters.
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
    leaves = {}
    for path, x in flatten_dict(abstract, sep="/").items():
        leaf = read_leaf(directory, record, path, x.dtype, placement.get(path))
        if not is_finite(leaf):
            raise UserError(
                f"{directory}: {path} holds NaN or infinity in {np.dtype(x.dtype).name}. "
                "The weights are damaged, or too large for this dtype."
            )
        leaves[path] = jnp.asarray(leaf)
    return config, unflatten_dict(leaves, sep="/")


def abstract_model(
    directory: str | Path, record: CheckpointRecord, dtype: DTypeLike = jnp.float32
) -> tuple[ModelConfig, dict[str, Any]]:
    """Builds the configuration and the abstract parameters of a record.

    Args:
        directory: the checkpoint, for messages.
        record: its record.
        dtype: dtype of the parameters.

    Returns:
        (configuration, tree of jax.ShapeDtypeStruct).

    Raises:
        UserError: if the parameters in the record do not belong to its configuration.
    """
    config = model_config(record.config, str(directory))
    abstract = abstract_params(build(config, dtype, param_dtype=dtype))
    try:
        check_shapes(abstract, {path: tuple(shape) for path, (_, *shape) in record.leaves.items()})
    except ValueError as error:
        raise UserError(f"{directory}: {error}. Convert the checkpoint again.") from None
    return config, abstract


def _read_record(directory: Path) -> CheckpointRecord:
    """Reads the record of a checkpoint that may be incomplete."""
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
    """Raises UserError for pipes, devices, links out, and damaged JSON.

    Orbax would wait for a pipe, and read a device for ever.
    """
    for file in list_files(directory):
        place = file_inside(directory, str(file.relative_to(directory)))
        require(
            place.is_file(),
            f"{file}: it is no regular file. Copy or convert the checkpoint again.",
        )
    for name in (METADATA, FILES):
        if (directory / name).exists():
            read_json(directory / name)


def _item_name(path: str) -> str:
    """Returns the name of a parameter's item."""
    return path.replace("/", ".")


def _in_first_process(action: Callable[[], object]) -> None:
    """Runs an action in the first process while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs tracebacks of errors that it also raises."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:
        # After a failure, other pending reads and writes find their event loop closed. They report
        # it with a delay, so wait before the hook is restored.
        time.sleep(0.2)
        gc.collect()
        raise
    finally:
        _join_orbax_threads()
        logger.setLevel(level)
        sys.unraisablehook = hook


def _join_orbax_threads() -> None:
    """Waits for threads of a failed save, which log its error."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, JOIN_SECONDS)
