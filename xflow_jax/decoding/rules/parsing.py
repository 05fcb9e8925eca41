"""What a command line says of decoding, read strictly: rules with options, budgets, and the steps that they come to."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from xflow_jax.decoding.policy_io import read_policy
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.baselines import (
    Editing,
    EntropyBounded,
    Factor,
    Klass,
    SoftMask,
    Threshold,
)
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.toml_config import coerce, format_value

RULES: dict[str, type] = {
    "mask": MaskPrediction,
    "threshold": Threshold,
    "factor": Factor,
    "eb": EntropyBounded,
    "klass": Klass,
    "softmask": SoftMask,
    "edit": Editing,
    "flow": Flow,
}


def rule_fields(cls: type) -> dict[str, Any]:
    """Option -> type of its value, for a class of rules."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "needs_keys"}


def parse_rule(text: str, defaults: Iterable[tuple[str, Any]] = ()) -> tuple[str, Rule]:
    """(label, rule) of "flow", "threshold:tau=0.7" or "mask:order=entropy,temperature=0.5".

    The label is the text without its spaces. defaults: options that are used where the rule has them and the text does
    not set them. A flow's policy is the path of its file, or tiny; the options that it was trained under hold unless
    the text sets them. Raises UserError, with the nearest name for an unknown one.
    """
    text = "".join(text.split())
    name, colon, rest = text.partition(":")
    if name not in RULES:
        raise UserError(f"there is no rule {name!r}; {_suggest(name, RULES)}")
    known = rule_fields(RULES[name])
    given = _options(name, rest, known) if colon else {}
    if (file := given.pop("policy", "none")) != "none":
        policy, switches = read_policy(file)
        given = (_options(name, switches, known) if switches else {}) | given | {"policy": policy}
    given = {option: value for option, value in defaults if option in known} | given
    try:
        return text, RULES[name](**given)
    except UserError as error:
        raise UserError(f"the rule {text}: {error}") from None


def _options(name: str, text: str, known: dict[str, Any]) -> dict[str, Any]:
    """The values in "option=value,option=value"; a policy's stays the name of its file."""
    given = {}
    for part in text.split(","):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(
                f"the rule {name}:{text} must look like {name}:option=value, with commas between options"
            )
        if option not in known:
            raise UserError(f"the rule {name} has no option {option!r}; {_suggest(option, known)}")
        given[option] = value if option == "policy" else _value(name, option, value, known[option])
    return given


def parse_rules(text: str, defaults: Sequence[tuple[str, Any]] = ()) -> dict[str, Rule]:
    """label -> rule, in order, of rules with commas between them: "mask,flow:power=4,commit=false,threshold"."""
    texts: list[str] = []
    for part in text.split(","):
        head = part.partition(":")[0]
        if "=" in head and texts:  # another option of the rule before it
            texts[-1] += "," + part
        else:
            texts.append(part)
    return dict(parse_rule(rule, defaults) for rule in texts)


def parse_budget(text: str) -> Fraction:
    """The budget that "1/4" or "0.25" says, the share of the full number of steps; UserError outside (0, 1]."""
    try:
        budget = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"the budget {text.strip()!r} is no number: write it like 1/4 or 0.25"
        ) from None
    if not 0 < budget <= 1:
        raise UserError(f"the budget {text.strip()} must be above 0 and at most 1")
    return budget


def parse_budgets(text: str) -> list[Fraction]:
    """Budgets with commas between them, each once."""
    return list(dict.fromkeys(parse_budget(part) for part in text.split(",")))


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _value(rule: str, option: str, text: str, hint: Any) -> Any:
    value: Any = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(value, str):
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                continue
    try:
        return coerce(value, hint)
    except TypeError as right:
        raise UserError(
            f"the rule {rule}: {option} is {format_value(value)}, but it must be {right}"
        ) from None
