"""Strict reading of what a user wrote: one kind of error, typed values, TOML into frozen dataclasses."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user, told in one sentence; the commands print it to stderr and exit with 2."""


def require(condition: bool, sentence: str) -> None:
    """Raises UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)
