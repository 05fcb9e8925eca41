"""Keys, time limits, failed calls on the device, and the end of a failed server."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import urllib.request

import openai
import pytest

from tests.serving.conftest import Running, start
from tests.serving.malformed import malformed
from xflow_jax.serving import api
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.lanes import DeviceLane
from xflow_jax.tasks import microcode

KEY = "secret"
MESSAGES = [{"role": "user", "content": microcode.TASK.example}]


@pytest.fixture(scope="module")
def running():
    """A server with one rule and a key. The last test of the module ends it."""
    found = start("threshold", api_key=KEY)
    found.wait_until_ready()
    yield found
    found.end()


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def ask(client, **fields):
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **fields)


def failures(running: Running) -> dict[str, float]:
    """Returns the counts of errors by their code."""
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=600) as answer:
        lines = answer.read().decode().splitlines()
    start = 'xflow:request_failure_total{code="'
    found = (line[len(start) :].split('"} ') for line in lines if line.startswith(start))
    return {code: float(count) for code, count in found}


def test_a_wrong_key(running, client):
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(client.with_options(api_key="wrong"))
    assert caught.value.code == "invalid_api_key" and "API key" in caught.value.body["message"]
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert client.models.list().data and failures(running)["invalid_api_key"] == 1


def test_a_request_that_takes_too_long(running, client, monkeypatch):
    limits = dataclasses.replace(running.engine.options, timeout=-1.0)
    monkeypatch.setattr(running.engine, "options", limits)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    with pytest.raises(openai.APIError) as within:
        list(ask(client, stream=True))
    assert within.value.code == "timeout" and within.value.type == "server_error"
    assert failures(running)["timeout"] == 2


def test_a_body_that_never_ends(running, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=600)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "99")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and json.loads(answer.read())["error"]["code"] == "timeout"
    connection.close()


@pytest.mark.slow
def test_a_hundred_malformed_requests(running, client):
    before = ask(client).choices[0].message.content
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=600)
    requests = malformed()
    assert len(requests) >= 100
    for bad in requests:
        connection.request("POST", bad.path, bad.body, {"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == bad.status, (bad.body[:200], text)
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert bad.message in error["message"] and len(error["message"]) < 1000
        assert "\n" not in error["message"] and "Traceback" not in error["message"]
    connection.close()
    assert running.engine.count_running() == running.engine.count_waiting() == 0
    assert ask(client).choices[0].message.content == before


def test_half_open_connections_and_large_heads(running, client):
    address = "127.0.0.1", running.server.port
    half_open = [socket.create_connection(address) for _ in range(50)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    half_open[0].sendall(
        head + f"Authorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n{{".encode()
    )
    half_open[1].sendall(head)
    half_open[2].sendall(b"\x16\x03")
    with socket.create_connection(address, timeout=600) as bomb:
        bomb.sendall(head + b"x: y\r\n" * 20_000)
        answer = http.client.HTTPResponse(bomb)
        answer.begin()
        assert answer.status == 431
        assert json.loads(answer.read())["error"]["code"] == "too_large"
    assert failures(running)["too_large"] >= 1
    assert ask(client).choices[0].finish_reason == "stop"
    for connection in half_open:
        connection.close()
    assert ask(client).choices[0].finish_reason == "stop"


class Torn:
    """An array whose computation has failed."""

    def __array__(self, *_: object, **__: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    def copy_to_host_async(self) -> None:
        """Does nothing."""


def fails_when_dispatched(self, live):
    raise RuntimeError("RESOURCE_EXHAUSTED")


def fails_when_read(self, live, run=DeviceLane.run):
    return dataclasses.replace(run(self, live), rows=Torn())


@pytest.mark.parametrize("failing", [fails_when_dispatched, fails_when_read])
def test_a_failed_call_on_the_device(running, client, monkeypatch, failing):
    before = ask(client).choices[0].message.content
    with monkeypatch.context() as patch:
        patch.setattr(DeviceLane, "run", failing)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, n=3)
        assert (caught.value.status_code, caught.value.code) == (500, "device_error")
        with pytest.raises(openai.APIError) as within:
            list(ask(client, stream=True))
        assert within.value.code == "device_error"
    assert running.engine.is_alive and running.engine.count_running() == 0
    assert ask(client).choices[0].message.content == before


def test_a_failed_engine_ends_the_server_with_status_1(running, client, monkeypatch):
    """The last test of the module: the server does not live longer."""

    def broken():
        if running.engine.count_waiting():  # else it is a tick of the test before
            raise RuntimeError("a bug")

    monkeypatch.setattr(running.engine, "_tick", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
    with pytest.raises(ApiError) as late:
        running.engine.submit([])
    assert (late.value.status, late.value.code) == (503, "engine_failed")
    assert running.wait() == 1
