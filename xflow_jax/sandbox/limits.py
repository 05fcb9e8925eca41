"""Limits of one program in the sandbox."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from xflow_jax.errors import require

FULL_ISOLATION = "namespaces+landlock+limits"


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
        minimum: a part of "namespaces+landlock+limits". Nothing runs if less is in force.

    Raises:
        UserError: a limit is not above 0, or `minimum` has an unknown part.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    output_bytes: int = 1 << 18
    file_bytes: int = 1 << 20
    files: int = 32
    processes: int = 1
    minimum: str = "limits"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "minimum":
                require(value > 0, f"the sandbox limit {field.name} must be above 0, not {value}")
        known = set(self.minimum.split("+")) <= set(FULL_ISOLATION.split("+"))
        require(
            known,
            f"the sandbox limit minimum must be some of {FULL_ISOLATION}, not {self.minimum!r}",
        )

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
