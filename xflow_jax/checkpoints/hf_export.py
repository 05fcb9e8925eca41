"""Parameters out into the Hugging Face format, one parameter in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xflow_jax.checkpoints.atomic_write import atomic_directory, copy_files
from xflow_jax.checkpoints.huggingface import COMPANIONS, flatten
from xflow_jax.checkpoints.safetensors_reader import CONFIG, DTYPES, INDEX, SINGLE, copy_cast
from xflow_jax.checkpoints.weight_map import TensorSlice, WeightMapping, map_weights
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build

MAX_SHARD = 5_000_000_000


_CODES = {dtype: code for code, dtype in DTYPES.items()}


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_hf(
    path: str | Path,
    params: Any,
    config: Any,
    tokenizer_dir: str | Path | None = None,
    dtype: Any = None,
    max_shard_size: int = MAX_SHARD,
) -> None:
    """Writes parameters (arrays, of this process) as a Hugging Face directory, atomically.

    dtype: of the tensors (None: the parameters' own), but for those that are float32 always. tokenizer_dir: where the
    tokenizer's files are. max_shard_size: bytes; more become several files and an index. Raises UserError where `path`
    exists or the disk is full, ValueError where the parameters are not those of the configuration.
    """
    leaves = dict(flatten(params))
    abstract = abstract_params(build(config, param_dtype=dtype or np.float32))
    check_shapes(abstract, {name: x.shape for name, x in leaves.items()})
    plan = map_weights(config, params)
    kinds = {
        name: np.dtype(x.dtype)
        for name, x in (leaves.items() if dtype is None else flatten(abstract))
    }
    dtypes = {piece.tensor: kinds[name] for name, pieces in plan.leaves.items() for piece in pieces}

    def leaf(name: str) -> np.ndarray:
        return np.asarray(jax.device_get(leaves[name]))

    write_tensors(Path(path), plan, dtypes, config.to_hf(), leaf, tokenizer_dir, max_shard_size)


def check_shapes(abstract: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless these are the paths and shapes of the leaves of a configuration's abstract tree."""
    wanted = {name: tuple(x.shape) for name, x in flatten(abstract)}
    if differ := sorted(
        wanted.items() ^ {name: tuple(shape) for name, shape in shapes.items()}.items()
    ):
        name = differ[0][0]
        raise ValueError(
            f"not the parameters of this configuration: {name} is missing, extra or of a wrong shape"
        )


def write_tensors(
    path: Path,
    plan: WeightMapping,
    dtypes: Mapping[str, np.dtype],
    config: dict[str, Any],
    leaf: Callable[[str], np.ndarray],
    companions: str | Path | None = None,
    max_shard_size: int = MAX_SHARD,
    progress: bool = False,
) -> None:
    """Writes a Hugging Face directory, atomically; a UserError tells what stands in the way.

    leaf: path of a parameter -> its values, asked for once each. dtypes: of each tensor. config: the dict of
    config.json. companions: a directory whose tokenizer files are copied.
    """
    shards = _shard_layout(plan, dtypes, max_shard_size)
    places = {
        tensor: (shard.name, start) for shard in shards for tensor, start in shard.starts.items()
    }
    with atomic_directory(path) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if companions is not None:
            copy_files(Path(companions), folder, COMPANIONS)
        for shard in shards:
            (folder / shard.name).write_bytes(shard.header)
        if len(shards) > 1:
            size = sum(
                dtypes[name].itemsize * int(np.prod(shape)) for name, shape in plan.tensors.items()
            )
            index = {
                "metadata": {"total_size": size},
                "weight_map": {name: places[name][0] for name in sorted(places)},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        with tqdm(
            total=len(plan.tensors), desc="writing", unit="tensor", disable=not progress
        ) as bar:
            for group in plan.groups():
                for name, data in _tensors(
                    plan, dtypes, {parameter: leaf(parameter) for parameter in group}
                ):
                    file, start = places[name]
                    with (folder / file).open("r+b") as f:
                        f.seek(start)
                        f.write(data.reshape(-1).view(np.uint8).data)
                    bar.update()


def _tensors(
    plan: WeightMapping, dtypes: Mapping[str, np.dtype], leaves: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that are made of these parameters, one at a time."""
    parts: dict[str, list[tuple[TensorSlice, np.ndarray]]] = {}
    for path, values in leaves.items():
        for piece in plan.leaves[path]:
            parts.setdefault(piece.tensor, []).append((piece, values[(*piece.index, ...)]))
    for name, pieces in parts.items():
        data = np.empty(plan.tensors[name], dtypes[name])
        for piece, values in pieces:
            copy_cast(values, piece.view(data))
        yield name, data


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its header, and where in it each tensor's bytes start."""

    name: str
    header: bytes
    starts: dict[str, int]


def _shard_layout(
    plan: WeightMapping, dtypes: Mapping[str, np.dtype], max_shard_size: int
) -> list[Shard]:
    """The files, filled layer after layer up to `max_shard_size` bytes; a tensor larger than that has one to itself."""
    sizes = {
        name: dtypes[name].itemsize * int(np.prod(shape)) for name, shape in plan.tensors.items()
    }
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
        # Wide dtypes first, so that every tensor begins at a multiple of its item size: torch maps them in place.
        for name in sorted(names, key=lambda name: -dtypes[name].itemsize):
            starts[name], end = end, end + sizes[name]
            offsets = [starts[name], end]
            header[name] = {
                "dtype": _CODES[dtypes[name]],
                "shape": plan.tensors[name],
                "data_offsets": offsets,
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
    """Bytes of a size like 5GB, 500MB or 4GiB; UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(
            f"size {text!r} must be a positive number of bytes, like 5GB, 500MB or 4GiB"
        )
    return size
