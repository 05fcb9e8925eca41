"""Conversion from Orbax to Hugging Face: `python -m convert.to_hf SRC DST`."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from convert import run_program
from xflow_jax.checkpoints import (
    MAX_SHARD,
    abstract_model,
    is_checkpoint,
    map_weights,
    parse_size,
    read_leaf,
    read_record,
    refuse_existing,
    release_memory,
    write_tensors,
)
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import is_cloud, to_path

DTYPES = ("source", "bfloat16", "float32")


def convert(
    src: str | Path, dst: str | Path, dtype: str = "source", max_shard_size: int = MAX_SHARD
) -> None:
    """Writes a converted checkpoint as a Hugging Face directory, atomically.

    Args:
        src: the converted checkpoint.
        dst: directory to make, with config, tensors and tokenizer.
        dtype: dtype of the tensors: bfloat16, float32 or source. Tensors that are always float32
            stay so. source restores the dtypes from before the conversion. If those of the
            parameters are narrower, or if there was no conversion, it keeps those of the
            parameters.
        max_shard_size: bytes of a file.

    Raises:
        UserError: for unsuitable input, such as int8, and for errors of the disk.
    """
    src, dst = to_path(src), to_path(dst)
    src = src if is_cloud(src) else src.expanduser()
    refuse_existing(dst)
    if not is_checkpoint(src):
        state = "not a converted checkpoint" if src.is_dir() else "there is no such directory"
        raise UserError(f"{src}: {state}. Make one with python -m convert.from_hf.")
    record = read_record(src, large=True)
    require(
        not record.is_int8,
        f"{src}: its matrices are int8, which the original code cannot read. "
        "Convert back a float32 or bfloat16 checkpoint.",
    )
    config, abstract = abstract_model(
        src, record, jax.numpy.dtype("float32" if dtype == "source" else dtype)
    )
    requested = {
        path: jax.numpy.dtype(x.dtype) for path, x in flatten_dict(abstract, sep="/").items()
    }
    mapping = map_weights(config, abstract, variant=record.variant)
    recorded = record.dtypes or {}
    dtypes = {}
    for path, slices in mapping.slices.items():
        own = jax.numpy.dtype(record.leaves[path][0])
        for part in slices:
            before = jax.numpy.dtype(recorded.get(part.tensor, recorded.get("", own.name)))
            exact = before if jax.numpy.promote_types(own, before) == own else own
            dtypes[part.tensor] = exact if dtype == "source" else requested[path]

    def read(path: str) -> np.ndarray:
        own, *shape = record.leaves[path]
        release_memory(jax.numpy.dtype(own).itemsize * int(np.prod(shape)))
        return np.asarray(read_leaf(src, record, path, jax.numpy.dtype(own)))

    write_tensors(dst, mapping, dtypes, record.config, read, src, max_shard_size, progress=True)


def main(arguments: argparse.Namespace) -> None:
    """Converts, and prints source and destination."""
    convert(arguments.src, arguments.dst, arguments.dtype, parse_size(arguments.max_shard_size))
    print(f"{arguments.src} -> {arguments.dst}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m convert.to_hf",
        description="Convert an Orbax checkpoint to a Hugging Face directory.",
    )
    parser.add_argument("src", help="directory made by convert.from_hf or by a training program")
    parser.add_argument("dst", help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="source",
        help="dtype of the tensors (default: source, as before the conversion)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file (default: 5GB)",
    )
    run_program(main, parser)
