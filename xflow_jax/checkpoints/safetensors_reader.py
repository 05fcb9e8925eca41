"""Lazy reader of Hugging Face safetensors, tensor by tensor.

It does without the library of the format. So only the requested tensors are in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.checksums import CHECKSUM_FILE, compares_large_files, first_damage
from xflow_jax.checkpoints.finite_values import is_finite
from xflow_jax.checkpoints.leaf_shards import LeafShards
from xflow_jax.checkpoints.safetensors_header import TensorEntry, read_header
from xflow_jax.checkpoints.weight_map import TensorSlice, WeightMapping
from xflow_jax.errors import UserError, describe, disk_errors
from xflow_jax.input_files import file_inside, is_cloud, read_json, read_range
from xflow_jax.models import INT8, quantize

CONFIG_FILE, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class SafetensorsSource:
    """Tensors of a Hugging Face directory, read on request.

    Attributes:
        directory: the directory.
        entries: name of a tensor -> its location.
        files: the safetensors files.
    """

    def __init__(self, directory: Path, always: bool = False):
        """Reads the headers of all files.

        Directories that this library wrote have a files.json. Its checksums are compared, unless
        XFLOW_VERIFY is 0.

        Args:
            directory: the directory.
            always: compare the checksums whatever XFLOW_VERIFY is.

        Raises:
            UserError: if there are no weights, if a file is missing, truncated or damaged, or if
                two files hold the same tensor.
        """
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self.files = [directory / name for name in _weight_files(directory)]
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise UserError(
                        f"{file}: the tensor {name} is already in {self.entries[name].file.name}"
                    )
                self.entries[name] = entry
        self._compare_checksums(always or compares_large_files(directory))

    def _compare_checksums(self, large: bool) -> None:
        """Raises UserError if a file is not as files.json describes it.

        Args:
            large: read large files, unless their storage knows their checksums.
        """
        path = file_inside(self.directory, CHECKSUM_FILE)
        listed = read_json(path) if path.exists() else {}
        # Another program may give this name to a file of another form.
        listed = listed if isinstance(listed, dict) else {}
        own = {file.name: listed[file.name] for file in self.files if file.name in listed}
        try:
            damage = first_damage(self.directory, own, large, shared=True)
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
        if _read_into(data.reshape(-1).view(np.uint8).data, entry) != entry.nbytes:
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


def _read_into(target: memoryview, entry: TensorEntry) -> int:
    """Reads a tensor into memory and returns the number of bytes."""
    if is_cloud(entry.file):
        with disk_errors(entry.file, reading=True):
            return read_range(entry.file, entry.start, target)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return file.readinto(target)


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
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise UserError(f"{index}: {describe(name)} is not the name of a file beside it")
    files = sorted(set(weight_map.values()))
    for name in files:
        if not _exists(file_inside(directory, name)):
            raise UserError(f"{directory / name}: the file is missing, but {INDEX} names it")
    if SINGLE not in files and _exists(directory / SINGLE):
        raise UserError(
            f"{directory}: it has both {SINGLE} and {INDEX}, which names other files. "
            "Remove the one that is out of date."
        )
    return files


def _exists(file: Path) -> bool:
    # Path.exists fails for long names.
    return file.exists() if is_cloud(file) else os.path.exists(file)


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
    shards = LeafShards(shape, dtype, sharding)
    for part in slices:
        if shards.holds(part.index):
            shards.copy(part.index, part.view(source.read(part.tensor)))
    if not shards.is_finite():
        _refuse_values(source, slices, dtype)
    return shards.place()


def read_hf_int8(
    source: SafetensorsSource,
    slices: Collection[TensorSlice],
    shape: tuple[int, ...],
    sharding: Sharding | None = None,
    scale_sharding: Sharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reads one parameter from its tensors and rounds it to int8.

    Memory holds one tensor and the shards of the result, and never the parameter itself.

    Args:
        source: the tensors.
        slices: the parts of the parameter.
        shape: its shape.
        sharding: its sharding, or None for the default device.
        scale_sharding: sharding of the scales.

    Returns:
        (int8 matrices, their scales), as `models.quantize` makes them.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    rounded = LeafShards(shape, INT8, sharding)
    scales = LeafShards((*shape[:-2], shape[-1]), np.float32, scale_sharding)
    for part in slices:
        if rounded.holds(part.index):
            parts = quantize(part.view(source.read(part.tensor)))
            for shards, values in zip((rounded, scales), parts, strict=True):
                shards.copy(part.index, values)
    if not scales.is_finite():
        _refuse_values(source, slices, INT8)
    return rounded.place(), scales.place()


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
