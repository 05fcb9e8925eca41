"""Many requests, clients that leave or do not read, and SIGTERM. Slow: run with -m slow."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from tests.serving.server_process import ServerProcess
from xflow_jax.decoding import Threshold
from xflow_jax.lm import load
from xflow_jax.serving import (
    Lengths,
    Load,
    arrival_times,
    make_prompts,
    run_continuous,
    run_load,
    run_static,
    summarize,
)
from xflow_jax.tokenizer import chat_ids

REQUESTS = int(os.environ.get("XFLOW_LOAD_REQUESTS", "1000"))
RATE = float(os.environ.get("XFLOW_LOAD_RATE", "30"))  # requests a second
MEMORY = 40 * 2**20  # of growth, for allocators
MESSAGES = [{"role": "user", "content": "Sort them."}]
SLOW = "threshold:tau=1"


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    """A server with four slots."""
    found = ServerProcess("--slots", "4")
    yield found
    found.terminate()
    assert found.wait() == 0


def test_times_of_requests():
    times = arrival_times(2000, 5.0, 3)
    assert times[0] == 0 and times == sorted(times) and times == arrival_times(2000, 5.0, 3)
    assert abs(times[-1] / 2000 - 1 / 5) < 0.02
    assert set(arrival_times(4, float("inf"))) == {0.0}


@pytest.mark.slow
def test_many_requests_with_disconnects(process):
    def go(count: int, seed: int) -> dict[str, object]:
        wanted = Load(process.url, RATE, count, 0.05, 16, "threshold:tau=0.5", seed)
        began = time.perf_counter()
        outcomes = asyncio.run(run_load(wanted))
        process.wait_until_idle()
        return summarize(outcomes, time.perf_counter() - began)

    go(200, 1)
    before = process.resident(), process.threads(), process.open_files()
    figures = go(REQUESTS, 2)
    after = process.resident(), process.threads(), process.open_files()
    print(json.dumps(figures))
    for name, old, new in zip(("bytes", "threads", "files"), before, after, strict=True):
        print(f"{name}: {old} before, {new} after")
    states = figures["requests"]
    assert states["ok"] + states["left"] + states.get("queue_full", 0) == REQUESTS
    assert states["left"] > REQUESTS * 0.02
    assert process.metric("slots_busy") == process.metric("num_requests_waiting") == 0
    assert process.metric("compilations_total") == 0
    assert after[0] - before[0] < MEMORY
    assert after[1] <= before[1] and after[2] <= before[2] + 2


def start_stream(process: ServerProcess, buffer: int | None = None) -> socket.socket:
    """Sends a request for long streams, and returns the connection without reading."""
    body = {"messages": MESSAGES, "stream": True, "n": 4}
    text = json.dumps(body | {"xflow": {"rule": SLOW, "belief": {"top": 4}}})
    raw = socket.socket()
    if buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    host, port = process.url.removeprefix("http://").split(":")
    raw.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    raw.sendall((head + text).encode())
    return raw


@pytest.mark.slow
def test_a_client_that_does_not_read(process):
    with (
        start_stream(process, 2048),
        openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client,
    ):
        process.wait_until_idle()  # the engine goes on without the reader
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_sigterm_ends_what_has_begun_and_refuses_the_rest():
    ending = ServerProcess("--slots", "2", "--steps-per-call", "1", "--drain", "600")
    text, finished = [], []
    with openai.OpenAI(base_url=f"{ending.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            n=8,
            stream=True,
            extra_body={"xflow": {"rule": SLOW}},
        )
        chunks = iter(stream)
        next(chunks)

        def read() -> None:
            for chunk in chunks:
                text.append(chunk.choices[0].delta.content or "")
                finished.append(chunk.choices[0].finish_reason)

        reader = threading.Thread(target=read)
        reader.start()
        ending.terminate()
        refused = None
        while refused is None:  # the signal arrives a little later
            try:
                urllib.request.urlopen(f"{ending.url}/ready", timeout=60).close()
            except urllib.error.HTTPError as error:
                refused = error.code, json.loads(error.read())["error"]["code"]
        reader.join()
    assert refused == (503, "draining")
    assert ending.wait() == 0
    reasons = [reason for reason in finished if reason is not None]
    assert len(reasons) == 8 and set(reasons) <= {"stop", "length"} and any(text)


@pytest.mark.slow
def test_static_batches_give_the_same_answers():
    lm, task = load("tiny"), Lengths((48,), (64,), 16, 4)
    prompts = [chat_ids(lm.tokenizer, prompt) for prompt in make_prompts(10)]
    times = arrival_times(10, 20.0)
    static = run_static(lm, Threshold(), prompts, task, times)
    continuous = run_continuous(lm, Threshold(), prompts, task, times)
    assert np.mean([a.tokens == b.tokens for a, b in zip(static, continuous, strict=True)]) > 0.8
    assert all(a.passes >= b.passes - 1 for a, b in zip(static, continuous, strict=True))
    assert summarize(static, 1.0)["requests"] == {"ok": 10}
