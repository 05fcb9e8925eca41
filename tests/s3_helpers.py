"""A bucket of Amazon's kind on loopback: the server of moto, which keeps objects in memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gcs_helpers import BUCKET


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the server. Yields the variables that lead programs to it. Skips without packages."""
    reason = "the tests of s3:// need moto[server] and s3fs"
    for package in ("moto", "flask_cors", "s3fs"):
        pytest.importorskip(package, reason=reason)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _make_bucket(url, server)
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            server.terminate()
            server.wait()


def _make_bucket(url: str, server: subprocess.Popen) -> None:
    request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
    while server.poll() is None:
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server has ended")
