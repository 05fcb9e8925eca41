"""Headers of safetensors files: where each tensor is.

A safetensors file is an 8-byte length, a JSON header of that length, and the bytes of the tensors.
This module reads headers without the library of the format, so that a damaged file is distinguished
from an unsuitable one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xflow_jax.errors import UserError
from xflow_jax.input_files import open_regular, parse_json

DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER = 100_000_000  # bytes, as in the library of the format


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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Reads the header of a safetensors file and checks the file's size.

    Args:
        file: the file.

    Returns:
        Name of a tensor -> its location.

    Raises:
        UserError: if the file is a Git LFS pointer, truncated or damaged, if a dtype is none of
            DTYPES, or if the tensors do not fill the file exactly.
    """
    with open_regular(file) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
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
