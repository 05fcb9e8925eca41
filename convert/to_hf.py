"""A converted checkpoint back into the Hugging Face format: `python -m convert.to_hf SRC DST`."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from convert import run_program
from xflow_jax.checkpoints import (
    MAX_SHARD,
    abstract_model,
    flatten,
    is_checkpoint,
    map_weights,
    parse_size,
    read_leaf,
    read_record,
    refuse_existing,
    release_memory,
    write_tensors,
)
from xflow_jax.errors import UserError

DTYPES = ("source", "bfloat16", "float32")


def convert(
    src: str | Path, dst: str | Path, dtype: str = "source", max_shard_size: int = MAX_SHARD
) -> None:
    """Writes the Hugging Face directory `dst` from a converted one, atomically: config, tensors, tokenizer.

    dtype: of the tensors, but for those that are float32 always; source = as they were before they were converted, or
    the parameters' own where these are narrower or were never converted. max_shard_size: bytes of a file. Raises
    UserError for bad input and for what the disk refuses.
    """
    src, dst = Path(src).expanduser(), Path(dst)
    refuse_existing(dst)
    if not is_checkpoint(src):
        state = "not a converted checkpoint" if src.is_dir() else "there is no such directory"
        raise UserError(f"{src}: {state}; make one with python -m convert.from_hf")
    record = read_record(src)
    config, abstract = abstract_model(
        src, record, jax.numpy.dtype("float32" if dtype == "source" else dtype)
    )
    asked = {path: jax.numpy.dtype(x.dtype) for path, x in flatten(abstract)}
    plan = map_weights(config, abstract, variant=record.variant)
    dtypes = {}
    for path, pieces in plan.leaves.items():
        own = jax.numpy.dtype(record.leaves[path][0])
        for piece in pieces:
            name = (record.dtypes or {}).get(piece.tensor, (record.dtypes or {}).get("", own.name))
            before = jax.numpy.dtype(name)
            exact = before if jax.numpy.promote_types(own, before) == own else own
            dtypes[piece.tensor] = exact if dtype == "source" else asked[path]

    def leaf(path: str) -> np.ndarray:
        dtype, *shape = record.leaves[path]
        release_memory(jax.numpy.dtype(dtype).itemsize * int(np.prod(shape)))
        return read_leaf(src, record, path, jax.numpy.dtype(dtype))

    write_tensors(dst, plan, dtypes, record.config, leaf, src, max_shard_size, progress=True)


def main(arguments: argparse.Namespace) -> None:
    """The command."""
    convert(arguments.src, arguments.dst, arguments.dtype, parse_size(arguments.max_shard_size))
    print(f"{arguments.src} -> {arguments.dst}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m convert.to_hf", description="Orbax checkpoint -> Hugging Face"
    )
    parser.add_argument("src", help="directory made by convert.from_hf, or by a training program")
    parser.add_argument("dst", help="directory to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="source", help="of the tensors (default: as they came)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of each file (default: 5GB)"
    )
    run_program(main, parser)
