"""Strict encoding of plain values, the one language between judge and program.

Only exact types cross: None, bool, int, float, complex, str, bytes, list, tuple, dict, set,
frozenset, and types that can equal one of these: Fraction, Decimal, range, and the keys and items
of a dict. Any other object of the program stays there and crosses as a number, a handle. The
decoder reads bytes of an untrusted process. It creates nothing but these types, within limits, and
raises DecodeError for everything else.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

MAX_BYTES = 8 << 20  # of one message
MAX_VALUES = 1 << 20  # values in one message, nested ones included
MAX_DEPTH = 100
MAX_INT_BYTES = 1 << 16

_U32 = struct.Struct("<I")
_F64 = struct.Struct("<d")
_CONTAINERS: dict[bytes, type] = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}
_TAGS = {kind: tag for tag, kind in _CONTAINERS.items()}
_MUTABLE = (list, dict, set)
# Types without parts of their own -> tag, and the plain values that make an equal object.
_MADE: dict[type, tuple[bytes, Callable[[Any], tuple[object, ...]]]] = {
    Fraction: (b"q", lambda value: (value.numerator, value.denominator)),
    Decimal: (b"m", lambda value: (Decimal.__str__(value),)),
    range: (b"g", lambda value: (value.start, value.stop, value.step)),
    type({}.keys()): (b"k", tuple),
    type({}.items()): (b"p", tuple),
}
_MADE_TAGS = b"".join(tag for tag, _ in _MADE.values())


class DecodeError(ValueError):
    """Bytes that are no message of this encoding."""


class EncodeError(ValueError):
    """A value that is too large, too deep or a cycle."""


class CannotCross(BaseException):
    """An object that is no plain value, and that has no handle."""


class Handle(NamedTuple):
    """Number and type of an object that stays on its side."""

    number: int
    name: str


class Encoder:
    """Encodes one message.

    Attributes:
        data: the bytes so far.
        containers: the lists, dicts and sets so far if `shared`. A repeated one crosses as its
            position, so aliases and cycles stay what they are.

    Args:
        outside: object -> its Handle, or a plain value in its place, for objects that are no plain
            values. It raises CannotCross if there is neither.
        known: containers that the other side has already. They cross as positions.
        shared: True to add new containers to the known ones.
    """

    def __init__(
        self,
        outside: Callable[[object], object],
        known: list[object] | None = None,
        shared: bool = False,
    ) -> None:
        self.data = bytearray()
        self.containers: list[object] = [] if known is None else known
        self._positions = {id(value): i for i, value in enumerate(self.containers)}
        self._outside, self._shared, self._values = outside, shared, 0

    def encode(self, value: object, depth: int = 0) -> None:
        """Appends a value.

        Raises:
            EncodeError: it is above a limit.
            CannotCross: a part of it cannot cross.
        """
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES or len(self.data) > MAX_BYTES:
            raise EncodeError("the value is too large, too deep or contains itself")
        kind = type(value)
        if kind in _MUTABLE and id(value) in self._positions:
            self.data += b"r" + _U32.pack(self._positions[id(value)])
        elif kind in _MUTABLE and self._shared:
            self._positions[id(value)] = len(self.containers)
            self.containers.append(value)
            self._encode_parts(kind, value, depth)
        elif not self._encode_leaf(kind, value) and not self._encode_parts(kind, value, depth):
            other = self._outside(value)
            if type(other) is Handle:
                self._encode_text(b"o" + _U32.pack(other.number), other.name[:100].encode())
            else:
                self.encode(other, depth + 1)

    def _encode_leaf(self, kind: type, value: Any) -> bool:
        if value is None or kind is bool:
            self.data += b"N" if value is None else b"T" if value else b"F"
        elif kind is int:
            size = (int.bit_length(value) + 8) // 8
            if size > MAX_INT_BYTES:
                raise EncodeError("the number is too large")
            self._encode_text(b"i", int.to_bytes(value, size, "little", signed=True))
        elif kind is float:
            self.data += b"f" + _F64.pack(value)
        elif kind is complex:
            self.data += b"c" + _F64.pack(value.real) + _F64.pack(value.imag)
        elif kind is str:
            self._encode_text(b"s", str.encode(value, "utf-8", "surrogatepass"))
        elif kind is bytes:
            self._encode_text(b"b", value)
        else:
            return False
        return True

    def _encode_text(self, tag: bytes, text: bytes) -> None:
        if len(text) > MAX_BYTES:
            raise EncodeError("the value is too large")
        self.data += tag + _U32.pack(len(text)) + text

    def _encode_parts(self, kind: type, value: Any, depth: int) -> bool:
        if kind is dict:
            self.data += b"d" + _U32.pack(len(value))
            for key, item in list(value.items()):
                self.encode(key, depth + 1)
                self.encode(item, depth + 1)
        elif kind in _TAGS:
            self.data += _TAGS[kind] + _U32.pack(len(value))
            for item in tuple(value):
                self.encode(item, depth + 1)
        elif kind in _MADE:
            tag, parts_of = _MADE[kind]
            self.data += tag
            self._encode_parts(tuple, parts_of(value), depth)
        else:
            return False
        return True


class Decoder:
    """Decodes one message. Every error in it is a DecodeError.

    Args:
        data: the message.
        inside: the object of a Handle. It raises DecodeError for an unknown number.
        known: containers of earlier messages, to which positions refer.
        shared: True to add new containers to the known ones, as the encoder did.
    """

    def __init__(
        self,
        data: bytes,
        inside: Callable[[Handle], object],
        known: list[object] | None = None,
        shared: bool = False,
    ) -> None:
        self.containers: list[object] = [] if known is None else known
        self._data, self._at, self._values = data, 0, 0
        self._inside, self._shared = inside, shared

    def decode(self) -> object:
        """Returns the one value of the message."""
        try:
            value = self._value(0)
        except (UnicodeError, TypeError, ArithmeticError, RecursionError) as error:
            raise DecodeError(type(error).__name__) from None
        if self._at != len(self._data):
            raise DecodeError("bytes after the end")
        return value

    def _take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise DecodeError("it ends early")
        self._at += size
        return part

    def _count(self, limit: int) -> int:
        count = _U32.unpack(self._take(4))[0]
        if count > min(limit, len(self._data) - self._at):
            raise DecodeError("it ends early")
        return count

    def _value(self, depth: int) -> object:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise DecodeError("too large or too deep")
        tag = self._take(1)
        if tag in _CONTAINERS or tag == b"d":
            return self._parts(tag, depth)
        if tag == b"r":
            position = _U32.unpack(self._take(4))[0]
            if position >= len(self.containers):
                raise DecodeError("an unknown position")
            return self.containers[position]
        if tag == b"o":
            number = _U32.unpack(self._take(4))[0]
            return self._inside(Handle(number, self._take(self._count(400)).decode()))
        if tag in _MADE_TAGS:
            return self._made(tag, depth)
        return self._leaf(tag)

    def _leaf(self, tag: bytes) -> object:
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"f":
            return _F64.unpack(self._take(8))[0]
        if tag == b"c":
            return complex(_F64.unpack(self._take(8))[0], _F64.unpack(self._take(8))[0])
        if tag == b"i":
            return int.from_bytes(self._take(self._count(MAX_INT_BYTES)), "little", signed=True)
        if tag == b"s":
            return self._take(self._count(MAX_BYTES)).decode("utf-8", "surrogatepass")
        if tag == b"b":
            return self._take(self._count(MAX_BYTES))
        raise DecodeError("an unknown tag")

    def _parts(self, tag: bytes, depth: int) -> object:
        count = self._count(MAX_VALUES)
        if tag == b"d":
            table: dict[object, object] = {}
            self._keep(table)
            for _ in range(count):
                key = self._value(depth + 1)
                table[key] = self._value(depth + 1)
            whole: Collection[object] = table
        elif tag == b"l":
            items: list[object] = []
            self._keep(items)
            for _ in range(count):
                items.append(self._value(depth + 1))
            return items
        elif tag == b"e":
            members: set[object] = set()
            self._keep(members)
            for _ in range(count):
                members.add(self._value(depth + 1))
            whole = members
        else:
            whole = _CONTAINERS[tag]([self._value(depth + 1) for _ in range(count)])
        if len(whole) != count:
            raise DecodeError("equal keys")
        return whole

    def _made(self, tag: bytes, depth: int) -> object:
        """Makes an object of its plain values."""
        if self._take(1) != _TAGS[tuple]:
            raise DecodeError("no parts")
        parts: Any = self._parts(_TAGS[tuple], depth)
        kinds = {type(part) for part in parts}
        if tag == b"k":
            keys = dict.fromkeys(parts)
            if len(keys) == len(parts):
                return keys.keys()
        elif tag == b"p" and kinds <= {tuple} and all(len(part) == 2 for part in parts):
            items = dict(parts)
            if len(items) == len(parts):
                return items.items()
        elif tag == b"q" and kinds == {int} and len(parts) == 2:
            return Fraction(*parts)
        elif tag == b"g" and kinds == {int} and len(parts) == 3 and parts[2] != 0:
            return range(*parts)
        elif tag == b"m" and kinds == {str} and len(parts) == 1:
            return Decimal(parts[0])
        raise DecodeError("parts of another object")

    def _keep(self, container: object) -> None:
        if self._shared:
            self.containers.append(container)
