"""Conversion from Hugging Face to Orbax: `python -m convert.from_hf SRC DST`.

The result loads in shards. Parameters are converted one by one, so that memory holds one at a time.
A conversion that was stopped continues, after a check that the source is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from convert import run_program
from xflow_jax.checkpoints import (
    CONFIG_FILE,
    PartialCheckpoint,
    SafetensorsSource,
    WeightMapping,
    check_companions,
    destination_lock,
    find_hf_directory,
    is_checkpoint,
    make_record,
    map_weights,
    read_hf_config,
    read_stored,
    refuse_existing,
    release_memory,
    resolve_mask_id,
)
from xflow_jax.errors import UserError
from xflow_jax.input_files import file_size, is_cloud, open_regular, to_path
from xflow_jax.models import SCALE, abstract_params, abstract_weights, build, shardings
from xflow_jax.parallel import make_mesh

DTYPES = ("keep", "bfloat16", "float32", "int8")
HASH_BLOCK = 2**24  # bytes read at a time
NOTE = ". The parameters written so far are kept, and the same command continues from there."


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str = "keep",
    mesh: str | None = None,
    mask_id: int | None = None,
) -> None:
    """Converts a Hugging Face model to an Orbax checkpoint, atomically.

    Args:
        src: directory with config.json and safetensors, or name of a model on the hub.
        dst: directory to make.
        dtype: dtype of the parameters: bfloat16, float32, int8 as in `models.abstract_weights`, or
            keep for the dtypes of the source.
        mesh: sizes of data, fsdp and tensor like "1,8,1". The parameters pass through the devices
            of this mesh, and their shards are the pieces of the files. None uses one device.
        mask_id: id of the mask token, to be kept with the parameters. None keeps that of the
            source.

    Raises:
        UserError: for unsuitable input, before anything is written, and for errors of the disk.
    """
    refuse_existing(to_path(dst))
    directory = find_hf_directory(src)
    if is_checkpoint(directory):
        raise UserError(
            f"{directory}: already converted. Load it, or convert it back with "
            "python -m convert.to_hf."
        )
    config = read_hf_config(directory)
    if mask_id is not None:
        config = resolve_mask_id(config, directory, mask_id)
    check_companions(directory)  # they are copied last
    source = SafetensorsSource(directory)
    abstract = abstract_params(build(config))
    mapping = map_weights(config, abstract, source.entries)
    source.check(mapping)
    if dtype != "keep":
        abstract = abstract_weights(config, jax.numpy.dtype(dtype))
    leaves = {
        path: jax.ShapeDtypeStruct(
            x.shape, source.dtype_of(mapping.slices[path]) if dtype == "keep" else x.dtype
        )
        for path, x in flatten_dict(abstract, sep="/").items()
    }
    placement: dict[str, jax.sharding.Sharding] = {}
    if mesh is not None:
        placement = flatten_dict(shardings(abstract, make_mesh(mesh), config.family), sep="/")
    with destination_lock(to_path(dst)):
        files = [*source.files, directory / CONFIG_FILE]
        provenance = {"source": _source_name(src), "files": _hashes(files), "dtype": dtype}
        record = make_record(config, provenance, leaves, mapping.variant, _dtypes(source, mapping))
        checkpoint = PartialCheckpoint(dst, record, NOTE)
        _write(checkpoint, source, mapping, leaves, placement)
        checkpoint.finish(directory)


def _write(
    checkpoint: PartialCheckpoint,
    source: SafetensorsSource,
    mapping: WeightMapping,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    placement: Mapping[str, jax.sharding.Sharding],
) -> None:
    """Writes the parameters that the checkpoint lacks."""
    with _progress_bar("converting", sum(map(_nbytes, leaves.values()))) as bar:
        for path, x in leaves.items():
            bar.set_postfix_str(path)
            if path in mapping.slices:  # scales come with their matrix
                _write_stored(checkpoint, source, mapping, path, x, placement)
            bar.update(_nbytes(x))


def _write_stored(
    checkpoint: PartialCheckpoint,
    source: SafetensorsSource,
    mapping: WeightMapping,
    path: str,
    x: jax.ShapeDtypeStruct,
    placement: Mapping[str, jax.sharding.Sharding],
) -> None:
    """Writes one parameter and its scales, unless the checkpoint has them."""
    names = [name for name in (path, path + SCALE) if name in checkpoint.record.leaves]
    if all(map(checkpoint.has, names)):
        return
    try:
        with _on_cpu():
            leaves = read_stored(source, mapping.slices[path], path, x, placement)
    except UserError:  # the source is bad, so the same command cannot continue
        checkpoint.discard()
        raise
    for name in names:
        if not checkpoint.has(name):
            checkpoint.write(name, leaves[name])
    leaves.clear()
    release_memory(_nbytes(x))


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Makes a CPU the default device."""
    # A parameter may exceed the memory of an accelerator.
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX is configured without CPUs
        return contextlib.nullcontext()


def _source_name(src: str | Path) -> str:
    """Returns the name on the hub, or a path's last part."""
    path = to_path(src)
    path = path if is_cloud(path) else path.expanduser()
    return path.resolve().name if path.exists() else str(src)


def _dtypes(source: SafetensorsSource, mapping: WeightMapping) -> dict[str, str]:
    """Returns the dtype of each tensor, and as "" the usual one."""
    dtypes = {name: str(source.entries[name].dtype) for name in mapping.tensors}
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    return {"": usual} | {name: dtype for name, dtype in dtypes.items() if dtype != usual}


def _hashes(files: list[Path]) -> dict[str, str]:
    """Returns the sha256 of each file, by its name."""
    digests = {}
    with _progress_bar("hashing", sum(map(file_size, files))) as bar:
        for file in files:
            digest = hashlib.sha256()
            with open_regular(file) as f:
                while block := f.read(HASH_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            digests[file.name] = digest.hexdigest()
    return digests


def _nbytes(x: jax.ShapeDtypeStruct) -> int:
    return x.dtype.itemsize * int(np.prod(x.shape))


def _progress_bar(description: str, total: int) -> tqdm:
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, dynamic_ncols=True)


def main(arguments: argparse.Namespace) -> None:
    """Converts, and prints source and destination."""
    convert(arguments.src, arguments.dst, arguments.dtype, arguments.mesh, arguments.mask_id)
    print(f"{arguments.src} -> {arguments.dst}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m convert.from_hf",
        description="Convert a Hugging Face checkpoint to an Orbax one that loads in shards.",
    )
    parser.add_argument(
        "src", help="directory with config.json and safetensors, or name of a model on the hub"
    )
    parser.add_argument("dst", help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="dtype of the parameters (default: keep, as in the source)",
    )
    parser.add_argument(
        "--mesh",
        metavar="DATA,FSDP,TENSOR",
        help="mesh sizes like 1,8,1, whose shards become the pieces of the files "
        "(default: one device)",
    )
    parser.add_argument(
        "--mask-id",
        type=int,
        metavar="ID",
        help="id of the mask token, for a model whose files do not name it",
    )
    run_program(main, parser)
