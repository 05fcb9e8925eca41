"""Connections: errors before a request as JSON, and limits of time."""

from __future__ import annotations

import asyncio
import http
import json
import sys
from collections.abc import Callable

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from xflow_jax.serving.errors import ApiError

MOST_HEAD = 2**16  # bytes of a request line with its headers
HEAD_SECONDS = 30.0  # for a request's head to arrive
LINGER_SECONDS = 2.0  # for a client to read its error before the connection is reset


class Connection(H11Protocol):
    """Connection with a JSON error for bytes that are no request.

    uvicorn answers such bytes with plain text, and waits for the rest of a head for ever.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        count: Callable[[str], None] = lambda code: None,
    ) -> None:
        """Takes uvicorn's arguments, and a function that counts errors by their code."""
        super().__init__(config, server_state, app_state, _loop)
        self._count = count
        self._deadline: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Reads bytes. After an error they are dropped."""
        if not self._is_refused:
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._is_refused = True
        self._watch_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that are no request.

        uvicorn calls it while the error of h11 is handled.
        """
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.ProtocolError) else 400
        if status == http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"the head of the request has more than {MOST_HEAD} bytes"
            self._refuse(ApiError(message, status, code="too_large"))
        else:
            self._refuse(ApiError(f"the request is not HTTP/1.1: {error or msg}", status))

    def _watch_head(self) -> None:
        """Sets the time limit while a head is incomplete."""
        waits = self.conn.their_state is h11.IDLE and not self._is_refused
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse_late)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse_late(self) -> None:
        message = f"the head of the request did not arrive in {HEAD_SECONDS:g} s"
        self._refuse(ApiError(message, 408, code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Sends an error, and closes the connection a little later."""
        self._is_refused = True
        self._watch_head()
        self._count(error.code or str(error.status))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = http.HTTPStatus(error.status).phrase.encode()
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        # To close at once would reset a connection whose client is still sending, and the
        # error would be lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
