"""`xflow serve` as a process of its own, with what it holds of the machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """A server of the bundled model.

    Attributes:
        url: its address.
    """

    def __init__(self, *options: str) -> None:
        """Starts it, and waits until requests are accepted."""
        words = ["serve", "--model", "tiny", "--rules", "threshold", "--port", "0", *options]
        # The environment of the tests has eight devices and no optimisation.
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xflow_jax", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self._process.stdout:
            if found := re.search(r"ready after .* at (http://\S+)", line):
                self.url = found.group(1)
                return
        raise AssertionError("the server has ended")

    def resident(self) -> int:
        """Returns the bytes of memory."""
        return self._status("VmRSS") * 2**10

    def threads(self) -> int:
        """Returns the number of threads."""
        return self._status("Threads")

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE).group(1))

    def open_files(self) -> int:
        """Returns the number of open files and sockets."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def metric(self, name: str) -> float:
        """Returns a metric without labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=600) as answer:
            text = answer.read().decode()
        return float(re.search(rf"^xflow:{name} (\S+)$", text, re.MULTILINE).group(1))

    def wait_until_idle(self) -> None:
        """Waits until no request is in a slot or in the queue."""
        until = time.monotonic() + 600
        while self.metric("slots_busy") + self.metric("num_requests_waiting"):
            assert time.monotonic() < until
            time.sleep(0.1)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Waits for the end, and returns the exit status."""
        try:
            return self._process.wait(600)
        finally:
            self._process.kill()
            self._process.stdout.close()
