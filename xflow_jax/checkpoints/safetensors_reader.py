"""Checkpoints in the Hugging Face format, config.json and safetensors, read tensor by tensor.

A safetensors file is an 8-byte length, a JSON header of that length, and the tensors' bytes. It is read here without
its library, so that only what is asked for is ever in memory, and a damaged file is told from a wrong one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from xflow_jax.checkpoints.weight_map import TensorSlice, WeightMapping
from xflow_jax.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


class SafetensorsSource:
    """The tensors of a Hugging Face directory: their shapes at once, their values when asked for.

    Raises UserError for a directory without weights, a missing, truncated or damaged file, and a tensor told twice.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self.files = [directory / name for name in _weight_files(directory)]
        for file in self.files:
            for name, entry in _read_header(file).items():
                if name in self.entries:
                    raise UserError(
                        f"{file}: the tensor {name} is already in {self.entries[name].file.name}"
                    )
                self.entries[name] = entry

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, as they are stored."""
        entry = self.entries[name]
        data = np.empty(entry.shape, entry.dtype)
        with entry.file.open("rb") as f:
            f.seek(entry.start)
            if f.readinto(data.reshape(-1).view(np.uint8)) != entry.nbytes:
                raise UserError(
                    f"{entry.file}: the file ends inside the tensor {name}; fetch it again"
                )
        return data

    def check(self, plan: WeightMapping) -> None:
        """Holds the tensors against a plan, both ways; UserError names what is missing, extra or of a wrong shape."""
        kind = f"a {plan.family} model of this {CONFIG}"
        ours = _experts({name: entry.shape for name, entry in self.entries.items()})
        if ours != (wanted := _experts(plan.tensors)) and ours and wanted:
            raise UserError(
                f"{self.directory}: the layers have {ours} experts, but {kind} has {wanted}"
            )
        if missing := [name for name in plan.tensors if name not in self.entries]:
            raise UserError(
                f"{self.directory}: the tensor {_first(missing)} is missing, but {kind} has it"
            )
        extra = [
            name for name in self.entries if name not in plan.tensors and not plan.ignores(name)
        ]
        if extra:
            raise UserError(
                f"{self.entries[extra[0]].file}: the tensor {_first(extra)} is no part of {kind}"
            )
        for name, shape in plan.tensors.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise UserError(
                    f"{entry.file}: the tensor {name} has the shape {list(entry.shape)}, "
                    f"but {kind} has {list(shape)} there"
                )

    def dtype_of(self, pieces: Collection[TensorSlice]) -> np.dtype:
        """The dtype that holds all these pieces without loss."""
        return np.dtype(jnp.result_type(*{self.entries[piece.tensor].dtype for piece in pieces}))


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many experts the layers have by the names of tensors, or by their shapes where a layer's are one tensor."""
    single = [
        int(match[1]) + 1 for name in shapes if (match := re.search(r"\.experts\.(\d+)\.", name))
    ]
    stacked = [
        shape[0] for name, shape in shapes.items() if re.search(r"\.experts\.\w+$", name) and shape
    ]
    return max(single + stacked, default=0)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files: those that the index tells, or the single one."""
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).exists():
            return [SINGLE]
        other = sorted(
            file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth")
        )
        hint = f"; {other[0]} must be saved as safetensors first" if other else ""
        raise UserError(f"{directory}: there is neither {SINGLE} nor {INDEX}{hint}")
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index}: not a JSON object with a weight_map of tensors to files"
        ) from None
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not the name of a file beside it")
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: the file is missing, but {INDEX} names it")
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise UserError(
                f"{file}: a Git LFS pointer, not the weights themselves; fetch them with git lfs pull"
            )
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length <= MAX_HEADER and size < 8 + length:
            raise UserError(f"{file}: truncated inside its header: {size} bytes; fetch it again")
        try:
            header = (
                json.loads(f.read(length)) if len(start) == 8 and length <= MAX_HEADER else None
            )
            header.pop("__metadata__", None)
            entries = {
                name: _entry(file, name, value, 8 + length) for name, value in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: not a safetensors file, or damaged; fetch it again") from None
    wanted = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < wanted:
        raise UserError(f"{file}: truncated: it has {size} bytes of {wanted}; fetch it again")
    return entries


def _entry(file: Path, name: str, value: dict[str, Any], base: int) -> TensorEntry:
    if value["dtype"] not in DTYPES:
        right = ", ".join(DTYPES)
        raise UserError(
            f"{file}: the tensor {name} has the dtype {value['dtype']}, but it must be one of {right}"
        )
    start, stop = value["data_offsets"]
    entry = TensorEntry(file, DTYPES[value["dtype"]], tuple(value["shape"]), base + start)
    if stop - start != entry.nbytes or start < 0:
        raise ValueError(name)
    return entry


def read_leaf(
    source: SafetensorsSource,
    pieces: Collection[TensorSlice],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding | None = None,
) -> jax.Array:
    """One parameter, put together from its tensors and cast: on the default device, or into this process's shards.

    Each tensor is read once; in memory are one tensor and the shards.
    """
    whole = tuple((0, size) for size in shape)
    regions = {None: whole}
    if sharding is not None:
        indices = sharding.addressable_devices_indices_map(shape)
        regions = {
            device: tuple(
                index.indices(size)[:2] for index, size in zip(indices[device], shape, strict=True)
            )
            for device in indices
        }
    shards = {
        region: _aligned([stop - start for start, stop in region], dtype)
        for region in regions.values()
    }
    for piece in pieces:
        n = len(piece.index)
        wanted = [
            region
            for region in shards
            if all(a <= i < b for i, (a, b) in zip(piece.index, region[:n], strict=True))
        ]
        if not wanted:
            continue
        part = piece.view(source.read(piece.tensor))
        for region in wanted:
            at = tuple(i - start for i, (start, _) in zip(piece.index, region[:n], strict=True))
            copy_cast(
                part[tuple(slice(*bounds) for bounds in region[n:])], shards[region][(*at, ...)]
            )
    if sharding is None:
        return jax.device_put(shards.pop(whole))
    placed = [jax.device_put(shards[region], device) for device, region in regions.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An empty array that JAX takes over on CPUs instead of copying it: its address is a multiple of 64."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_cast(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, cast, in the order that memory likes: a transposed matrix goes over in narrow strips.

    Done in one go it takes five times as long; so does NumPy's handling of bfloat16, which is a type foreign to it.
    """
    if target.strides[-1] != target.itemsize:
        source, target = source.swapaxes(-1, -2), target.swapaxes(-1, -2)
    turned = source.ndim > 1 and source.strides[-1] != source.itemsize
    width = 32 if turned else source.shape[-1]
    for start in range(0, source.shape[-1], width):
        strip = (..., slice(start, start + width))
        values = source[strip].astype(target.dtype, copy=False)
        if target.dtype.itemsize == 2:
            target.view(np.uint16)[strip] = values.view(np.uint16)
        else:
            target[strip] = values
