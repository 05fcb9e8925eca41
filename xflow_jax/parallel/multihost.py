"""Multi-process broadcast, gather and sharding. No-ops in a single process.

`configure_process` configures JAX. Only commands call it and its parts.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from xflow_jax.errors import UserError
from xflow_jax.types import PyTree

T = TypeVar("T")
# Time after which a process that gives no sign of life counts as dead. The others then end.
HEARTBEAT_SECONDS = 60
# Time that processes wait at the end for the first one, which still writes results and plots.
SHUTDOWN_SECONDS = 3600
# Status of a program that ends before its work is done, and that goes on when it is started again:
# EX_TEMPFAIL of sysexits.h.
RESTART_STATUS = 75
# Texts of the errors of a collective operation or of the coordinator if a process is gone.
_LOST = (
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "Socket closed",
)


def configure_process() -> None:
    """Configures JAX for a command, before the first use of a device.

    Raises:
        UserError: as `initialize_processes`.
    """
    configure_types()
    skip_missing_tpu()
    initialize_processes()
    enable_compilation_cache()


def initialize_processes() -> None:
    """Connects the processes of a run, if the environment names them.

    This configures JAX for the complete process, so only a command may call it, before the first
    computation. The environment names either JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or XFLOW_DISTRIBUTED=1 alone if JAX can detect the processes: on TPU pods,
    under Slurm and under Open MPI. All processes but the first then print nothing.

    Raises:
        UserError: if the processes do not find each other.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ and os.environ.get("XFLOW_DISTRIBUTED") != "1":
        return
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot find each other: {error}") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def lost_process(error: BaseException) -> str | None:
    """Returns the sentence on an error that a lost process has caused.

    Args:
        error: any error.

    Returns:
        The sentence, or None for other errors and in a single process.
    """
    if "jax" not in sys.modules or not jax.distributed.is_initialized():
        return None
    text = str(error)
    if not any(sign in text for sign in _LOST):
        return None
    return (
        f"another process of this run has ended, so process {jax.process_index()} of "
        f"{jax.process_count()} ends too. Start all of them again, and the run continues from its "
        f"last checkpoint ({text.strip().splitlines()[0][:200]})"
    )


def configure_types() -> None:
    """Sets 32-bit types and the usual promotion of dtypes.

    This configures JAX for the complete process, so only a command may call it. The programs are
    written for these settings. The environment may have others for programs of the user.
    """
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_dtype_promotion", "standard")


def skip_missing_tpu() -> None:
    """Keeps JAX from loading libtpu on a machine without a TPU.

    This configures JAX for the complete process, so only a command may call it, before the first
    use of a device. The TPU compiler of the extra [plan] is in libtpu. Once loaded, it prints
    errors about workers that it does not find, and a stack trace at SIGTERM.
    """
    if jax.config.values["jax_platforms"] or importlib.util.find_spec("libtpu") is None:
        return
    # Devices of TPUs up to v4, and from v5e on.
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    if not plugins:
        jax.config.update("jax_platforms", "cpu")
    elif all(name.startswith("xla_cuda") for name in plugins):
        # Without a GPU, JAX leaves cuda out of this list.
        jax.config.update("jax_platforms", "cuda,cpu")


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache in the user's cache directory.

    This configures JAX for the complete process, so only a command may call it. JAX's own variables
    have precedence: JAX_COMPILATION_CACHE_DIR sets the directory, and
    JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    configured = jax.config.values["jax_compilation_cache_dir"]
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or configured:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "xflow_jax" / "programs"))


def is_first_process() -> bool:
    """Returns True in the process that writes files and prints."""
    return jax.process_index() == 0


def put_sharded(tree: T, sharding: jax.sharding.Sharding) -> T:
    """Moves arrays to the devices of all processes.

    Args:
        tree: tree of arrays or random keys, complete and equal in every process.
        sharding: the sharding of each of them.

    Returns:
        The tree with global arrays.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x: jax.Array | np.ndarray) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        data = np.asarray(x)
        # For complete arrays this is faster than jax.make_array_from_process_local_data.
        return jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])

    return jax.tree.map(put, tree)


def fetch_to_host(tree: PyTree) -> PyTree:
    """Copies arrays to the host, complete in every process.

    All processes must call this.

    Args:
        tree: tree of jax.Array of any sharding.

    Returns:
        The tree with NumPy arrays.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    def fetch(x: jax.Array) -> np.ndarray:
        return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def gather_objects(item: T) -> list[T]:
    """Gathers an object of every process.

    All processes must call this.

    Args:
        item: an object of JSON types.

    Returns:
        The objects of all processes, in the order of the processes.
    """
    if jax.process_count() == 1:
        return [item]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(item).encode(), np.uint8)
    sizes = process_allgather(np.array([data.size], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Calls a function in the first process for all of them.

    All processes must call this.

    Args:
        make: the function. It returns an object of JSON types.

    Returns:
        The result, in every process.

    Raises:
        UserError: in all processes, if `make` raises it.
    """
    if jax.process_count() == 1:
        return make()
    outcome: dict[str, T] = {}
    message: str | None = None
    if is_first_process():
        try:
            outcome["value"] = make()
        except UserError as error:
            message = str(error)
    outcome, message = gather_objects((outcome, message))[0]
    if message is not None:
        raise UserError(message)
    return outcome["value"]
