"""Shards of a parameter in the memory of the host."""

from __future__ import annotations

from types import EllipsisType
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.finite_values import is_finite

# (start, stop) of each dimension
Region: TypeAlias = tuple[tuple[int, int], ...]


class LeafShards:
    """Shards of one parameter that this process holds, filled part by part."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None):
        """Allocates the shards.

        Args:
            shape: shape of the parameter.
            dtype: its dtype.
            sharding: its sharding, or None for the default device.
        """
        self.shape, self.sharding = shape, sharding
        self.regions: dict[jax.Device | None, Region] = {None: tuple((0, n) for n in shape)}
        if sharding is not None:
            self.regions = {
                device: tuple(
                    slice_.indices(size)[:2]
                    for slice_, size in zip(index or (), shape, strict=True)
                )
                for device, index in sharding.addressable_devices_indices_map(shape).items()
            }
        self.shards = {
            region: _empty_aligned([stop - start for start, stop in region], dtype)
            for region in self.regions.values()
        }

    def holds(self, index: tuple[int, ...]) -> bool:
        """Returns True if a shard contains the part at a position.

        The position counts along the leading axes.
        """
        return any(_contains(region, index) for region in self.shards)

    def copy(self, index: tuple[int, ...], values: np.ndarray) -> None:
        """Copies one part into the shards that contain it, with a cast.

        Args:
            index: position of the part along the leading axes.
            values: the part.
        """
        n = len(index)
        for region, shard in self.shards.items():
            if not _contains(region, index):
                continue
            position = tuple(i - start for i, (start, _) in zip(index, region[:n], strict=True))
            cut = tuple(slice(*bounds) for bounds in region[n:])
            # The ellipsis keeps a single number an array, which can be written to.
            where: tuple[int | EllipsisType, ...] = (*position, ...)
            copy_cast(values[cut], shard[where])

    def is_finite(self) -> bool:
        """Returns True if all values are finite."""
        return all(map(is_finite, self.shards.values()))

    def place(self) -> jax.Array:
        """Moves the shards to their devices and returns the parameter."""
        if self.sharding is None:
            return jax.device_put(self.shards.pop(self.regions[None]))
        placed = [
            jax.device_put(self.shards[region], device) for device, region in self.regions.items()
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, placed)


def _contains(region: Region, index: tuple[int, ...]) -> bool:
    """Returns True if a region has a position along the leading axes."""
    bounds = region[: len(index)]
    return all(start <= i < stop for i, (start, stop) in zip(index, bounds, strict=True))


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
