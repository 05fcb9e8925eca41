"""Bodies of requests as JSON objects."""

from __future__ import annotations

import json

import pytest

from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.json_fields import MOST_DEPTH, read_json


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nul", b'{"a": NaN}', b'{"a": Infinity}', b"\xff{}", b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * MOST_DEPTH + b"]" * MOST_DEPTH + b"}",
        b"1", b'"text"', b"{} {}",
    ],
)  # fmt: skip
def test_wrong_bodies(body):
    with pytest.raises(ApiError, match="^the body"):
        read_json(body)


def test_a_body_of_the_greatest_depth():
    deep = MOST_DEPTH - 1
    body = json.dumps({"a": json.loads("[" * deep + "]" * deep)}).encode()
    assert read_json(body)["a"]
