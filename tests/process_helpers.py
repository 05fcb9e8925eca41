"""Programs in several processes on loopback, each with its own fake devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
PATIENCE = 1800.0  # seconds for a program of several processes, on a slow and busy machine


class ProcessGroup:
    """A program that runs as several processes. Those that still run are killed at the end.

    Args:
        words: the words after `python`, or after `python -m`.
        folder: folder of their output, RANK.out and RANK.log.
        count: number of processes.
        devices: number of devices of each process.
        variables: further environment variables.
    """

    def __init__(
        self, words: list[object], folder: Path, count: int, devices: int = 1, **variables: str
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        flags = f"--xla_force_host_platform_device_count={devices}"
        shared = os.environ | {
            "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
            **variables,
        }
        if count > 1:
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                shared["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{found.getsockname()[1]}"
            shared["JAX_NUM_PROCESSES"] = str(count)
        module = [] if words[0] == "-c" else ["-m"]
        command = [sys.executable, *module, *map(str, words)]
        self.runs = []
        for rank in range(count):
            own = shared | ({"JAX_PROCESS_ID": str(rank)} if count > 1 else {})
            with (folder / f"{rank}.out").open("w") as out, self.log(rank).open("w") as log:
                self.runs.append(
                    subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=log)
                )

    def log(self, rank: int) -> Path:
        """Returns the file of a process's errors."""
        return self.folder / f"{rank}.log"

    def output(self) -> str:
        """Returns the output of the first process."""
        return (self.folder / "0.out").read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition, while all processes run."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.is_running() and time.monotonic() < end, self._ends()
            time.sleep(0.1)

    def is_running(self) -> bool:
        """Returns True while all processes run."""
        return all(run.poll() is None for run in self.runs)

    def finish(self) -> str:
        """Waits until all processes have ended well. Returns the output of the first."""
        end = time.monotonic() + PATIENCE
        while any(run.poll() is None for run in self.runs):
            assert time.monotonic() < end and not any(run.poll() for run in self.runs), self._ends()
            time.sleep(0.1)
        assert not any(run.returncode for run in self.runs), self._ends()
        return self.output()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for run in self.runs:
            run.kill()
            run.wait()

    def _ends(self) -> str:
        """Returns the status of each process, and the last lines of its log."""
        return "\n".join(
            f"process {rank}: {run.poll()}\n{self.log(rank).read_text()[-1500:]}"
            for rank, run in enumerate(self.runs)
        )
