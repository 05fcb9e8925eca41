"""Helpers of the tests in which programs are killed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from xflow_jax.checkpoints import run_lock
from xflow_jax.checkpoints.run_lock import Holder


def write_record(file: Path, **changes: object) -> None:
    """Writes the file of a lock that nobody holds, as a killed process leaves it."""
    pid = os.getpid()
    holder = Holder(run_lock.socket.gethostname(), pid, run_lock._start_time(pid), "noon")
    file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, **changes))))
