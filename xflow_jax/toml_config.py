"""Strict readers of TOML, overrides and config.json into dataclasses.

Unknown keys and values of a wrong type raise UserError.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from xflow_jax.errors import UserError, check_seed, describe, require
from xflow_jax.input_files import parse_toml, read_toml, to_path


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class _JsonConfig(_Dataclass, Protocol):
    """A dataclass of a config.json, with the original in `hf`."""

    @property
    def hf(self) -> str: ...
    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self: ...


T = TypeVar("T", bound=_Dataclass)


def format_value(value: object) -> str:
    """Formats a value for an error message, as JSON if possible."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # not of JSON, or of too many digits or levels
        return describe(value)


def coerce(value: object, hint: object) -> Any:
    """Converts a parsed value to the type of an annotation.

    An int becomes a float, a list a tuple, and a string a Path.

    Args:
        value: a value of TOML or JSON.
        hint: bool, int, float, str, Path, None, a tuple, a Literal, or a union of these.

    Returns:
        The converted value.

    Raises:
        TypeError: if the value does not fit. Its text describes the right type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for member in args:
            try:
                return coerce(value, member)
            except TypeError:
                continue
        raise TypeError(" or ".join(_describe(member) for member in args))
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise TypeError("one of " + ", ".join(format_value(choice) for choice in args))
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[1:] == (...,):
            return tuple(coerce(item, args[0]) for item in value)
        if len(args) == len(value):
            return tuple(coerce(item, member) for item, member in zip(value, args, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # neither NaN nor an integer of 400 digits
            raise TypeError("a finite number")
        return float(value)
    elif hint is Path and isinstance(value, str):
        return to_path(value)
    elif origin is None and isinstance(hint, type) and isinstance(value, hint):
        if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise TypeError("an integer of at most 64 bits")
        if hint is not int or not isinstance(value, bool):
            return value
    elif hint is None and value is None:
        return None
    raise TypeError(_describe(hint))


def _describe(hint: object) -> str:
    """Describes the type of an annotation in words."""
    if hint in (None, type(None)):
        return "null"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    words: dict[object, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        Path: "a path",
    }
    return words.get(hint, str(hint))


def read_keys(
    cls: type[T],
    hf: object,
    where: str,
    required: Sequence[str],
    fixed: Mapping[str, tuple[Any, ...]],
) -> T:
    """Reads a model's configuration from the dict of a config.json.

    Args:
        cls: dataclass of the configuration. Its field `hf` receives the dict as JSON.
        hf: the dict. Keys that are not fields are kept in `hf` only.
        where: the file, for error messages.
        required: keys that must be there.
        fixed: key -> values that are implemented, for keys that are not fields. An absent key
            counts as the first value.

    Returns:
        The configuration.

    Raises:
        UserError: if a key is missing, or a value is of a wrong type or not implemented.
    """
    if not isinstance(hf, dict):
        raise UserError(f"{where}: a configuration is a JSON object, not {format_value(hf)[:40]}")
    # First, since a key of another model explains why others are missing.
    for key, choices in fixed.items():
        value = hf.get(key, choices[0])
        if not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in choices
        ):
            right = " or ".join(format_value(choice) for choice in choices)
            raise UserError(
                f"{where}: {key} is {format_value(value)}, which is not implemented. "
                f"It must be {right}."
            )
    for key in required:
        if hf.get(key) is None:
            raise UserError(f"{where}: the key {key} is missing")
    fields = {}
    hints = field_types(cls)
    for name in _key_fields(cls):
        if name not in hf:
            continue
        try:
            fields[name] = coerce(hf[name], hints[name])
        except TypeError as right:
            raise UserError(
                f"{where}: {name} is {format_value(hf[name])}, but it must be {right}"
            ) from None
    fields["hf"] = json.dumps(hf)
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@functools.cache
def field_types(cls: type) -> dict[str, object]:
    """Returns name -> type of the fields that build a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _key_fields(cls: type[_Dataclass]) -> list[str]:
    """Lists the fields that are keys of a config.json."""
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("key", True)]


def write_keys(config: _JsonConfig, template: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dict of a config.json for a configuration.

    Args:
        config: the configuration.
        template: the keys that are not fields, for a configuration that was not read from a file.

    Returns:
        The dict that was read, updated with the fields that have changed since. Without one, the
        template and all fields.
    """
    fields = {name: getattr(config, name) for name in _key_fields(type(config))}
    if not config.hf:
        return {**template, **fields}
    original = json.loads(config.hf)
    before = type(config).from_hf(original)
    return original | {
        name: value for name, value in fields.items() if value != getattr(before, name)
    }


def load_toml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Reads a TOML file into a frozen dataclass, which may be nested.

    Args:
        path: the file.
        cls: the dataclass. Fields may be bool, int, float, str, Path, tuples, Literals, unions of
            these, and dataclasses.
        overrides: texts like "a.b=value". "a.b=none" sets None.

    Returns:
        The configuration.

    Raises:
        UserError: for an unknown key (with the nearest known one), a value of a wrong type, a
            missing key, and whatever `cls` itself rejects.
    """
    return with_overrides(cls, read_toml(path), overrides, str(path))


def with_overrides(
    cls: type[T], tree: dict[str, Any], overrides: Sequence[str], where: str = "settings"
) -> T:
    """Builds a dataclass from a dict and overrides, like `load_toml`.

    Args:
        cls: the dataclass.
        tree: values by key. Overrides are written into it.
        overrides: texts like "a.b=value".
        where: the source of the dict, for error messages.

    Returns:
        The configuration.

    Raises:
        UserError: as `load_toml`.
    """
    sources: dict[str, str] = {}
    for text in overrides:
        _override(tree, cls, text, sources)
    return _build(cls, tree, "", where, sources)


def _override(
    tree: dict[str, Any], cls: type[_Dataclass], text: str, sources: dict[str, str]
) -> None:
    """Writes "a.b=value" into the tree and records its source."""
    dotted, equals, value = text.partition("=")
    *parents, last = dotted.strip().split(".")
    where = f"override {text!r}"
    require(bool(equals and last), f"{where}: it must look like key=value")
    for parent in parents:
        hint = _field_hint(cls, parent, dotted, where)
        nested = _as_dataclass(hint)
        if nested is None:
            raise UserError(f"{where}: {parent} is a value and has no parts")
        cls, tree = nested, tree.setdefault(parent, {})
        require(isinstance(tree, dict), f"{where}: {parent} is not a table in the file")
    hint = _field_hint(cls, last, dotted, where)
    tree[last] = _override_value(value.strip(), hint)
    sources[dotted.strip()] = where


def _as_dataclass(hint: object) -> type[_Dataclass] | None:
    """Returns the annotation if it is a dataclass."""
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _override_value(value: str, hint: object) -> Any:
    """Parses the value of an override.

    Quotes are awkward on a command line. So a text that is not a TOML value stays a string, and so
    does any text if the field is a string.
    """
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = typing.get_args(hint) if is_union else (hint,)
    if value == "none" and type(None) in members:
        return None
    try:
        table = parse_toml(f"value = {value}", "")
    except UserError:
        return value
    if list(table) != ["value"]:  # the text has a line break and more keys behind it
        return value
    parsed = table["value"]
    try:
        coerce(parsed, hint)
    except TypeError:
        return value if str in members or Path in members else parsed
    return parsed


def _field_hint(cls: type[_Dataclass], name: str, dotted: str, where: str) -> object:
    """Returns the type of a field. Raises UserError without one."""
    hints = field_types(cls)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
        prefix = dotted.strip()[: -len(name)] if dotted.strip().endswith(name) else ""
        known = f"Known keys are {', '.join(hints)}."
        hint = f"Did you mean {prefix}{near[0]}?" if near else known
        raise UserError(f"{where}: there is no key {dotted}. {hint}")
    return hints[name]


def _build(
    cls: type[T], tree: dict[str, Any], prefix: str, path: str, sources: dict[str, str]
) -> T:
    """Builds a dataclass and its nested ones from a tree of values."""
    values = {}
    for key, value in tree.items():
        dotted = prefix + key
        where = sources.get(dotted, path)
        hint = _field_hint(cls, key, dotted, where)
        nested = _as_dataclass(hint)
        if nested is not None:
            require(
                isinstance(value, dict),
                f"{where}: {dotted} is {format_value(value)}, but it must be a table",
            )
            values[key] = _build(nested, value, dotted + ".", path, sources)
            continue
        try:
            values[key] = coerce(value, hint)
            if key == "seed":  # of JAX, in every configuration
                check_seed(values[key], f"{where}: {dotted}")
        except TypeError as right:
            raise UserError(
                f"{where}: {dotted} is {format_value(value)}, but it must be {right}"
            ) from None
    for f in dataclasses.fields(cls):
        given = f.name in values or not f.init or f.default is not dataclasses.MISSING
        missing = not given and f.default_factory is dataclasses.MISSING
        require(not missing, f"{path}: the key {prefix + f.name} is missing")
    try:
        return cls(**values)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
