"""Rules and budgets as text: "flow:power=4", "my_rule.py:MyRule(tau=0.3)", "1/4"."""

from __future__ import annotations

import difflib
import re
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
from xflow_jax.decoding.rules.external import load_rule_class
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.mlfm import MLFM
from xflow_jax.decoding.rules.revision import DMax
from xflow_jax.errors import UserError, describe, require
from xflow_jax.toml_config import coerce, field_types, format_value

RULES: dict[str, type] = {
    "mask": MaskPrediction,
    "threshold": Threshold,
    "factor": Factor,
    "eb": EntropyBounded,
    "klass": Klass,
    "softmask": SoftMask,
    "edit": Editing,
    "dmax": DMax,
    "mlfm": MLFM,
    "flow": Flow,
}
_BUDGET = re.compile(r"[+-]?(\d{1,15}/\d{1,15}|\d{0,15}(\.\d{0,15})?(?<=[\d.])(e-?\d)?)", re.ASCII)
_RANGE = re.compile(r"(\w+)=([-+\d.eE]+?)\.\.([-+\d.eE]+)", re.ASCII)
# path/to/file.py:Class or package.module:Class, with options in parentheses if there are any.
_EXTERNAL = re.compile(r"([^:()]+\.py|[\w.]+):([A-Za-z_]\w*)(?:\((.*)\))?")


def parse_rule(text: str, defaults: Iterable[tuple[str, object]] = ()) -> tuple[str, Rule]:
    """Parses a rule such as "flow", "threshold:tau=0.7" or "my_rule.py:MyRule(tau=0.3)".

    Args:
        text: a built-in name with options after a colon, or a class in a Python file or module
            with options in parentheses. A flow's policy is the path of its file, or "tiny". It
            brings the options that it was trained under.
        defaults: options for rules that have them. Options in the text come first.

    Returns:
        The text without spaces between its options, as a label, and the rule.

    Raises:
        UserError: for an unknown rule or option, with the nearest name, and for a wrong value.
    """
    if match := _EXTERNAL.fullmatch(text.strip()):
        source, class_name, rest = match.groups()
        source, rest = source.strip(), "".join((rest or "").split())
    if match and source not in RULES:
        cls, name, colon = load_rule_class(source, class_name), f"{source}:{class_name}", rest
        text = f"{name}({rest})" if rest else name
    else:
        text = "".join(text.split())
        name, colon, rest = text.partition(":")
        if name not in RULES and (name.endswith(".py") or "(" in text):
            raise UserError(
                f"the rule {text} must look like FILE.py:Class or FILE.py:Class(option=value)"
            )
        if name not in RULES:
            raise UserError(f"there is no rule {name!r}{_suggest(name, RULES)}")
        cls = RULES[name]
    known = field_types(cls)
    given = _options(name, rest, known) if colon else {}
    if (file := given.pop("policy", "none")) != "none":
        policy, switches = read_policy(file)
        given = (_options(name, switches, known) if switches else {}) | given | {"policy": policy}
    given = {option: value for option, value in defaults if option in known} | given
    try:
        return text, cls(**given)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"the rule {text}: {error}") from None


def parse_rule_ranges(text: str) -> tuple[Rule, Rule, tuple[str, ...]]:
    """Parses a rule whose numbers may be ranges: "threshold:tau=0.5..0.9".

    Args:
        text: as for `parse_rule`, with LOW..HIGH in the place of numbers.

    Returns:
        The rule with the lower ends, the rule with the upper ends, and the options with a range.

    Raises:
        UserError: as `parse_rule`, for either end, and for an option that is no decimal number.
    """
    lower = parse_rule(_RANGE.sub(r"\1=\2", text))[1]
    upper = parse_rule(_RANGE.sub(r"\1=\3", text))[1]
    names = []
    for match in _RANGE.finditer(text):
        name = match.group(1)
        low, high = getattr(lower, name), getattr(upper, name)
        require(
            isinstance(low, float) and isinstance(high, float) and low <= high,
            f"the rule {text}: {match.group()} must be LOW..HIGH of a decimal number, with the "
            "smaller one first",
        )
        names.append(name)
    return lower, upper, tuple(names)


def _options(name: str, text: str, known: dict[str, object]) -> dict[str, Any]:
    """Parses "option=value,option=value". A policy stays the name of its file."""
    given: dict[str, Any] = {}
    for part in text.split(","):
        option, equals, value = part.partition("=")
        if not equals:
            form = f"{name}(option=value)" if ":" in name else f"{name}:option=value"
            raise UserError(
                f"the rule {name}:{text} must look like {form}, with commas between options"
            )
        if option not in known:
            raise UserError(f"the rule {name} has no option {option!r}{_suggest(option, known)}")
        given[option] = value if option == "policy" else _value(name, option, value, known[option])
    return given


def parse_rules(text: str, defaults: Sequence[tuple[str, object]] = ()) -> dict[str, Rule]:
    """Parses rules with commas between them: "mask,flow:power=4,commit=false,threshold".

    Arguments and errors are those of `parse_rule`.

    Returns:
        Label -> rule, in order.
    """
    texts: list[str] = []
    for part in re.split(r",(?![^(]*\))", text):  # commas in parentheses do not count
        head = part.partition(":")[0]
        # A part such as "commit=false" is another option of the rule before it.
        if "=" in head and texts:
            texts[-1] += "," + part
        else:
            texts.append(part)
    return dict(parse_rule(rule, defaults) for rule in texts)


def parse_budget(text: str) -> Fraction:
    """Parses a budget such as "1/4" or "0.25".

    A budget is a share of the full number of steps.

    Raises:
        UserError: for a text that is no number in (0, 1].
    """
    text = text.strip()
    try:
        # The form is checked because a short text such as 1e999999999 may be an endless number.
        budget = Fraction(text) if _BUDGET.fullmatch(text) else None
    except (ValueError, ZeroDivisionError):
        budget = None
    if budget is None:
        raise UserError(f"the budget {describe(text)} is no number: write it like 1/4 or 0.25")
    if not 0 < budget <= 1:
        raise UserError(f"the budget {text} must be above 0 and at most 1")
    return budget


def parse_budgets(text: str) -> list[Fraction]:
    """Parses budgets with commas between them, and drops repetitions."""
    return list(dict.fromkeys(parse_budget(part) for part in text.split(",")))


def _suggest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message: the nearest known name, or all."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f". There are {', '.join(known)}."


def _value(rule: str, option: str, text: str, hint: object) -> Any:
    """Converts an option's text to the type in the rule."""
    value: Any = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(value, str):
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except (ValueError, OverflowError):
                continue
    try:
        return coerce(value, hint)
    except TypeError as right:
        raise UserError(
            f"the rule {rule}: {option} is {format_value(value)}, but it must be {right}"
        ) from None
