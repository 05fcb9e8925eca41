"""Device mesh: its construction, and the scope in which programs are traced.

On one device no mesh is needed, and no function of this module has to be called.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from xflow_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(spec: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes data, fsdp and tensor.

    This is the only function that makes a mesh. All axes are of type Auto. With several TPU slices
    only the axis `data` crosses the network between them.

    Args:
        spec: sizes of the three axes, like "1,8,1", or None for all devices on fsdp. A single
            process may use fewer devices than there are.
        devices: devices to use, or None for all.

    Returns:
        The mesh.

    Raises:
        UserError: if `spec` is not three positive integers, if it needs more devices than there
            are, or if the number of slices does not divide `data`.
    """
    devices = list(find_devices() if devices is None else devices)
    shape = (1, len(devices), 1) if spec is None else parse_mesh(spec)
    count = math.prod(shape)
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        near = f"{shape[0]},{max(len(devices) // (shape[0] * shape[2]), 1)},{shape[2]}"
        fits = math.prod(int(n) for n in near.split(",")) == len(devices)
        hint = f"Use {near if fits else f'1,{len(devices)},1'}."
        raise UserError(f"mesh {spec} needs {count} devices, but there are {len(devices)}. {hint}")
    # The type is explicit because JAX may default to Explicit axes. Under these a gather from a
    # sharded vocabulary fails.
    types = (AxisType.Auto,) * len(shape)
    slices = {getattr(device, "slice_index", None) for device in devices[:count]} - {None}
    if len(slices) > 1:
        array = arrange_slices(shape, devices[:count], len(slices))
    else:
        # An axis of the mesh may need half an axis of the torus. jax.make_mesh does not split one.
        array = mesh_utils.create_device_mesh(
            shape, devices[:count], allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=types)


def find_devices() -> list[jax.Device]:
    """Returns the devices of all processes.

    Raises:
        UserError: if JAX finds none, because JAX_PLATFORMS names a platform that is not there.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a text
        names = jax.config.values["jax_platforms"]
        reason = str(error).split("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise UserError(
            f"JAX finds no device of the platforms {names!r}, which JAX_PLATFORMS sets. "
            + (reason and f"{reason}. ")
            + "Leave the variable out, or set it to cpu."
        ) from None


def parse_mesh(spec: str) -> tuple[int, int, int]:
    """Parses the sizes of data, fsdp and tensor, like "1,8,1".

    Raises:
        UserError: if `spec` is not three positive integers.
    """
    try:
        data, fsdp, tensor = map(int, spec.split(","))
    except ValueError:
        data = fsdp = tensor = 0
    if min(data, fsdp, tensor) < 1:
        raise UserError(
            f"mesh {spec!r} must be three positive sizes, of {', '.join(MESH_AXES)}, like 1,8,1"
        )
    return data, fsdp, tensor


def default_mesh(spec: str | None = None) -> Mesh | None:
    """Makes the mesh of a command, by default all devices on fsdp.

    Args:
        spec: sizes of data, fsdp and tensor, like "1,8,1", or None.

    Returns:
        The mesh, or None on a single device without `spec`.

    Raises:
        UserError: as `make_mesh`.
    """
    return make_mesh(spec) if spec or len(find_devices()) > 1 else None


@contextlib.contextmanager
def computation_scope(mesh: Mesh | None, dtype: DTypeLike) -> Iterator[None]:
    """Sets the mesh and the matmul precision inside the context.

    Both apply to programs that are traced there.

    Args:
        mesh: the mesh to set, or None for one device.
        dtype: dtype of the computation. For float32, products are exact: no TF32 and no bfloat16
            passes.

    The programs are written for 32-bit types and the usual promotion of dtypes, whatever the
    settings of the caller.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        if np.dtype(dtype) == np.float32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        yield


def arrange_slices(
    shape: tuple[int, ...], devices: Sequence[jax.Device], slice_count: int
) -> np.ndarray:
    """Arranges the devices of several slices for a mesh.

    Args:
        shape: sizes of data, fsdp and tensor. Only `data` crosses the network between slices.
        devices: the devices of all slices.
        slice_count: number of slices.

    Returns:
        Devices, an object array of `shape`.

    Raises:
        UserError: if the number of slices does not divide `data`.
    """
    data, *rest = shape
    if data % slice_count:
        near = max(data // slice_count, 1) * slice_count
        raise UserError(
            f"the mesh axis data of {data} does not divide over {slice_count} slices. "
            f"The nearest size that does is {near}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slice_count, *rest), (slice_count, 1, 1), devices
    )


def nearest_divisor(size: int, parts: int) -> int:
    """Returns the divisor of `size` that is nearest to `parts`."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - parts), n))


def platform() -> str:
    """Returns the platform that programs are compiled for: cpu, gpu or tpu.

    It is the platform of the mesh that is set, whose devices need not be present. Without a mesh it
    is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or not device.platform else device.platform
