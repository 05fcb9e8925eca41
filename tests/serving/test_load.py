"""Many requests, clients that leave, and hostile input. Slow: run with -m slow."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.serving.conftest import Running
from xflow_jax.serving.load import Load, run_load, summarize

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("XFLOW_LOAD_REQUESTS", "1000"))
MEMORY = 60 * 2**20  # of growth, for allocators and the client in the same process


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def idle(running: Running) -> bool:
    return running.engine.count_running() == running.engine.count_waiting() == 0


def wait_until_idle(running: Running) -> None:
    until = time.monotonic() + 60
    while not idle(running):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_many_requests_with_disconnects(running):
    def go(count: int, seed: int) -> dict[str, object]:
        load = Load(running.url, 30.0, count, 0.1, 16, "threshold:tau=0.5", seed)
        began = time.perf_counter()
        outcomes = asyncio.run(run_load(load))
        wait_until_idle(running)
        return summarize(outcomes, time.perf_counter() - began)

    go(100, 1)
    gc.collect()
    memory, threads = resident(), threading.active_count()
    figures = go(REQUESTS, 2)
    gc.collect()
    print(json.dumps(figures), f"memory {(resident() - memory) / 2**20:.1f} MiB")
    states = figures["requests"]
    assert states["ok"] + states["left"] + states.get("queue_full", 0) == REQUESTS
    assert states["left"] > REQUESTS * 0.03
    assert threading.active_count() <= threads + 1
    assert resident() - memory < MEMORY
    assert not running.server.engine._calls or idle(running)


def test_a_client_that_does_not_read(running):
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "n": 4,
            "xflow": {"rule": "threshold:tau=1", "belief": {"top": 4}},
        }
    ).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(("127.0.0.1", running.server.port))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        raw.sendall(head.encode() + body)
        time.sleep(0.2)
        began = time.monotonic()
        status, _ = post(running, json.dumps({"prompt": "a", "max_tokens": 8}).encode())
        assert status == 200 and time.monotonic() - began < 30
        wait_until_idle(running)  # the engine goes on without the reader


def post(running: Running, body: bytes, path: str = "/v1/completions", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def hostile_bodies() -> list[bytes]:
    """Returns 100 bodies, none of which can be answered."""
    rng = random.Random(0)
    good = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    values = [None, True, -1, 0, 1e300, 10**30, "x", [], {}, [[]], "\ud800", 2**63, [None], 0.5]
    bodies = [b"", b"{", b"[]", b"null", b"\x00" * 64, b"\xff\xfe", b'{"messages": NaN}']
    bodies += [b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b'"' + b"a" * 100_000 + b'"']
    while len(bodies) < 100:
        made = json.loads(json.dumps(good))
        field = rng.choice(["messages", "max_tokens", "n", "stop", "stream", "seed", "xflow"])
        made[field] = rng.choice(values)
        if rng.random() < 0.3:
            made["messages"] = [
                {"role": rng.choice(["user", "x", 3]), "content": rng.choice(values)}
            ]
        body = json.dumps(made).encode()
        bodies.append(body[: rng.randrange(len(body))] if rng.random() < 0.2 else body)
    return bodies


def test_hostile_input(running):
    for body in hostile_bodies():
        status, answer = post(running, body, "/v1/chat/completions")
        assert status in (200, 400, 413), body[:200]
        assert b"Traceback" not in answer
        if status != 200:
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    status, answer = post(running, b"x" * (5 * 2**20))
    assert status == 413 and json.loads(answer)["error"]["code"] == "too_large"
    half_open = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(50)]
    half_open[0].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    half_open[1].sendall(b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000)
    half_open[2].sendall(b"\x16\x03\x01 not HTTP")
    status, _ = post(running, json.dumps({"prompt": "a", "max_tokens": 8}).encode())
    assert status == 200
    for connection in half_open:
        connection.close()
    wait_until_idle(running)
    assert running.engine.is_alive
