"""Writes converted checkpoints, parameter by parameter. Their form is in orbax_checkpoint."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from xflow_jax.checkpoints.atomic_write import (
    delete_directory,
    exists,
    make_directory,
    partial_path,
    refuse_existing,
)
from xflow_jax.checkpoints.checksums import CHECKSUM_FILE, write_checksums
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.hf_export import check_shapes
from xflow_jax.checkpoints.huggingface import copy_companions
from xflow_jax.checkpoints.orbax_checkpoint import (
    FORMAT,
    ORBAX_METADATA,
    CheckpointRecord,
    item_name,
    read_partial_record,
    require_orbax,
)
from xflow_jax.checkpoints.orbax_logging import quiet_orbax
from xflow_jax.checkpoints.run_lock import destination_lock, locked_by_first_process
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files import absolute, is_cloud, object_exists, object_sizes, to_path
from xflow_jax.models import abstract_params, build
from xflow_jax.types import ModelConfig, Params

TEMPORARY = ".orbax-checkpoint-tmp*"  # what Orbax adds to a name until the directory is complete
COMMITTED = "commit_success.txt"  # what Orbax writes last into an item in object storage
# A host that reads a slice of a parameter decodes complete chunks of it. By default Orbax would
# write one chunk per shard.
CHUNK_BYTES = 2**24


class ArrayLeaf(Protocol):
    """Anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DTypeLike: ...


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

    In object storage it is in `path`, and incomplete without files.json.

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
        require_orbax(path)
        self.path, self.record = absolute(path), record
        self.partial, self.note = partial_path(self.path), note
        refuse_existing(self.path)
        with disk_errors(self.path, note):
            self._open()

    def _open(self) -> None:
        if exists(self.partial / ORBAX_METADATA if is_cloud(self.partial) else self.partial):
            if read_partial_record(self.partial) != self.record:
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
        if is_cloud(self.path):
            if any(not name.startswith("config/") for name in object_sizes(self.path)):
                raise UserError(
                    f"{self.path}: the destination exists. Choose another one, or delete it."
                )
            delete_directory(self.path)
            return
        make_directory(self.path.parent)
        for directory in self.path.parent.glob(f"{glob.escape(self.partial.name)}{TEMPORARY}"):
            delete_directory(directory)

    def _delete_incomplete(self) -> None:
        """Deletes items that a stopped program did not complete."""
        for item in self.partial.glob(f"*{TEMPORARY}"):
            delete_directory(item)
        if is_cloud(self.partial):
            for path in self.record.leaves:
                if not self.has(path):
                    delete_directory(self.partial / item_name(path))

    def has(self, path: str) -> bool:
        """Returns True if a parameter is already written."""
        # Orbax gives an item its name when it is complete, and in object storage this file.
        item = self.partial / item_name(path)
        return object_exists(item / COMMITTED) if is_cloud(item) else item.exists()

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
        item = self.partial / item_name(path)
        with disk_errors(self.path, self.note), quiet_orbax():
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(item, args)

    def discard(self) -> None:
        """Deletes the partial checkpoint."""
        if jax.process_index() == 0:
            delete_directory(self.partial)

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
                copy_companions(to_path(companions), self.partial, self.record.config)
            (self.partial / CHECKSUM_FILE).unlink(missing_ok=True)
            write_checksums(self.partial, CHECKSUM_FILE)
            if self.partial != self.path:
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
    path = absolute(path)
    record, partial = make_record(config, provenance, leaves), partial_path(path)
    refuse_existing(path)
    with locked_by_first_process(destination_lock(path)):
        stale = exists(partial)
        if stale:
            read_partial_record(partial)  # deletes nothing that is not a converted checkpoint
        _in_first_process(lambda: None)  # all processes check before the first one deletes
        if stale:
            _in_first_process(lambda: delete_directory(partial))
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
                delete_directory(partial)
            raise


def _in_first_process(action: Callable[[], object]) -> None:
    """Runs an action in the first process while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint")
