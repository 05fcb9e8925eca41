"""The server as clients meet it: the openai client, and raw connections."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import socket
import threading
import time

import numpy as np
import openai
import pytest

from tests.serving.conftest import QUEUE, SLOTS
from xflow_jax.decoding import generate, parse_rule
from xflow_jax.serving.api import ApiOptions, make_app
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids

PROMPT = microcode.TASK.example
MESSAGES = [{"role": "user", "content": PROMPT}]
RULES = ["threshold", "flow:early_exit=true"]


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, rule=RULES[0], prompt=PROMPT, **fields):
    own = {"rule": rule, **fields.pop("xflow", {})}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        extra_body={"xflow": own},
        **fields,
    )


def request(running, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=600)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def wait_until(ready, seconds=300.0):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_small_endpoints(running, client):
    for path in ("/health", "/ready", "/version"):
        status, body, _ = request(running, "GET", path)
        assert status == 200 and json.loads(body)
    assert request(running, "GET", "/")[1] == b"<p>the page</p>"
    model = client.models.retrieve("tiny")
    assert client.models.list().data[0].id == model.id == "tiny"
    assert model.xflow["rules"] == RULES and model.xflow["revises"] == [False, True]
    assert model.xflow["gen_lengths"] == [48] and model.xflow["prompt_lengths"] == [64]
    assert model.xflow["examples"] == [microcode.TASK.example]


@pytest.mark.parametrize("text", [PROMPT, "\U0001f600 \u4f60\u597d e\u0301"])
def test_tokenize_and_back(running, text):
    made = request(running, "POST", "/tokenize", json.dumps({"prompt": text}))[1]
    ids = json.loads(made)["tokens"]
    back = request(running, "POST", "/detokenize", json.dumps({"tokens": ids}))[1]
    assert json.loads(back) == {"prompt": text}
    messages = [{"role": "user", "content": text}]
    chat = request(running, "POST", "/tokenize", json.dumps({"messages": messages}))[1]
    assert json.loads(chat)["count"] > len(ids)


@pytest.mark.parametrize("rule", RULES)
def test_deltas_join_to_the_answer_and_frames_to_the_canvas(running, client, rule):
    whole = ask(client, rule)
    text, choice = whole.choices[0].message.content, whole.choices[0]
    assert text.strip() and choice.finish_reason == "stop"
    about = whole.xflow
    assert about["rule"] == rule and about["canvas"] == 48 and about["steps"] == 48
    assert 0 < about["forward_passes"] <= 48 and about["decode_ms"] > 0
    own = {"belief": {"every": 1, "top": 2}}
    chunks = list(ask(client, rule, stream=True, stream_options={"include_usage": True}, xflow=own))
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].xflow["forward_passes"] == about["forward_passes"]
    first = chunks[0].xflow
    assert (first["canvas"], first["block_length"], first["steps"]) == (48, 16, 48)
    check_frames(
        running, [c.xflow for c in chunks if "at" in (c.model_extra.get("xflow") or {})], text
    )


def check_frames(running, frames, text):
    """Checks that the frames lead to the answer."""
    ids, t = np.full(48, -1), np.zeros(48, int)
    assert frames[0]["key"] and frames[0]["at"] == list(range(48))
    for frame in frames:
        lists = [frame[name] for name in ("at", "id", "text", "t", "c", "edited", "top")]
        assert len({len(part) for part in lists}) == 1
        ids[frame["at"]], t[frame["at"]] = frame["id"], frame["t"]
    lm = running.engine.lm
    end = int(np.argmax(np.isin(ids, lm.config.stop_ids)))
    assert lm.tokenizer.decode(ids[:end].tolist()) == text
    assert all(len(entry) == 3 for entry in frames[-1]["top"][0])


def test_an_answer_is_the_same_alone_and_among_others(running, client):
    alone = ask(client, logprobs=True, top_logprobs=4)
    results: list[object] = []
    others = [
        threading.Thread(target=lambda i=i: results.append(ask(client, RULES[0], PROMPT + "!" * i)))
        for i in range(1, 2 * SLOTS)
    ]
    for thread in others:
        thread.start()
    for _ in range(2):
        again = ask(client, logprobs=True, top_logprobs=4)
        assert again.choices[0].message == alone.choices[0].message
        assert again.choices[0].logprobs == alone.choices[0].logprobs
    for thread in others:
        thread.join()
    assert len(results) == 2 * SLOTS - 1


def test_log_probabilities(client):
    choice = ask(client, logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    assert "".join(e.token for e in entries) == choice.message.content
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)
    assert all(math.isclose(e.logprob, e.top_logprobs[0].logprob) for e in entries)
    old = client.completions.create(model="tiny", prompt=PROMPT, logprobs=1, max_tokens=16)
    assert len(old.choices[0].logprobs.tokens) == len(old.choices[0].logprobs.token_logprobs)


def test_several_answers_prompts_and_lengths(running, client):
    made = client.completions.create(model="tiny", prompt=["a", [1, 2, 3]], n=2, max_tokens=10)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == made.choices[1].text
    first = running.engine.lm.tokenizer.encode("a", add_special_tokens=False)
    assert made.usage.prompt_tokens == len(first) + 3 and made.xflow["canvas"] == 16
    text = ask(client).choices[0].message.content
    short = ask(client, max_completion_tokens=3, max_tokens=9).choices[0]
    assert short.finish_reason == "length" and len(short.message.content) < len(text)


def test_stop_texts(client):
    text = ask(client).choices[0].message.content
    stop = text[len(text) // 2 :][:5]
    for stream in (False, True):
        made = ask(client, stop=["\u2603", stop], stream=stream)
        parts = made if stream else [made]
        got = "".join(
            (c.choices[0].delta.content or "") if stream else c.choices[0].message.content
            for c in parts
        )
        assert got == text[: text.index(stop)]


def test_fields_that_are_ignored_are_listed(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=2, metadata={"a": "b"}, store=False
    )
    assert raw.headers["x-xflow-ignored"] == "metadata, store"


def test_a_long_rule_text_with_numbers(client):
    made = ask(client, "threshold:tau=0.99", xflow={"budget": "1/2"})
    assert made.xflow["rule"] == "threshold:tau=0.99" and made.xflow["steps"] == 24


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"max_tokens": 49}, "context_length_exceeded", "room for 48"),
        ({"prompt": "x " * 200}, "context_length_exceeded", "the server has room for 64 and 48"),
        ({"temperature": 0.5}, None, "does not sample"),
        ({"rule": "mask"}, None, "the server has no program for the rule mask"),
        ({"rule": "nope"}, None, "there is no rule 'nope'"),
        ({"rule": "flow:policy=/etc/passwd"}, None, "a rule of a request is a name with numbers"),
        ({"rule": "os:path"}, None, "a rule of a request is a name with numbers"),
        ({"rule": "./x.py:Rule"}, None, "a rule of a request is a name with numbers"),
        ({"rule": "threshold:tau=7"}, None, "tau must be between 0 and 1"),
        ({"xflow": {"steps": 5}}, None, "5 steps do not divide over 3 blocks"),
        ({"xflow": {"steps": 150}}, None, "more steps than positions"),
        ({"xflow": {"canvas": 16}, "max_tokens": 20}, None, "xflow.canvas is 16"),
    ],
)
def test_requests_that_cannot_be_answered(client, fields, kind, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, **fields)
    assert caught.value.code == kind


def test_other_models_endpoints_and_methods(running, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)]:
        got, body, _ = request(running, method, path)
        assert got == status and json.loads(body)["error"]["message"]


def test_a_client_that_leaves_frees_its_slot(running):
    slow = {"xflow": {"rule": "threshold:tau=1", "steps": 48}, "messages": MESSAGES}
    for stream in (True, False):
        body = json.dumps({**slow, "stream": stream, "n": 3}).encode()
        with socket.create_connection(("127.0.0.1", running.server.port)) as raw:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            raw.sendall(f"{head}\r\n\r\n".encode() + body)
            wait_until(lambda: running.engine.count_running() > 0)
        wait_until(lambda: running.engine.count_running() == 0)
    wait_until(lambda: running.engine.count_waiting() == 0)


def test_a_request_is_cancelled_by_its_id(running, client):
    stream = ask(client, "threshold:tau=1", stream=True)
    name = next(iter(stream)).id
    status, body, _ = request(running, "DELETE", f"/v1/requests/{name}")
    assert status == 200 and json.loads(body)["cancelled"]
    assert list(stream)[-1].choices[0].finish_reason in ("cancelled", "stop")
    assert request(running, "DELETE", "/v1/requests/none")[0] == 404


def test_the_requests_of_lm_evaluation_harness(running):
    """Those of lm-eval 0.4.13. test_lm_eval.py has its own classes."""
    sent = {"model": "tiny", "temperature": 0, "seed": 1234, "max_tokens": 48}
    sent["stop"] = ["\n\n", "<|endoftext|>"]
    bearer = {"Authorization": "Bearer "}
    chat = {**sent, "messages": [{**MESSAGES[0], "type": "text"}]}
    status, body, _ = request(running, "POST", "/v1/chat/completions", json.dumps(chat), bearer)
    (choice,) = json.loads(body)["choices"]
    assert status == 200 and choice["index"] == 0 and choice["message"]["content"].strip()
    several = {**sent, "prompt": [PROMPT, "Sort them."]}
    status, body, _ = request(running, "POST", "/v1/completions", json.dumps(several), bearer)
    choices = json.loads(body)["choices"]
    assert status == 200 and [c["index"] for c in choices] == [0, 1]
    assert all(isinstance(c["text"], str) for c in choices)
    likelihood = {**sent, "prompt": [[1, 2, 3]], "max_tokens": 1, "logprobs": 1, "echo": True}
    status, body, _ = request(running, "POST", "/v1/completions", json.dumps(likelihood), bearer)
    assert status == 400 and json.loads(body)["error"]["param"] == "echo"


def test_a_full_queue(running, client):
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt=["a"] * (QUEUE + 1), n=1)
    assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"])
    wait_until(lambda: running.engine.count_waiting() == 0)


def call(app, method, path, body=b"", headers=()):
    """Calls an ASGI application without a socket."""
    sent = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    scope |= {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def test_keys_and_large_bodies(running):
    app = make_app(running.engine, ApiOptions("tiny", api_key="secret"))
    assert call(app, "GET", "/health")[0] == 200
    for headers in [(), [(b"authorization", b"Bearer wrong")], [(b"authorization", b"\xff")]]:
        status, body = call(app, "GET", "/v1/models", headers=headers)
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
    right = [(b"authorization", b"Bearer secret")]
    assert call(app, "GET", "/v1/models", headers=right)[0] == 200
    status, body = call(app, "POST", "/v1/completions", b"x" * (4 * 2**20 + 1), right)
    assert status == 413 and body["error"]["code"] == "too_large"


def test_metrics_and_no_compilation_after_the_start(running, client):
    ask(client)
    text = request(running, "GET", "/metrics")[1].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["xflow:compilations_total"]) == 0
    assert float(values["xflow:generation_tokens_total"]) > 0
    assert float(values["xflow:forward_passes_total"]) > 0
    assert float(values['xflow:request_success_total{finished_reason="stop"}']) > 0
    assert float(values["xflow:end_to_end_seconds_count"]) > 0
    assert float(values["xflow:num_requests_running"]) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_those_of_generate(running, client, rule):
    # Answers to nonsense change with the shape of the batch, by rounding.
    lm, others = running.engine.lm, ["Keep the even numbers and return the count.", "Sort them."]
    for prompt in [PROMPT, *others]:
        ids = chat_ids(lm.tokenizer, prompt)
        expected = generate(lm, [ids], parse_rule(rule)[1], 48, 48, block_length=16)
        assert ask(client, rule, prompt).choices[0].message.content == expected.texts[0]


@pytest.mark.slow
def test_draining(running):
    """The last test of the module: nothing is accepted after it."""
    done: list[object] = []
    body = json.dumps({"messages": MESSAGES, "xflow": {"rule": "threshold:tau=1"}, "n": 4})

    def work():
        done.append(request(running, "POST", "/v1/chat/completions", body))

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: running.engine.count_running() == 4)
    running.server.begin_drain()
    status, refusal, _ = request(running, "POST", "/v1/chat/completions", body)
    assert status == 503 and json.loads(refusal)["error"]["code"] == "draining"
    thread.join()
    assert done[0][0] == 200 and len(json.loads(done[0][1])["choices"]) == 4
    assert running.end() == 0
