"""Limits of one program in the sandbox."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from xflow_jax.errors import require

FULL_ISOLATION = "namespaces+landlock+seccomp+limits"
PROTECTIONS = ("namespaces", "landlock", "seccomp", "cgroup", "limits")


@dataclass(frozen=True)
class Limits:
    """Resources of one program, and the least isolation it may run in.

    Attributes:
        seconds: wall-clock time.
        memory_mb: address space, in MiB.
        output_bytes: printed bytes. One more ends the run.
        file_bytes: bytes in each file.
        files: files open at once, and files opened for writing in all.
        processes: processes and threads, the program itself included. Without namespaces, all
            processes of this user count.
        libraries: packages of this Python that programs may import, if they are installed.
        minimum: protections that must be in force, some of namespaces, landlock, seccomp, cgroup
            and limits, joined by "+". None requires namespaces or Landlock on Linux. "limits"
            allows programs to run without both.

    Raises:
        UserError: a limit is not above 0, or `minimum` has an unknown part.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    output_bytes: int = 1 << 18
    file_bytes: int = 1 << 20
    files: int = 32
    processes: int = 1
    libraries: tuple[str, ...] = ("numpy",)
    minimum: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                require(value > 0, f"the sandbox limit {field.name} must be above 0, not {value}")
        known = self.minimum is None or set(self.minimum.split("+")) <= set(PROTECTIONS)
        require(
            known,
            f"the sandbox limit minimum must be some of {'+'.join(PROTECTIONS)}, "
            f"not {self.minimum!r}",
        )

    def is_met_by(self, isolation: str) -> bool:
        """Returns True if an isolation has the protections of the minimum.

        Args:
            isolation: the isolation in force, as in `Result.isolation`.
        """
        parts = set(isolation.split("+"))
        if self.minimum is None:
            return sys.platform != "linux" or bool(parts & {"namespaces", "landlock"})
        return set(self.minimum.split("+")) <= parts

    def resources(self) -> dict[int, int]:
        """Returns resource number -> value for setrlimit."""
        import resource  # not on Windows, where this module must still import

        table = {
            # One second more than the wall clock: ends a busy child whose parent is gone.
            resource.RLIMIT_CPU: math.ceil(self.seconds) + 1,
            resource.RLIMIT_AS: self.memory_mb << 20,
            resource.RLIMIT_FSIZE: self.file_bytes,
            resource.RLIMIT_NOFILE: self.files,
            resource.RLIMIT_NPROC: self.processes,
            resource.RLIMIT_CORE: 0,
        }
        if sys.platform == "darwin":  # macOS refuses to limit the address space
            del table[resource.RLIMIT_AS]
        return table
