"""One server with the bundled model, in a thread of the tests' process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from xflow_jax.decoding import parse_rules
from xflow_jax.lm import load
from xflow_jax.serving.api import ApiOptions
from xflow_jax.serving.engine import Engine, EngineOptions
from xflow_jax.serving.lanes import Lengths
from xflow_jax.serving.server import Server, ServerOptions

RULES = "threshold,flow:early_exit=true"
SLOTS, QUEUE = 4, 40


class Running:
    """A server under test.

    Attributes:
        server: the server.
        engine: its engine.
        url: its address.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.engine = server, server.engine
        self.url = f"http://127.0.0.1:{server.port}"
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._thread.start()

    def _run(self) -> None:
        self.status = self.server.run_until_end(self._ready.set)

    def wait_until_ready(self) -> None:
        assert self._ready.wait(3000)

    def end(self) -> int | None:
        """Drains the server, and returns its exit status."""
        if self.status is None:
            self.server.begin_drain()
        return self.wait()

    def wait(self) -> int | None:
        """Waits for the end of the server, and returns its exit status."""
        self._thread.join(600)
        assert not self._thread.is_alive()
        return self.status


def start(
    rules: str = RULES,
    page: str = "<p>the page</p>",
    api_key: str | None = None,
    slots: int = SLOTS,
) -> Running:
    lengths = Lengths((48,), (64,), 16, slots)
    options = EngineOptions(passes=1, max_queue=max(QUEUE, slots))
    engine = Engine(load("tiny"), parse_rules(rules), lengths, options)
    api = ApiOptions("tiny", api_key=api_key, page=page)
    return Running(Server(engine, api, ServerOptions(port=0, drain=600)))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = start()
    found.wait_until_ready()
    yield found
    assert found.end() == 0
