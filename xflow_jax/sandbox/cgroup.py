"""Control group of a zygote: limits of all its processes together.

It is used if the system has delegated a group to this user, which a systemd session or a service
with Delegate=yes does. Otherwise there is none, and `Result.isolation` lacks "cgroup".
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

from xflow_jax.sandbox.limits import Limits

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_ZYGOTE_BYTES = 64 << 20
_ZYGOTE_PROCESSES = 4


def find_parent(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> Path | None:
    """Returns the group in which this process may make groups.

    There may be none. A group that has processes cannot pass on its controllers, so it is the
    nearest ancestor.

    Args:
        root: mount point of the control groups (version 2).
        membership: file with the group of this process.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if own is None:
        return None
    for folder in list((root / own.lstrip("/")).parents):
        if not folder.is_relative_to(root):
            return None
        with contextlib.suppress(OSError):
            controllers = (folder / "cgroup.subtree_control").read_text().split()
            writable = os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)
            if writable and {"memory", "pids"} <= set(controllers):
                return folder
    return None


def create(limits: Limits, parent: Path | None = None) -> str:
    """Creates a group for a zygote.

    Returns its folder, or "" if none can be made.

    Args:
        limits: limits of the programs.
        parent: group to create it in. None finds one.
    """
    parent = parent or find_parent()
    if parent is None:
        return ""
    memory = (limits.memory_mb << 20) * limits.processes + limits.files * limits.file_bytes
    try:
        group = Path(tempfile.mkdtemp(prefix="xflow-sandbox-", dir=parent))
    except OSError:
        return ""
    try:
        (group / "memory.max").write_text(str(memory + _ZYGOTE_BYTES))
        (group / "pids.max").write_text(str(limits.processes + _ZYGOTE_PROCESSES))
        with contextlib.suppress(OSError):  # without swap there is no such file
            (group / "memory.swap.max").write_text("0")
    except OSError:
        remove(str(group))
        return ""
    return str(group)


def remove(group: str) -> None:
    """Removes a group, once its processes have ended."""
    for _ in range(100 if group else 0):
        try:
            os.rmdir(group)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
