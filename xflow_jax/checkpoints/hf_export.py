"""Export to the Hugging Face format, one parameter at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from xflow_jax.checkpoints.atomic_write import atomic_directory
from xflow_jax.checkpoints.checksums import CHECKSUM_FILE, write_checksums
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.huggingface import copy_companions
from xflow_jax.checkpoints.leaf_shards import copy_cast
from xflow_jax.checkpoints.safetensors_header import DTYPES
from xflow_jax.checkpoints.safetensors_reader import CONFIG_FILE, INDEX, SINGLE
from xflow_jax.checkpoints.weight_map import TensorSlice, WeightMapping, map_weights
from xflow_jax.errors import UserError, describe, require
from xflow_jax.input_files import to_path
from xflow_jax.models import abstract_params, build
from xflow_jax.types import ModelConfig, Params

MAX_SHARD = 5_000_000_000  # bytes of a file
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_hf(
    path: str | Path,
    params: Params,
    config: ModelConfig,
    tokenizer_dir: str | Path | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD,
    texts: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Writes parameters as a Hugging Face directory, atomically.

    Args:
        path: the directory to make.
        params: parameters, arrays that this process can read completely.
        config: their configuration.
        tokenizer_dir: directory whose tokenizer files are copied, or None.
        dtype: dtype of the tensors, except of those that are always float32. None keeps the dtypes
            of the parameters.
        max_shard_size: bytes of a file. Larger models become several files and an index.
        texts: name -> content of further files.
        replace: replace an earlier directory of this name instead of refusing it.

    Raises:
        UserError: if `path` exists or is being written, or if the disk is full.
        ValueError: if the parameters do not belong to the configuration.
    """
    leaves = flatten_dict(params, sep="/")
    abstract = abstract_params(build(config, param_dtype=dtype or np.float32))
    check_shapes(abstract, {name: x.shape for name, x in leaves.items()})
    mapping = map_weights(config, params)
    typed = leaves if dtype is None else flatten_dict(abstract, sep="/")
    dtypes = {
        part.tensor: np.dtype(typed[name].dtype)
        for name, slices in mapping.slices.items()
        for part in slices
    }

    def read(name: str) -> np.ndarray:
        return np.asarray(jax.device_get(leaves[name]))

    write_tensors(
        to_path(path),
        mapping,
        dtypes,
        config.to_hf(),
        read,
        tokenizer_dir,
        max_shard_size,
        texts=texts,
        replace=replace,
    )


def check_shapes(abstract: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares parameters with those of a configuration.

    Args:
        abstract: the abstract tree of the configuration (`models.abstract_params`).
        shapes: path -> shape of the parameters.

    Raises:
        ValueError: if paths or shapes differ.
    """
    expected = {name: tuple(x.shape) for name, x in flatten_dict(abstract, sep="/").items()}
    actual = {name: tuple(shape) for name, shape in shapes.items()}
    if differing := sorted(expected.items() ^ actual.items()):
        raise ValueError(
            f"not the parameters of this configuration: {differing[0][0]} is missing, extra "
            "or of a wrong shape"
        )


def write_tensors(
    path: Path,
    mapping: WeightMapping,
    dtypes: Mapping[str, np.dtype],
    config: dict[str, Any],
    read: Callable[[str], np.ndarray],
    companions: str | Path | None = None,
    max_shard_size: int = MAX_SHARD,
    progress: bool = False,
    texts: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Writes a Hugging Face directory, atomically.

    Parameters are read one by one. What a killed program left of the directory is deleted.

    Args:
        path: the directory to make.
        mapping: the tensors and the parameters that they come from.
        dtypes: dtype of each tensor.
        config: the dict of config.json.
        read: function from the path of a parameter to its values. It is called once for each.
        companions: directory whose tokenizer files are copied, or None.
        max_shard_size: bytes of a file.
        progress: True shows a progress bar.
        texts: name -> content of further files.
        replace: replace an earlier directory of this name instead of refusing it.

    Raises:
        UserError: if `path` exists or is being written, if the disk is full, or if a value is NaN
            or infinite.
    """
    shards = _shard_layout(mapping, dtypes, max_shard_size)
    locations = {
        tensor: (shard.name, start) for shard in shards for tensor, start in shard.starts.items()
    }
    with atomic_directory(path, replace) as folder:
        for name, text in {
            CONFIG_FILE: json.dumps(config, indent=2) + "\n",
            **(texts or {}),
        }.items():
            (folder / name).write_text(text)
        if companions is not None:
            copy_companions(to_path(companions), folder, config)
        for shard in shards:
            (folder / shard.name).write_bytes(shard.header)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(_tensor_sizes(mapping, dtypes).values())},
                "weight_map": {name: locations[name][0] for name in sorted(locations)},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        from tqdm import tqdm  # not in a plain JAX installation, in which nothing is exported

        with tqdm(
            total=len(mapping.tensors), desc="writing", unit="tensor", disable=not progress
        ) as bar:
            for group in mapping.groups():
                leaves = {name: read(name) for name in group}
                for name, data in _tensors(mapping, dtypes, leaves):
                    require(
                        is_finite(data),
                        f"{path}: the tensor {name} holds NaN or infinity in {data.dtype.name}. "
                        "The training has diverged, or the values need float32.",
                    )
                    file, start = locations[name]
                    with (folder / file).open("r+b") as f:
                        f.seek(start)
                        f.write(data.reshape(-1).view(np.uint8).data)
                    bar.update()
        # The others may be edited by hand.
        write_checksums(folder, CHECKSUM_FILE, only=[shard.name for shard in shards])


def _tensors(
    mapping: WeightMapping, dtypes: Mapping[str, np.dtype], leaves: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, values) of the tensors of these parameters."""
    parts: dict[str, list[tuple[TensorSlice, np.ndarray]]] = {}
    for path, values in leaves.items():
        for part in mapping.slices[path]:
            # The ellipsis keeps a single number an array.
            where: tuple[int | EllipsisType, ...] = (*part.index, ...)
            parts.setdefault(part.tensor, []).append((part, values[where]))
    for name, slices in parts.items():
        data = np.empty(mapping.tensors[name], dtypes[name])
        for part, values in slices:
            copy_cast(values, part.view(data))
        yield name, data


def _tensor_sizes(mapping: WeightMapping, dtypes: Mapping[str, np.dtype]) -> dict[str, int]:
    """Returns the bytes of each tensor."""
    return {
        name: dtypes[name].itemsize * int(np.prod(shape)) for name, shape in mapping.tensors.items()
    }


@dataclass(frozen=True)
class Shard:
    """Layout of a safetensors file.

    Attributes:
        name: name of the file.
        header: its first bytes, up to those of the tensors.
        starts: name of a tensor -> position of its first byte.
    """

    name: str
    header: bytes
    starts: dict[str, int]


def _shard_layout(
    mapping: WeightMapping, dtypes: Mapping[str, np.dtype], max_shard_size: int
) -> list[Shard]:
    """Distributes the tensors over files, layer by layer.

    A file has at most `max_shard_size` bytes. A larger tensor has a file of its own.
    """
    sizes = _tensor_sizes(mapping, dtypes)
    groups: list[list[str]] = [[]]
    room = max_shard_size
    for name in sorted(
        sizes, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]
    ):
        if sizes[name] > room and groups[-1]:
            groups.append([])
            room = max_shard_size
        groups[-1].append(name)
        room -= sizes[name]
    shards = []
    for number, names in enumerate(groups, 1):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        # Wide dtypes come first, so that every tensor begins at a multiple of its item size. torch
        # then maps the tensors in place.
        for name in sorted(names, key=lambda name: -dtypes[name].itemsize):
            starts[name], end = end, end + sizes[name]
            header[name] = {
                "dtype": _DTYPE_CODES[dtypes[name]],
                "shape": mapping.tensors[name],
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shards.append(
            Shard(
                file,
                len(text).to_bytes(8, "little") + text,
                {name: base + start for name, start in starts.items()},
            )
        )
    return shards


def parse_size(text: str) -> int:
    """Parses a size like 5GB, 500MB or 4GiB.

    Returns:
        Bytes.

    Raises:
        UserError: for any other text.
    """
    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE
    )
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(
            f"size {describe(text)} must be a positive number of bytes, like 5GB, 500MB or 4GiB"
        )
    return size
