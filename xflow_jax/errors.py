"""UserError, for mistakes of a user and errors of the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Mistake of a user, with a message of one or two sentences.

    Commands print the message to stderr and exit with status 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) if the condition is False."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def disk_errors(path: str | Path, note: str = "") -> Iterator[None]:
    """Converts errors of the disk into a UserError.

    Args:
        path: the destination, for the message.
        note: a text to add to the message, about the state of the work.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        if number in _DISK_FULL:
            reason = "the disk is full"
        else:
            reason = f"cannot be written: {os.strerror(number)}"
        raise UserError(f"{path}: {reason}{note}") from error


def _system_error(error: BaseException) -> int | None:
    """Returns the system's error number behind an exception, or None."""
    # tensorstore raises ValueErrors that carry the number in their text.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(match[1]) if match else getattr(error, "errno", None)
    if number is None and error.__cause__ is not None:
        return _system_error(error.__cause__)
    return number
