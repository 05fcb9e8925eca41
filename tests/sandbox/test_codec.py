"""Encoding between judge and program: exact types cross, and all other bytes are refused."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from fractions import Fraction

import pytest

from xflow_jax.sandbox.codec import (
    MAX_DEPTH,
    CannotCross,
    DecodeError,
    Decoder,
    EncodeError,
    Encoder,
    Handle,
)


def refuse(value: object) -> object:
    raise CannotCross(type(value).__name__)


def encode(value: object, **options) -> bytes:
    encoder = Encoder(refuse, **options)
    encoder.encode(value)
    return bytes(encoder.data)


def decode(data: bytes, **options) -> object:
    return Decoder(data, lambda handle: handle, **options).decode()


VALUES = [
    None, True, False, 0, -1, 255, -256, 1 << 400, -(1 << 400), 0.5, -0.0, math.inf, 1j, -2.5 + 3j,
    "", "text", "\0", "\ud800", "\U0001f600", b"", b"\xff\0", [], [1, [2, [3]]], (), (1, (2,)),
    {}, {"a": [1], 2: {"b": None}, (1, 2): {3}}, set(), {1, "a", None}, frozenset(),
    frozenset({frozenset({1}), ()}), [[], (), {}, set()],
    Fraction(-1, 3), Fraction(1 << 200, 7), Decimal("-0.10"), Decimal("1e-400"),
    Decimal("Infinity"),
    range(3), range(9, -(1 << 70), -2), {"b": 1, "a": [2]}.keys(), {"b": 1, "a": [2]}.items(),
    {}.keys(), {}.items(), [Fraction(1, 2), {"half": Decimal("0.5")}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=map(str, range(len(VALUES))))
@pytest.mark.parametrize("shared", [False, True])
def test_values_keep_their_types(value, shared):
    again = decode(encode(value, shared=shared), shared=shared)
    assert repr(again) == repr(value) or (again == value and type(again) is type(value))
    assert math.isnan(decode(encode(math.nan)))


def test_aliases_and_cycles_keep_their_form():
    inner: list[object] = [1]
    value = [inner, inner, {"again": inner}]
    value.append(value)
    again = decode(encode(value, shared=True), shared=True)
    assert again[0] is again[1] is again[2]["again"] and again[3] is again
    with pytest.raises(EncodeError, match="contains itself"):
        encode(value)


@pytest.mark.parametrize(
    "value", [object(), len, iter([]), {}.values(), slice(3), bytearray(), type, (7).real]
)
def test_other_objects_need_a_handle(value):
    if type(value) is int:
        assert decode(encode(value)) == 7
        return
    with pytest.raises(CannotCross):
        encode([value])
    encoder = Encoder(lambda value: Handle(5, "kind"))
    encoder.encode([value])
    assert decode(bytes(encoder.data)) == [Handle(5, "kind")]


def test_subclasses_are_not_their_bases():
    class Own(int):
        pass

    for value in (Own(7), [Own(7)], {Own(7): 1}):
        with pytest.raises(CannotCross):
            encode(value)
    encoder = Encoder(int.__int__)
    encoder.encode(Own(7))
    assert type(decode(bytes(encoder.data))) is int


def test_limits_of_values():
    deep: list[object] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for value in (deep, [None] * (1 << 21), "x" * (9 << 20), 1 << (1 << 20)):
        with pytest.raises(EncodeError):
            encode(value)


BAD = [
    b"", b"?", b"NN", b"l", b"l\1\0\0\0", b"l\xff\xff\xff\xff",
    b"s\2\0\0\0\xff\xfe", b"s\5\0\0\0abc",
    b"i\0\0", b"f1234567", b"c12345678", b"r\0\0\0\0",
    b"d\1\0\0\0l\0\0\0\0N", b"e\1\0\0\0l\0\0\0\0",
    b"d\2\0\0\0TNTN", b"e\2\0\0\0TT", b"z\2\0\0\0i\1\0\0\0\1T", b"o\1\0\0\0\2\0\0\0\xff\xfe",
    b"q", b"qN", b"qt\0\0\0\0", b"qt\2\0\0\0i\1\0\0\0\1i\1\0\0\0\0", b"qt\2\0\0\0TT",
    b"mt\1\0\0\0s\1\0\0\0x", b"mt\1\0\0\0T", b"gt\3\0\0\0" + b"i\1\0\0\0\0" * 3,
    b"kt\2\0\0\0TT", b"kt\1\0\0\0l\0\0\0\0", b"pt\1\0\0\0T", b"pt\1\0\0\0t\1\0\0\0T",
    b"l\1\0\0\0" * 100_000 + b"N", b"i\0\0\2\0" + b"x" * (1 << 17),
]  # fmt: skip


@pytest.mark.parametrize("data", BAD, ids=lambda data: repr(data[:20]))
def test_malformed_bytes_are_one_kind_of_error(data):
    with pytest.raises(DecodeError):
        decode(data)


def test_every_damaged_message_is_a_value_or_that_error():
    """20,000 messages: cut, changed, and random."""
    draw = random.Random(0)
    whole = encode([VALUES, {"key": VALUES}, {1.5, "text"}])
    for number in range(20_000):
        data = bytearray(whole if number % 2 else draw.randbytes(draw.randrange(60)))
        for _ in range(draw.randrange(1, 4)):
            if data:
                data[draw.randrange(len(data))] = draw.choice(b"NTFifcsbltdezorqmgkp\0\1\xff")
        data = data[: draw.randrange(len(data) + 1)] if number % 3 == 0 else data
        try:
            decode(bytes(data))
        except DecodeError:
            continue
