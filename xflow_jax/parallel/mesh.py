"""The mesh, the table of logical axes of every parameter, and shardings of a tree from the two.

Nothing here is needed on one device: a program that makes no mesh makes no call of this module.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from xflow_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(spec: str | None = None, devices: list[Any] | None = None) -> Mesh:
    """The mesh of axes data, fsdp and tensor, all of type Auto; the only place where a mesh is made.

    spec: their sizes, like "1,8,1"; None = all devices on fsdp. Fewer devices than there are may be asked for by a
    single process. Of several TPU slices only `data` crosses the network between them. Raises UserError for anything
    but three positive integers, for more devices than there are, and for slices that do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    try:
        shape = (
            (1, len(devices), 1) if spec is None else tuple(int(size) for size in spec.split(","))
        )
    except ValueError:
        shape = ()
    if len(shape) != len(MESH_AXES) or min(shape) < 1:
        raise UserError(
            f"mesh {spec!r} must be three positive sizes, of {', '.join(MESH_AXES)}, like 1,8,1"
        )
    wanted = math.prod(shape)
    if wanted > len(devices) or (wanted < len(devices) and jax.process_count() > 1):
        near = f"{shape[0]},{max(len(devices) // (shape[0] * shape[2]), 1)},{shape[2]}"
        fits = math.prod(int(n) for n in near.split(",")) == len(devices)
        hint = f"use {near if fits else f'1,{len(devices)},1'}"
        raise UserError(f"mesh {spec} needs {wanted} devices, but there are {len(devices)}; {hint}")
    # Stated, since Explicit axes may become the default, under which a gather from a sharded vocabulary fails.
    types = (AxisType.Auto,) * len(shape)
    slices = {getattr(device, "slice_index", None) for device in devices[:wanted]} - {None}
    if len(slices) > 1:
        return Mesh(over_slices(shape, devices[:wanted], len(slices)), MESH_AXES, axis_types=types)
    # An axis of the mesh may need half of one of the torus, which jax.make_mesh does not cut.
    array = mesh_utils.create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=types)


def default_mesh(spec: str | None = None) -> Mesh | None:
    """Makes the mesh that a command uses: the given sizes, or all devices on fsdp.

    Args:
        spec: sizes of data, fsdp and tensor, like "1,8,1", or None.

    Returns:
        The mesh, or None on a single device without `spec`.

    Raises:
        UserError: as `make_mesh`.
    """
    return make_mesh(spec) if spec or jax.device_count() > 1 else None


@contextlib.contextmanager
def computation_scope(mesh: Mesh | None, dtype: DTypeLike) -> Iterator[None]:
    """Sets the mesh and the matmul precision for programs that are traced inside.

    Args:
        mesh: the mesh to set, or None for one device.
        dtype: dtype of the computation. For float32, products are exact: no TF32 and no bfloat16
            passes.
    """
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        if np.dtype(dtype) == np.float32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        yield


def over_slices(shape: tuple[int, int, int], devices: list[Any], slices: int) -> np.ndarray:
    """The devices of several slices as an array of the mesh's shape: only `data` crosses the network between them.

    Raises UserError where the slices do not divide `data`.
    """
    data, *rest = shape
    if data % slices:
        near = max(data // slices, 1) * slices
        raise UserError(
            f"the mesh axis data of {data} does not divide over {slices} slices; the nearest is {near}"
        )
    return mesh_utils.create_hybrid_device_mesh((data // slices, *rest), (slices, 1, 1), devices)


def nearest_divisor(size: int, parts: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - parts), n))


def platform() -> str:
    """What programs are being made for: the platform of the mesh that is set, whose devices need not be here, or else
    the default backend: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or not device.platform else device.platform
