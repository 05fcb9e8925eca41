"""A Hugging Face checkpoint into one that loads in shards: `python -m convert.from_hf SRC DST`.

Parameter after parameter goes from the safetensors files into Orbax, so that memory holds one at a time. A conversion
that was stopped goes on where it was, once the source is seen to be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from convert import run_program
from xflow_jax.checkpoints import (
    PartialCheckpoint,
    WeightMapping,
    huggingface,
    is_checkpoint,
    make_record,
    map_weights,
    refuse_existing,
    release_memory,
    safetensors_reader,
)
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build, shardings
from xflow_jax.parallel import make_mesh

DTYPES = ("keep", "bfloat16", "float32")
BLOCK = 2**24


def convert(src: str | Path, dst: str | Path, dtype: str = "keep", mesh: str | None = None) -> None:
    """Converts a Hugging Face directory, or a model of the hub, into the new directory `dst`, atomically.

    dtype: of the parameters; keep = each as it is in the source. mesh: sizes of data, fsdp and tensor like "1,8,1" over
    which the parameters pass, and which then are the pieces of the files; None = one device. Raises UserError for bad
    input, before anything is written, and for what the disk refuses.
    """
    refuse_existing(Path(dst))
    directory = huggingface.find_hf_directory(src)
    if is_checkpoint(directory):
        raise UserError(
            f"{directory}: already converted; load it, or go back with python -m convert.to_hf"
        )
    config = huggingface.read_hf_config(directory)
    source = safetensors_reader.SafetensorsSource(directory)
    abstract = abstract_params(build(config))
    plan = map_weights(config, abstract, source.entries)
    source.check(plan)
    if dtype != "keep":
        abstract = abstract_params(build(config, param_dtype=np.dtype(jax.numpy.dtype(dtype))))
    leaves = {
        path: jax.ShapeDtypeStruct(
            x.shape, source.dtype_of(plan.leaves[path]) if dtype == "keep" else x.dtype
        )
        for path, x in huggingface.flatten(abstract)
    }
    where: dict[str, Any] = {}
    if mesh is not None:
        where = dict(huggingface.flatten(shardings(abstract, make_mesh(mesh), config.family)))
    files = [*source.files, directory / safetensors_reader.CONFIG]
    provenance = {"source": _source_name(src), "files": _hashes(files), "dtype": dtype}
    record = make_record(
        config, provenance, leaves, variant=plan.variant, dtypes=_dtypes(source, plan)
    )
    kept = "; what is done so far is kept, and the same command goes on from there"
    draft = PartialCheckpoint(dst, record, kept)
    with _bar("converting", sum(map(_size, leaves.values()))) as bar:
        for path, x in leaves.items():
            bar.set_postfix_str(path)
            if not draft.has(path):
                with _on_the_host():
                    leaf = safetensors_reader.read_leaf(
                        source, plan.leaves[path], x.shape, x.dtype, where.get(path)
                    )
                draft.write(path, leaf)
                del leaf
                release_memory(_size(x))
            bar.update(_size(x))
    draft.finish(directory)


def _on_the_host() -> contextlib.AbstractContextManager[Any]:
    """Without a mesh a parameter need not fit on an accelerator, and has nothing to do there."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave CPUs alone
        return contextlib.nullcontext()


def _source_name(src: str | Path) -> str:
    """The hub's name, or the directory's own, without the way there, which means nothing elsewhere."""
    return Path(src).expanduser().resolve().name if Path(src).expanduser().exists() else str(src)


def _dtypes(source: safetensors_reader.SafetensorsSource, plan: WeightMapping) -> dict[str, str]:
    """The dtype of each tensor, the most common one once, under the empty name."""
    dtypes = {name: str(source.entries[name].dtype) for name in plan.tensors}
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    return {"": usual} | {name: dtype for name, dtype in dtypes.items() if dtype != usual}


def _hashes(files: list[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    digests = {}
    with _bar("hashing", sum(file.stat().st_size for file in files)) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as f:
                while block := f.read(BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            digests[file.name] = digest.hexdigest()
    return digests


def _size(x: Any) -> int:
    return x.dtype.itemsize * int(np.prod(x.shape))


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True)


def main(arguments: argparse.Namespace) -> None:
    """The command."""
    convert(arguments.src, arguments.dst, arguments.dtype, arguments.mesh)
    print(f"{arguments.src} -> {arguments.dst}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m convert.from_hf", description="Hugging Face checkpoint -> Orbax"
    )
    parser.add_argument(
        "src", help="directory with config.json and safetensors, or a model's name on the hub"
    )
    parser.add_argument("dst", help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="of the parameters (default: as in the source)",
    )
    parser.add_argument(
        "--mesh", metavar="DATA,FSDP,TENSOR", help="sizes like 1,8,1 (default: one device)"
    )
    run_program(main, parser)
