"""Converted checkpoints: parameters under Orbax, one item each, so that they are written one by one and read in shards.

A directory of this kind is an Orbax composite checkpoint. Each parameter is an item named like its path with dots
("blocks.q_proj.kernel"), a tree of the one leaf "value"; the record below is the checkpoint's custom metadata;
files.json comes last and tells the sizes of all others. It is made as NAME.partial and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from xflow_jax.checkpoints.atomic_write import (
    copy_files,
    disk_errors,
    partial_path,
    refuse_existing,
)
from xflow_jax.checkpoints.hf_export import check_shapes
from xflow_jax.checkpoints.huggingface import COMPANIONS, flatten, unflatten
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build, model_config, shardings

FORMAT, FILES = "xflow-jax parameters, version 1", "files.json"


# A host that reads a slice of a parameter decodes whole chunks of it; Orbax alone would write one chunk per shard.
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class CheckpointRecord:
    """What a converted checkpoint says of itself.

    config: the dict of config.json. provenance: where the parameters come from. leaves: path -> dtype and shape.
    variant and dtypes: which of the family's tables named the tensors of the source, and their dtypes ("" = of all that
    have no entry of their own), empty where there was no source; `convert.to_hf` writes them as they were.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    leaves: dict[str, list[Any]]
    variant: str | None = None
    dtypes: dict[str, str] | None = None


def make_record(
    config: Any, provenance: Mapping[str, Any] | None, leaves: Mapping[str, Any], **more: Any
) -> CheckpointRecord:
    """The record of parameters by path (anything with shape and dtype)."""
    described = {path: [str(np.dtype(x.dtype)), *x.shape] for path, x in leaves.items()}
    # Through JSON and back, so that it equals the one that is read.
    return CheckpointRecord(
        **json.loads(
            json.dumps(
                asdict(CheckpointRecord(config.to_hf(), dict(provenance or {}), described, **more))
            )
        )
    )


class PartialCheckpoint:
    """A checkpoint in the making, in `path`.partial; one that is there already from the same record is continued.

    Every call turns what the disk refuses into a UserError, and leaves the partial directory. All processes of a run
    make the same calls.
    """

    def __init__(self, path: str | Path, record: CheckpointRecord, kept: str = ""):
        """Opens the draft. kept: said to the user after "the disk is full", of what is in the partial directory."""
        self.path, self.record = Path(path).absolute(), record
        self.partial, self.kept = partial_path(self.path), kept
        refuse_existing(self.path)
        with disk_errors(self.path, kept):
            self._open()

    def _open(self) -> None:
        if self.partial.exists():
            if _read_record(self.partial) != self.record:
                raise UserError(
                    f"{self.partial}: half-made from another source or with other options; delete it, "
                    f"or choose another destination than {self.path}"
                )
            _alone(
                lambda: [shutil.rmtree(old) for old in self.partial.glob("*.orbax-checkpoint-tmp*")]
            )
            return
        _alone(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
        metadata = {"format": FORMAT, **asdict(self.record)}
        args = ocp.args.Composite(config=ocp.args.JsonSave(self.record.config))
        with _quiet():
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()).save(
                self.partial, args, custom_metadata=metadata
            )

    def has(self, path: str) -> bool:
        """Whether a parameter is written already: Orbax gives an item its name when it is whole."""
        return (self.partial / _item(path)).exists()

    def write(self, path: str, leaf: jax.Array | np.ndarray) -> None:
        """Writes one parameter, each process its own shards."""
        described = [str(np.dtype(leaf.dtype)), *leaf.shape]
        if described != self.record.leaves[path]:
            raise ValueError(
                f"{path} is {described}, but the record says {self.record.leaves[path]}"
            )
        args = ocp.args.PyTreeSave(
            {"value": leaf}, save_args={"value": ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)}
        )
        with disk_errors(self.path, self.kept), _quiet():
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(self.partial / _item(path), args)

    def finish(self, companions: str | Path | None = None) -> None:
        """Copies the tokenizer's files from `companions`, and gives the checkpoint its name."""
        if missing := [path for path in self.record.leaves if not self.has(path)]:
            raise ValueError(f"{missing[0]} was never written")

        def close() -> None:
            if companions is not None:
                copy_files(Path(companions), self.partial, COMPANIONS)
            (self.partial / FILES).unlink(missing_ok=True)
            sizes = {
                str(file.relative_to(self.partial)): file.stat().st_size
                for file in _files(self.partial)
            }
            (self.partial / FILES).write_text(json.dumps(sizes, indent=1) + "\n")
            refuse_existing(self.path)
            self.partial.rename(self.path)

        with disk_errors(self.path, self.kept):
            _alone(close)


def save_params(
    path: str | Path,
    params: Any,
    config: Any,
    tokenizer_dir: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters (arrays, sharded or not) as a converted checkpoint that `xf.load` reads, atomically.

    tokenizer_dir: where the tokenizer's files are; provenance: JSON, whatever tells where the parameters come from. A
    half-made checkpoint at the same place is begun anew. Raises UserError where `path` exists or the disk is full,
    ValueError where the parameters are not those of the configuration.
    """
    leaves = dict(flatten(params))
    check_shapes(abstract_params(build(config)), {name: x.shape for name, x in leaves.items()})
    record, partial = make_record(config, provenance, leaves), partial_path(Path(path).absolute())
    refuse_existing(Path(path))
    stale = partial.exists()
    _alone(lambda: None)  # everybody has looked before one of them deletes
    if stale:
        _read_record(partial)  # nothing but a checkpoint of ours is deleted
        _alone(lambda: shutil.rmtree(partial))
    try:
        draft = PartialCheckpoint(path, record)
        for name, leaf in leaves.items():
            draft.write(name, leaf)
        draft.finish(tokenizer_dir)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory is a converted checkpoint, whole or half-made."""
    return (Path(directory) / "_CHECKPOINT_METADATA").exists()


def read_record(directory: str | Path) -> CheckpointRecord:
    """The record of a whole checkpoint; UserError for one that is half-made, damaged or not ours."""
    directory = Path(directory).absolute()
    record = _read_record(directory)
    try:
        sizes = json.loads((directory / FILES).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{directory}: a half-made checkpoint; run the program that makes it to its end"
        ) from None
    for name, size in sizes.items():
        file = directory / name
        if not file.exists() or file.stat().st_size != size:
            state = (
                f"has {file.stat().st_size} bytes, not {size}" if file.exists() else "is missing"
            )
            raise UserError(f"{file}: the file {state}; copy or convert the checkpoint again")
    return record


def read_leaf(
    directory: str | Path,
    record: CheckpointRecord,
    path: str,
    dtype: Any,
    sharding: Sharding | None = None,
) -> Any:
    """One parameter, cast to `dtype`: NumPy, or with a sharding a jax.Array of which each process reads its shards."""
    if sharding is None:
        how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    else:
        shape = tuple(record.leaves[path][1:])
        how = ocp.ArrayRestoreArgs(dtype=dtype, sharding=sharding, global_shape=shape)
    item = Path(directory).absolute() / _item(path)
    args = ocp.args.PyTreeRestore({"value": 0}, restore_args={"value": how})
    try:
        with _quiet():
            return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(item, args)["value"]
    except Exception as error:  # Orbax and tensorstore raise bare Exceptions
        raise UserError(
            f"{item}: cannot be read ({type(error).__name__}); convert the checkpoint again"
        ) from error


def load_params(
    directory: str | Path, dtype: Any, mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """(config, parameters in `dtype`) of a converted checkpoint, sharded over the mesh where there is one."""
    record = read_record(directory)
    config, abstract = abstract_model(directory, record, dtype)
    where = {} if mesh is None else dict(flatten(shardings(abstract, mesh, config.family)))
    leaves = {}
    for path, x in flatten(abstract):
        leaves[path] = jnp.asarray(read_leaf(directory, record, path, x.dtype, where.get(path)))
    return config, unflatten(leaves)


def abstract_model(
    directory: str | Path, record: CheckpointRecord, dtype: Any = jnp.float32
) -> tuple[Any, Any]:
    """(config, abstract tree in `dtype`) of a record; UserError where its parameters are not this configuration's."""
    config = model_config(record.config, str(directory))
    abstract = abstract_params(build(config, dtype, param_dtype=dtype))
    try:
        check_shapes(abstract, {path: tuple(shape) for path, (_, *shape) in record.leaves.items()})
    except ValueError as error:
        raise UserError(f"{directory}: {error}; convert the checkpoint again") from None
    return config, abstract


def _read_record(directory: Path) -> CheckpointRecord:
    try:
        with _quiet():
            metadata = (
                ocp.Checkpointer(ocp.CompositeCheckpointHandler())
                .metadata(directory)
                .custom_metadata
            )
    except (OSError, ValueError, AttributeError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(
            f"{directory}: not a converted checkpoint of this version; make one with convert.from_hf"
        )
    return CheckpointRecord(**{name: value for name, value in metadata.items() if name != "format"})


def _item(path: str) -> str:
    return path.replace("/", ".")


def _files(directory: Path) -> Iterator[Path]:
    return (
        Path(folder) / name for folder, _, names in os.walk(directory) for name in sorted(names)
    )


def _alone(action: Callable[[], Any]) -> None:
    """Runs an action on files in one process, while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs whole tracebacks of what it raises anyway, and warnings of what is meant so."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:
        # Reads and writes that were under way beside the one that failed find their event loop closed, and say so late.
        time.sleep(0.2)
        gc.collect()
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
