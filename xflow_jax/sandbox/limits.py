"""What a program in the sandbox may use."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from xflow_jax.errors import require

FULL = "namespaces+landlock+limits"  # isolation


@dataclass(frozen=True)
class Limits:
    """What one program may use, and the least isolation; UserError where a limit is not above 0."""

    seconds: float = 5.0  # of wall clock
    memory_mb: int = 512  # of address space
    output_bytes: int = 1 << 18  # printed; one more ends the run
    file_bytes: int = 1 << 20  # in each file
    files: int = 32  # open at once, and opened for writing in all
    processes: int = (
        1  # itself and its threads included; without namespaces all of this user's count
    )
    minimum: str = (
        "limits"  # of namespaces+landlock+limits: what must be in force, or nothing is run
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "minimum":
                require(value > 0, f"the sandbox limit {field.name} must be above 0, not {value}")
        known = set(self.minimum.split("+")) <= set(FULL.split("+"))
        require(known, f"the sandbox limit minimum must be some of {FULL}, not {self.minimum!r}")

    def resources(self) -> dict[int, int]:
        """What setrlimit is to hold."""
        import resource  # not on Windows, where this module must still import

        table = {
            resource.RLIMIT_CPU: math.ceil(self.seconds)
            + 1,  # ends a busy child whose parent is gone
            resource.RLIMIT_AS: self.memory_mb << 20,
            resource.RLIMIT_FSIZE: self.file_bytes,
            resource.RLIMIT_NOFILE: self.files,
            resource.RLIMIT_NPROC: self.processes,
            resource.RLIMIT_CORE: 0,
        }
        if sys.platform == "darwin":  # refuses to limit the address space
            del table[resource.RLIMIT_AS]
        return table
