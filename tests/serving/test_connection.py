"""Bytes that are no request, and clients that never finish one: a JSON error each."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from xflow_jax.serving import connection
from xflow_jax.serving.connection import MOST_HEAD, Connection


async def app(scope, receive, send):
    """Reads a body, and answers with its size."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size})


made: list[Connection] = []


def exchange(*parts: bytes) -> tuple[bytes, list[str]]:
    """Returns what a client receives until the end, and the codes that were counted."""
    counted: list[str] = []

    async def talk() -> bytes:
        config = Config(app, ws="none", h11_max_incomplete_event_size=MOST_HEAD, log_level="error")
        state = ServerState()
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            made.append(Connection(config, state, {}, count=counted.append))
            return made[-1]

        server = await loop.create_server(connect, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        server.close()
        return answer

    return asyncio.run(talk()), counted


BIG = b"y" * (2 * MOST_HEAD)


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        ([b"GET / HTTP/1.1\r\nx: " + BIG], 431, "more than 65536 bytes"),
        ([b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 40_000], 431, "more than 65536 bytes"),
        ([b"GET /" + BIG + b" HTTP/1.1\r\n\r\n"], 431, "more than 65536 bytes"),
        ([b"\x16\x03\x01 not HTTP\r\n\r\n"], 400, "not HTTP/1.1"),
        ([b"GET / HTTP/1.1\r\n\r\n"], 400, "Host"),
        ([b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"], 400, "Content-Length"),
        ([b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n"], 501, "Transfer-Encoding"),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n"], 400, ""),
    ],
)
def test_what_is_no_request(parts, status, message):
    answer, counted = exchange(*parts)
    head, body = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and b"application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"]
    assert counted == [error["code"] or str(status)]


@pytest.mark.parametrize("parts", [(), (b"GET / HT",), (b"GET / HTTP/1.1\r\nHost: x\r\n",)])
def test_a_head_that_never_ends(monkeypatch, parts):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    answer, counted = exchange(*parts)
    assert answer.startswith(b"HTTP/1.1 408 ") and counted == ["timeout"]
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "timeout"


def test_a_request_has_no_limit_of_time_once_its_head_is_there(monkeypatch):
    plain, deadlines = app, []

    async def watched(scope, receive, send):
        deadlines.append(made[-1]._deadline)
        await plain(scope, receive, send)

    monkeypatch.setattr(sys.modules[__name__], "app", watched)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    answer, counted = exchange(head, b"abc")
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"3\r\n0\r\n\r\n")
    assert deadlines == [None] and not counted
