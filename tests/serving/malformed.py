"""Requests that no server can answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from xflow_jax.serving.json_fields import MOST_BYTES, MOST_DEPTH

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GOOD = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@dataclass(frozen=True)
class Malformed:
    """One request, with the status that it must get and text of the message."""

    body: bytes
    path: str = CHAT
    status: int = 400
    message: str = ""


def _bodies() -> Iterator[bytes]:
    """Yields bytes that are no JSON object of this API."""
    yield from (b"", b"{", b"[]", b"null", b"true", b"1", b'"text"', b"{} {}", b"{'a': 1}")
    yield from (b"\x00" * 64, b"\xff\xfe", b"\xef\xbb\xbf{}", json.dumps(GOOD).encode("utf-16"))
    yield from (b"[" * 200_000, b'{"a":' * 50_000, b'"' + b"a" * 100_000 + b'"')
    for number in ("NaN", "Infinity", "-Infinity", "9" * 5000, "01", "+1", ".5", "0x1"):
        yield json.dumps(GOOD).replace("4", number).encode()
    whole = json.dumps(GOOD).encode()
    yield from (whole[:at] for at in (1, 7, 20, 40, len(whole) - 1))
    yield json.dumps({**GOOD, "a": json.loads("[" * MOST_DEPTH + "]" * MOST_DEPTH)}).encode()


# Values of a field of a chat that are wrong.
FIELDS: dict[str, list[object]] = {
    "max_tokens": [0, -1, 1.5, "4", True, 1e300, 10**30, 49, []],
    "max_completion_tokens": [0, 2**63],
    "n": [0, 9, 1.5, "2", True, []],
    "stop": [3, [""], ["a"] * 5, [3], {"a": 1}, "a" * 257],
    "stream": [1, "true", []],
    "stream_options": [{"include_usage": True}, {"x": 1}, 3],
    "seed": [-1, 1.5, "a", 2**70, True],
    "temperature": [-1, 3, "0", True, 0.5, 1e300],
    "logprobs": [3, "yes"],
    "top_logprobs": [2, 5],
    "top_p": [0.5],
    "tools": [[{}]],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"1": 2}],
    "presence_penalty": [0.1],
    "model": [3, []],
    "messages": [
        None,
        [],
        {},
        "hi",
        3,
        [3],
        [None],
        [[]],
        [{}],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "x", "content": "hi"}],
        [{"role": 3, "content": "hi"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "long " * 200}],
    ],
    "xflow": [
        3,
        [],
        {"rules": "threshold"},
        {"rule": 3},
        {"rule": "nope"},
        {"rule": "flow:policy=/etc/passwd"},
        {"rule": "../x.py:Rule"},
        {"rule": "threshold:tau=9"},
        {"rule": "threshold:tau=nan"},
        {"steps": 0},
        {"steps": 5, "canvas": 48},
        {"steps": 10**9},
        {"budget": "2"},
        {"budget": "x"},
        {"budget": 0},
        {"canvas": 0},
        {"canvas": 10**9},
        {"belief": {}},
        {"belief": {"every": 0}},
    ],
}
PROMPTS: list[object] = [
    None, [], [True], [[]], {}, 3, [1, "a"], [-1], [10**9], [[10**9]], "\ud800", ["a"] * 65,
]  # fmt: skip


def malformed() -> list[Malformed]:
    """Returns more than a hundred requests."""
    found = [Malformed(body, message="the body") for body in _bodies()]
    found.append(Malformed(b" " * (MOST_BYTES + 1), status=413))
    for field, values in FIELDS.items():
        for value in values:
            found.append(Malformed(json.dumps({**GOOD, field: value}).encode()))
    found.append(Malformed(json.dumps({**GOOD, "model": "other"}).encode(), status=404))
    found += [
        Malformed(json.dumps({"prompt": prompt}).encode(), COMPLETION, message="prompt")
        for prompt in PROMPTS[:-1]
    ]
    found.append(Malformed(json.dumps({"prompt": PROMPTS[-1]}).encode(), COMPLETION))
    for body in ({}, {"prompt": 3}, {"messages": 3}):
        found.append(Malformed(json.dumps(body).encode(), "/tokenize"))
    for body in ({}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [10**9]}, {"tokens": [True]}):
        found.append(Malformed(json.dumps(body).encode(), "/detokenize"))
    return found
