"""Process of the server: engine and HTTP, from start to drain."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from sse_starlette.sse import AppStatus

from xflow_jax.errors import UserError
from xflow_jax.serving.api import ApiOptions, make_app
from xflow_jax.serving.connection import MOST_HEAD, Connection
from xflow_jax.serving.engine import Engine
from xflow_jax.serving.metrics import count_compilations

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Address and end of a server.

    Attributes:
        host, port: the address. Port 0 takes any free one.
        drain: seconds that requests under way have at the end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0


class Server(uvicorn.Server):
    """HTTP server that answers what it has begun before it ends.

    Attributes:
        engine: the engine.
        socket: the open socket.
    """

    def __init__(self, engine: Engine, api: ApiOptions, options: ServerOptions) -> None:
        """Opens the socket. Nothing is compiled yet.

        Raises:
            UserError: if the address cannot be used.
        """
        connection = partial(Connection, count=engine.metrics.count_failure)
        config = uvicorn.Config(
            make_app(engine, api),
            http=cast("type[asyncio.Protocol]", connection),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(options.drain)),
            h11_max_incomplete_event_size=MOST_HEAD,
        )
        super().__init__(config)
        self.engine, self._drain_seconds = engine, options.drain
        self.socket = _open_socket(options)
        self._is_draining = False

    @property
    def port(self) -> int:
        """The port of the socket."""
        return int(self.socket.getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at the second."""
        if self._is_draining:
            self.should_exit = self.force_exit = True
            return
        self.begin_drain()

    def begin_drain(self) -> None:
        """Refuses new requests, and ends the server when the others are over."""
        self._is_draining = True
        self.engine.is_draining = True
        threading.Thread(target=self._drain, name="xflow-drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.engine.drain(self._drain_seconds):
            _LOG.warning("requests are given up after %g s of draining", self._drain_seconds)
        self.engine.stop()
        self.should_exit = True

    def run_until_end(self, announce: Callable[[], None] = lambda: None) -> int:
        """Serves until a signal, or until the engine fails.

        Args:
            announce: called once everything is compiled.

        Returns:
            The exit status: 1 if the engine has failed.
        """
        # Streams end by the engine's drain, not at once.
        AppStatus.disable_automatic_graceful_drain()
        starter = threading.Thread(
            target=self._start_engine, args=(announce,), name="xflow-start", daemon=True
        )
        starter.start()
        asyncio.run(self._serve_and_watch())
        starter.join(timeout=60)
        self.engine.stop()
        return 0 if self.engine.failure is None else 1

    def _start_engine(self, announce: Callable[[], None]) -> None:
        try:
            self.engine.start()
            count_compilations(self.engine.metrics.compilations.inc)
            announce()
        except BaseException as error:
            _LOG.exception("the programs cannot be compiled")
            self.engine.failure = error

    async def _serve_and_watch(self) -> None:
        watcher = asyncio.create_task(self._watch_engine())
        try:
            await self.serve(sockets=[self.socket])
        finally:
            watcher.cancel()

    async def _watch_engine(self) -> None:
        """Ends the server soon after its engine has failed."""
        while self.engine.failure is None:
            await asyncio.sleep(0.25)
        print("error: the engine has failed, so the server ends", file=sys.stderr, flush=True)
        await asyncio.sleep(1.0)  # for the errors of open requests
        self.should_exit = True


def _open_socket(options: ServerOptions) -> socket.socket:
    """Opens the socket of an address."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise UserError(
            f"the address {options.host}:{options.port} cannot be used: {error}. Choose another "
            "--host or --port."
        ) from None
    return opened
