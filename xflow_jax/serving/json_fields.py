"""Strict reader of JSON bodies and of their fields."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from xflow_jax.errors import describe, printable
from xflow_jax.serving.errors import ApiError

Json: TypeAlias = dict[str, object]

MOST_BYTES = 4 * 2**20  # of a body
MOST_DEPTH = 16  # of nested lists and objects


def reject(param: str, right: str, value: object) -> NoReturn:
    """Raises the ApiError of a value.

    Args:
        param: name of the field.
        right: description of right values.
        value: the wrong one.
    """
    raise ApiError(f"{param} must be {right}, not {describe(value)}", param=param)


def read_json(body: bytes) -> Json:
    """Reads the JSON object of a body.

    Args:
        body: the bytes.

    Returns:
        The object.

    Raises:
        ApiError: unless it is one object of RFC 8259, of limited depth.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ApiError("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, not {describe(value)}")
    _check_depth(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_depth(value: object) -> None:
    """Raises ApiError for a value of too many levels."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ApiError(f"the body has more than {MOST_DEPTH} levels of nesting")
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [
            child
            for part in inner
            if isinstance(part, list)
            for child in part
            if isinstance(child, dict | list)
        ]


class Fields:
    """Fields of an object, read one by one with their types."""

    def __init__(self, values: Json, prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def _name(self, key: str) -> str:
        return self.prefix + key

    def whole(self, key: str, least: int, most: int | None = None) -> int | None:
        """Returns a whole number in a range, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        upper = math.inf if most is None else most
        if not (is_whole and isinstance(value, int) and least <= value <= upper):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            reject(self._name(key), f"a whole number {bounds}", value)
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """Returns a number in a range, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            reject(self._name(key), f"a number from {least:g} to {most:g}", value)
        if not least <= value <= most:
            reject(self._name(key), f"a number from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns a boolean. None is False."""
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            reject(self._name(key), "true or false", value)
        return bool(value)

    def text(self, key: str) -> str | None:
        """Returns a text, or None."""
        value = self.values.get(key)
        if not isinstance(value, str | None):
            reject(self._name(key), "a text", value)
        return value

    def part(self, key: str, known: Sequence[str]) -> Fields | None:
        """Returns an object that may have known keys alone, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        name = self._name(key)
        if not isinstance(value, dict):
            reject(name, "an object", value)
        unknown = [k for k in value if k not in known]
        if unknown:
            raise ApiError(
                f"{name} has the unknown key {describe(unknown[0])}. It may have "
                f"{', '.join(known)}.",
                param=f"{name}.{printable(unknown[0])[:60]}",
            )
        return Fields(value, f"{name}.")
