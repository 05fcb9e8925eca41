"""Several processes that run one program: what one of them knows, told to all. With one process all of it is free."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xflow_jax.errors import UserError


def initialize_processes() -> None:
    """Makes this process one of several, where the environment says so; all but the first then print nothing.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or XFLOW_DISTRIBUTED=1 alone where JAX finds out
    by itself: on TPU pods, under Slurm, under Open MPI. Raises UserError where the processes do not find each other.
    """
    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    if "JAX_COORDINATOR_ADDRESS" not in os.environ and os.environ.get("XFLOW_DISTRIBUTED") != "1":
        return
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in told.items() if value})
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot find each other: {error}") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def enable_compilation_cache() -> None:
    """Turns JAX's persistent cache of compiled programs on, in the user's cache folder.

    JAX's own variables go first: JAX_COMPILATION_CACHE_DIR says where, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xflow_jax" / "programs"
    )
    jax.config.update("jax_compilation_cache_dir", str(folder))


def is_first_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def put_sharded(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """A tree of arrays (keys, too) that every process has whole, as arrays of that sharding."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree)


def fetch_to_host(tree: Any) -> Any:
    """A tree of device arrays as NumPy arrays, whole on every process, however they are sharded."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    def whole(x: jax.Array) -> np.ndarray:
        return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def gather_objects(item: Any) -> list[Any]:
    """What every process has, in their order; `item` is of JSON's types. All processes must call this."""
    if jax.process_count() == 1:
        return [item]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(item).encode(), np.uint8)
    sizes = process_allgather(np.array([data.size], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, of JSON's types, on all of them; its UserError is raised on all."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first_process():
        try:
            said["value"] = make()
        except UserError as error:
            said["error"] = str(error)
    said = gather_objects(said)[0]
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]
