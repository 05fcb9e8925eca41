"""Lazy reader of Hugging Face safetensors, tensor by tensor.

A safetensors file is an 8-byte length, a JSON header of that length, and the bytes of the tensors.
This module reads it without the library of the format. So only the requested tensors are in memory,
and a damaged file is distinguished from an unsuitable one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.checksums import CHECKSUM_FILE, compares_large_files, first_damage
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.weight_map import TensorSlice, WeightMapping
from xflow_jax.errors import UserError, describe
from xflow_jax.input_files import file_inside, open_regular, parse_json, read_json

CONFIG_FILE, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER = 100_000_000  # bytes, as in the library of the format

Region = tuple[tuple[int, int], ...]  # (start, stop) in each dimension of an array


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor.

    Attributes:
        file: the file.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        start: position of the first byte in the file.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)  # exact, unlike np.prod


class SafetensorsSource:
    """Tensors of a Hugging Face directory, read on request.

    Attributes:
        directory: the directory.
        entries: name of a tensor -> its location.
        files: the safetensors files.
    """

    def __init__(self, directory: Path):
        """Reads the headers of all files.

        Directories that this library wrote have a files.json. Its checksums are compared, unless
        XFLOW_VERIFY is 0.

        Args:
            directory: the directory.

        Raises:
            UserError: if there are no weights, if a file is missing, truncated or damaged, or if
                two files hold the same tensor.
        """
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
        if compares_large_files():
            self._compare_checksums()

    def _compare_checksums(self) -> None:
        """Raises UserError if a file is not as files.json describes it."""
        path = file_inside(self.directory, CHECKSUM_FILE)
        listed = read_json(path) if path.exists() else {}
        # Another program may give this name to a file of another form.
        listed = listed if isinstance(listed, dict) else {}
        own = {file.name: listed[file.name] for file in self.files if file.name in listed}
        try:
            damage = first_damage(self.directory, own, large=True, shared=True)
        except (TypeError, ValueError):
            return
        if damage is not None:
            name, state = damage
            raise UserError(
                f"{self.directory / name}: the file {state}. Copy it again. "
                f"If it was replaced on purpose, delete {CHECKSUM_FILE} beside it."
            )

    def read(self, name: str) -> np.ndarray:
        """Reads the values of a tensor, in their dtype."""
        entry = self.entries[name]
        data = np.empty(entry.shape, entry.dtype)
        with entry.file.open("rb") as f:
            f.seek(entry.start)
            if f.readinto(data.reshape(-1).view(np.uint8).data) != entry.nbytes:
                raise UserError(
                    f"{entry.file}: the file ends inside the tensor {name}. Fetch it again."
                )
        return data

    def check(self, mapping: WeightMapping) -> None:
        """Compares the tensors with those of a mapping, in both directions.

        Args:
            mapping: the tensors that must be there.

        Raises:
            UserError: if a tensor is missing, extra or of a wrong shape.
        """
        model = f"a {mapping.family} model of this {CONFIG_FILE}"
        found = _count_experts({name: entry.shape for name, entry in self.entries.items()})
        expected = _count_experts(mapping.tensors)
        if found != expected and found and expected:
            raise UserError(
                f"{self.directory}: the layers have {found} experts, but {model} has {expected}"
            )
        if missing := [name for name in mapping.tensors if name not in self.entries]:
            raise UserError(
                f"{self.directory}: the tensor {_first(missing)} is missing, but {model} has it"
            )
        extra = [
            name
            for name in self.entries
            if name not in mapping.tensors
            and name not in mapping.copies
            and not mapping.ignores(name)
        ]
        if extra:
            raise UserError(
                f"{self.entries[extra[0]].file}: the tensor {_first(extra)} is no part of {model}"
            )
        for name, shape in mapping.tensors.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise UserError(
                    f"{entry.file}: the tensor {name} has the shape {list(entry.shape)}, "
                    f"but {model} has {list(shape)} there"
                )

        for name, original in mapping.copies.items():
            if name in self.entries and not np.array_equal(self.read(name), self.read(original)):
                raise UserError(
                    f"{self.entries[name].file}: the tensor {name} differs from {original}, but "
                    f"{model} has one table for both. Correct tie_word_embeddings."
                )

    def dtype_of(self, slices: Collection[TensorSlice]) -> np.dtype:
        """Returns the dtype that holds all these parts without loss."""
        return np.dtype(jnp.result_type(*{self.entries[part.tensor].dtype for part in slices}))


def _count_experts(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Counts the experts by the names of tensors or their shapes."""
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
    """Returns the names of the safetensors files."""
    index = file_inside(directory, INDEX)
    if not index.exists():
        if file_inside(directory, SINGLE).exists():
            return [SINGLE]
        other = sorted(
            file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth")
        )
        hint = f". {other[0]} must be saved as safetensors first." if other else ""
        raise UserError(f"{directory}: there is neither {SINGLE} nor {INDEX}{hint}")
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not a JSON object with a weight_map of tensors to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index}: {describe(name)} is not the name of a file beside it")
    files = sorted(set(weight_map.values()))
    for name in files:
        if not os.path.exists(file_inside(directory, name)):  # Path.exists fails for long names
            raise UserError(f"{directory / name}: the file is missing, but {INDEX} names it")
    if SINGLE not in files and os.path.exists(directory / SINGLE):
        raise UserError(
            f"{directory}: it has both {SINGLE} and {INDEX}, which names other files. "
            "Remove the one that is out of date."
        )
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Reads a file's header and checks the file's size."""
    with open_regular(file) as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        if start == b"version ":
            raise UserError(
                f"{file}: a Git LFS pointer, not the weights themselves. "
                "Fetch them with git lfs pull."
            )
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length <= MAX_HEADER and size < 8 + length:
            raise UserError(f"{file}: truncated inside its header: {size} bytes. Fetch it again.")
        try:
            if len(start) < 8 or length > MAX_HEADER:
                raise ValueError("no header")
            header = _parse_header(f.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: _tensor_entry(file, name, value, 8 + length) for name, value in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{file}: not a safetensors file, or damaged. Fetch it again."
            ) from None
    expected = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < expected:
        raise UserError(f"{file}: truncated: it has {size} bytes of {expected}. Fetch it again.")
    _check_layout(file, entries, 8 + length, size)
    return entries


def _check_layout(file: Path, entries: Mapping[str, TensorEntry], start: int, stop: int) -> None:
    """Raises UserError unless the tensors fill the bytes of a file exactly."""
    end, before = start, ""
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].start, item[1].start + item[1].nbytes)
    ):
        if entry.start < end:
            raise UserError(f"{file}: the tensors {before} and {name} overlap. Fetch it again.")
        if entry.start > end:
            raise UserError(
                f"{file}: {entry.start - end} bytes before the tensor {name} belong to none. "
                "Fetch it again."
            )
        end, before = entry.start + entry.nbytes, name
    if end != stop:
        raise UserError(f"{file}: its last {stop - end} bytes belong to no tensor. Fetch it again.")


def _parse_header(data: bytes) -> dict[str, Any]:
    """Parses the JSON of a header. Raises ValueError if damaged."""
    try:
        header = parse_json(data.decode(), "header")
    except UserError as error:
        raise ValueError(str(error)) from None
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header


def _tensor_entry(file: Path, name: str, value: dict[str, Any], base: int) -> TensorEntry:
    """Converts an entry of a header. Raises ValueError if damaged."""
    if str(value["dtype"]) not in DTYPES:
        right = ", ".join(DTYPES)
        raise UserError(
            f"{file}: the tensor {name} has the dtype {value['dtype']}, "
            f"but it must be one of {right}"
        )
    (start, stop), shape = value["data_offsets"], value["shape"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape)):
        raise ValueError(name)
    entry = TensorEntry(file, DTYPES[value["dtype"]], tuple(shape), base + start)
    if stop - start != entry.nbytes or start < 0:
        raise ValueError(name)
    return entry


def read_hf_leaf(
    source: SafetensorsSource,
    slices: Collection[TensorSlice],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> jax.Array:
    """Reads one parameter from its tensors.

    Each tensor is read once. One tensor and the shards of this process are in memory.

    Args:
        source: the tensors.
        slices: the parts of the parameter.
        shape: its shape.
        dtype: dtype to cast it to.
        sharding: its sharding, or None for the default device.

    Returns:
        The parameter. With a sharding, this process reads only its own shards.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    complete = tuple((0, size) for size in shape)
    regions: dict[jax.Device | None, Region] = {None: complete}
    if sharding is not None:
        regions = {
            device: tuple(
                slice_.indices(size)[:2] for slice_, size in zip(index or (), shape, strict=True)
            )
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
    shards = {
        region: _empty_aligned([stop - start for start, stop in region], dtype)
        for region in regions.values()
    }
    for part in slices:
        _copy_part(source, part, shards)
    if not all(map(is_finite, shards.values())):
        _refuse_values(source, slices, dtype)
    if sharding is None:
        return jax.device_put(shards.pop(complete))
    placed = [jax.device_put(shards[region], device) for device, region in regions.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _refuse_values(
    source: SafetensorsSource, slices: Collection[TensorSlice], dtype: DTypeLike
) -> NoReturn:
    """Raises UserError that names the tensor whose values are not finite."""
    for name in {part.tensor: None for part in slices}:
        if not is_finite(source.read(name)):
            raise UserError(
                f"{source.entries[name].file}: the tensor {name} holds NaN or infinity. "
                "Fetch it again, or train the model again."
            )
    raise UserError(
        f"{source.directory}: values of {next(iter(slices)).tensor} are too large for "
        f"{np.dtype(dtype).name}. Choose float32."
    )


def _copy_part(
    source: SafetensorsSource, part: TensorSlice, shards: Mapping[Region, np.ndarray]
) -> None:
    """Copies one part of a parameter into the shards that contain it."""
    n = len(part.index)
    targets = [
        region
        for region in shards
        if all(start <= i < stop for i, (start, stop) in zip(part.index, region[:n], strict=True))
    ]
    if not targets:
        return
    values = part.view(source.read(part.tensor))
    for region in targets:
        position = tuple(i - start for i, (start, _) in zip(part.index, region[:n], strict=True))
        cut = tuple(slice(*bounds) for bounds in region[n:])
        # The ellipsis keeps a single number an array, which can be written to.
        where: tuple[int | EllipsisType, ...] = (*position, ...)
        copy_cast(values[cut], shards[region][where])


def _empty_aligned(shape: list[int], dtype: DTypeLike) -> np.ndarray:
    """Allocates an array that JAX on CPUs adopts without a copy."""
    # JAX requires an address that is a multiple of 64.
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_cast(source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array with a cast, in an order that suits memory.

    A transposed matrix is copied in narrow strips: as a whole it takes five times as long. 16-bit
    values are copied as integers, because NumPy is equally slow with bfloat16, an extension type.

    Args:
        source: array to read.
        target: array of the same shape to write.
    """
    if target.strides[-1] != target.itemsize:
        source, target = source.swapaxes(-1, -2), target.swapaxes(-1, -2)
    transposed = source.ndim > 1 and source.strides[-1] != source.itemsize
    width = 32 if transposed else source.shape[-1]
    for start in range(0, source.shape[-1], width):
        strip = (..., slice(start, start + width))
        with np.errstate(over="ignore"):  # infinity is found behind the copy
            values = source[strip].astype(target.dtype, copy=False)
        if target.dtype.itemsize == 2:
            target.view(np.uint16)[strip] = values.view(np.uint16)
        else:
            target[strip] = values
