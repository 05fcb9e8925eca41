"""What a command does before its first computation: join the other processes of its run, and keep compiled programs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from xflow_jax.strict import UserError


def join_hosts() -> None:
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


def keep_programs() -> None:
    """Turns JAX's persistent cache of compiled programs on, in the user's cache folder.

    JAX's own variables go first: JAX_COMPILATION_CACHE_DIR says where, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xflow_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's on every process, wherever their parts lie."""
    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
