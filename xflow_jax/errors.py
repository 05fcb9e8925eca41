"""The one exception type for mistakes of a user."""

from __future__ import annotations


class UserError(Exception):
    """Mistake of a user, with a message of one or two sentences.

    Commands print the message to stderr and exit with status 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) if the condition is False."""
    if not condition:
        raise UserError(message)
