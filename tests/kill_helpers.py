"""Helpers of the tests in which programs are killed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from xflow_jax.checkpoints import lock_holder
from xflow_jax.checkpoints.lock_holder import Holder


def write_record(file: Path, **changes: object) -> None:
    """Writes the file of a lock that nobody holds, as a killed process leaves it."""
    pid = os.getpid()
    holder = Holder(lock_holder.socket.gethostname(), pid, lock_holder.start_time(pid), "noon")
    file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, **changes))))
