"""Strict reading of what a user wrote: one kind of error, typed values, TOML into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from xflow_jax.errors import UserError, require

T = TypeVar("T")


def format_value(value: Any) -> str:
    """A value as its file has it: JSON where it is JSON."""
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it (int to float, list to tuple); TypeError says what would be right."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for arm in args:
            try:
                return coerce(value, arm)
            except TypeError:
                continue
        raise TypeError(" or ".join(_name(arm) for arm in args))
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise TypeError("one of " + ", ".join(format_value(choice) for choice in args))
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[1:] == (...,):
            return tuple(coerce(item, args[0]) for item in value)
        if len(args) == len(value):
            return tuple(coerce(item, arm) for item, arm in zip(value, args, strict=True))
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif origin is None and hint is not None and isinstance(value, hint):
        if hint is not int or not isinstance(value, bool):
            return value
    elif hint is None and value is None:
        return None
    raise TypeError(_name(hint))


def _name(hint: Any) -> str:
    if hint in (None, type(None)):
        return "null"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"a list of {_name(args[0])}"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        Path: "a path",
    }
    return words.get(hint, str(hint))


def read_keys(
    cls: type[T], hf: dict[str, Any], where: str, required: Sequence[str], fixed: dict[str, tuple]
) -> T:
    """A model's configuration from the dict of a config.json: fields are read, `fixed` keys only checked."""
    if not isinstance(hf, dict):
        raise UserError(f"{where}: a configuration is a JSON object, not {format_value(hf)[:40]}")
    for key in required:
        if hf.get(key) is None:
            raise UserError(f"{where}: the key {key} is missing")
    for key, choices in fixed.items():
        value = hf.get(key, choices[0])
        if not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in choices
        ):
            right = " or ".join(format_value(choice) for choice in choices)
            raise UserError(
                f"{where}: {key} is {format_value(value)}, which is not implemented; it must be {right}"
            )
    fields = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name == "hf" or name not in hf:
            continue
        try:
            fields[name] = coerce(hf[name], hint)
        except TypeError as right:
            raise UserError(
                f"{where}: {name} is {format_value(hf[name])}, but it must be {right}"
            ) from None
    try:
        return cls(**fields, hf=json.dumps(hf))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_keys(config: Any, template: dict[str, Any]) -> dict[str, Any]:
    """The dict of a config.json: the one that was read, with what has changed since; a new one from `template`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "hf"}
    if not config.hf:
        return template | fields
    original = json.loads(config.hf)
    before = type(config).from_hf(original)
    return original | {
        name: value for name, value in fields.items() if value != getattr(before, name)
    }


def load_toml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Reads a TOML file into the (nested) frozen dataclass `cls`; overrides are "a.b=value", and "a.b=none" for None.

    Fields may be bool, int, float, str, Path, tuples, Literals, unions of these, and dataclasses. Raises UserError for
    an unknown key (with the nearest name), a value of a wrong type, a missing one, and what `cls` itself refuses.
    """
    try:
        tree = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    sources: dict[str, str] = {}
    for text in overrides:
        _override(tree, cls, text, sources)
    return _build(cls, tree, "", str(path), sources)


def with_overrides(
    cls: type[T], tree: dict[str, Any], overrides: Sequence[str], where: str = "settings"
) -> T:
    """As `load_toml`, from a dict instead of a file."""
    sources: dict[str, str] = {}
    for text in overrides:
        _override(tree, cls, text, sources)
    return _build(cls, tree, "", where, sources)


def _override(tree: dict[str, Any], cls: type, text: str, sources: dict[str, str]) -> None:
    """Puts "a.b=value" into the tree, and notes that the value of a.b came from there."""
    dotted, equals, value = text.partition("=")
    *parents, last = dotted.strip().split(".")
    require(bool(equals and last), f"override {text!r}: it must look like key=value")
    for parent in parents:
        hint = _field_hint(cls, parent, dotted, f"override {text!r}")
        require(
            dataclasses.is_dataclass(hint),
            f"override {text!r}: {parent} is a value and has no parts",
        )
        cls, tree = hint, tree.setdefault(parent, {})
        require(isinstance(tree, dict), f"override {text!r}: {parent} is not a table in the file")
    hint = _field_hint(cls, last, dotted, f"override {text!r}")
    tree[last] = _override_value(value.strip(), hint)
    sources[dotted.strip()] = f"override {text!r}"


def _override_value(value: str, hint: Any) -> Any:
    """A command line has no quotes to spare: what is no TOML value, or is wanted as a string, is a string."""
    arms = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )
    if value == "none" and type(None) in arms:
        return None
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return value
    try:
        coerce(parsed, hint)
    except TypeError:
        return value if str in arms or Path in arms else parsed
    return parsed


def _field_hint(cls: type, name: str, dotted: str, where: str) -> Any:
    """The type of a dataclass's field; UserError with the nearest name where there is no such field."""
    hints = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls) if f.init}
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
        prefix = dotted.strip()[: -len(name)] if dotted.strip().endswith(name) else ""
        help_ = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(hints)}"
        raise UserError(f"{where}: there is no key {dotted}; {help_}")
    return hints[name]


def _build(
    cls: type[T], tree: dict[str, Any], prefix: str, path: str, sources: dict[str, str]
) -> T:
    values = {}
    for key, value in tree.items():
        dotted = prefix + key
        where = sources.get(dotted, path)
        hint = _field_hint(cls, key, dotted, where)
        if dataclasses.is_dataclass(hint):
            require(
                isinstance(value, dict),
                f"{where}: {dotted} is {format_value(value)}, but it must be a table",
            )
            values[key] = _build(hint, value, dotted + ".", path, sources)
            continue
        try:
            values[key] = coerce(value, hint)
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
