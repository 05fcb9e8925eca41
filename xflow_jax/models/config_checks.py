"""Checks of values that the configurations of several families share."""

from __future__ import annotations

from xflow_jax.errors import require
from xflow_jax.toml_config import format_value


def check_positive(config: object, *keys: str, reason: str = "") -> None:
    """Raises UserError for an attribute that is None or not positive.

    Args:
        config: the configuration.
        keys: names of its attributes.
        reason: the circumstance that requires them, for the message.
    """
    for key in keys:
        value = getattr(config, key)
        sentence = f"{key} is {format_value(value)}, but it must be positive"
        require(
            value is not None and value > 0, f"{sentence}, since {reason}" if reason else sentence
        )


def check_not_negative(config: object, *keys: str) -> None:
    """Raises UserError for an attribute below zero. None passes."""
    for key in keys:
        value = getattr(config, key)
        require((value or 0) >= 0, f"{key} is {value}, but it must not be negative")


def check_divides(key: str, value: int, other_key: str, other: int) -> None:
    """Raises UserError unless the first number is positive and divides the second.

    Args:
        key: name of the divisor.
        value: the divisor.
        other_key: name of the number to divide.
        other: the number to divide.
    """
    require(value > 0 and other % value == 0, f"{key} {value} does not divide {other_key} {other}")


def check_token_ids(config: object, rows: int) -> None:
    """Raises UserError for a special token outside the vocabulary's rows."""
    for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        require(
            value is None or 0 <= value < rows,
            f"{key} is {value}, but the ids go from 0 to {rows - 1}",
        )
    mask, eos = (getattr(config, key) for key in ("mask_token_id", "eos_token_id"))
    require(mask is None or mask != eos, f"mask_token_id and eos_token_id are both {mask}")
