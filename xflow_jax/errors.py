"""UserError, for mistakes of a user and errors of the disk."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import re
from collections.abc import Iterator
from typing import SupportsIndex, cast

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_SEED = 2**32 - 1  # JAX drops further bits of a seed without 64-bit types
# Packages whose errors are those of object storage or of the network to it.
_STORAGE = ("gcsfs", "google", "s3fs", "botocore", "aiobotocore", "aiohttp")
_LONGEST = 1200  # characters of a message
_HEAD, _TAIL = 800, 300
# Control characters, which a terminal obeys, marks that reorder text, and halves of surrogates.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(Exception):
    """Mistake of a user, with a message of one or two sentences.

    Commands print the message to stderr and exit with status 2. Control characters in it are
    escaped, because names and values in a message may come from a file of another person.
    """

    def __init__(self, message: str) -> None:
        """Escapes and shortens the message."""
        message = printable(message)
        if len(message) > _LONGEST:
            message = f"{message[:_HEAD]} ... {message[-_TAIL:]}"
        super().__init__(message)


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) if the condition is False."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def disk_errors(
    path: str | os.PathLike[str], note: str = "", reading: bool = False
) -> Iterator[None]:
    """Converts errors of the disk, or of object storage, into a UserError.

    Args:
        path: the place, for the message.
        note: a text to add to the message, about the state of the work.
        reading: True if the place is read, not written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "://" in os.fspath(path) and (reason := _storage_error(error)):
            verb = "read" if reading else "written"
            raise UserError(f"{path}: cannot be {verb}: {reason}{note}") from error
        number = _system_error(error)
        if number is None or reading:
            raise
        if number in _DISK_FULL:
            reason = "the disk is full"
        else:
            reason = f"cannot be written: {os.strerror(number)}"
        raise UserError(f"{path}: {reason}{note}") from error


def _storage_error(error: BaseException) -> str | None:
    """Returns the reason of an error of object storage, or None."""
    if isinstance(error, FileNotFoundError):
        return "there is no such object"
    origin = type(error).__module__.partition(".")[0]
    if origin not in _STORAGE and not isinstance(error, OSError):
        # tensorstore raises ValueErrors with the status of the request.
        return "the storage refuses" if re.search(r"HTTP response code: \d+", str(error)) else None
    return printable(str(error).strip().split("\n")[0][:200]) or type(error).__name__


def _system_error(error: BaseException) -> int | None:
    """Returns the system's error number behind an exception, or None."""
    # tensorstore raises ValueErrors that carry the number in their text.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(match[1]) if match else getattr(error, "errno", None)
    if number is None and error.__cause__ is not None:
        return _system_error(error.__cause__)
    return number


def printable(text: str, keep: str = "") -> str:
    """Escapes control characters as Python does in a string.

    Args:
        text: any text.
        keep: characters that stay, such as line breaks.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else repr(character)[1:-1]

    return _UNPRINTABLE.sub(escape, text)


def check_seed(seed: object, name: str = "seed") -> int:
    """Checks the seed of random numbers.

    Args:
        seed: the seed.
        name: its name, for the message.

    Returns:
        The seed as an int.

    Raises:
        UserError: unless it is a whole number from 0 to MOST_SEED.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(cast(SupportsIndex, seed))
    except TypeError:
        number = -1
    if not 0 <= number <= MOST_SEED:
        raise UserError(
            f"{name} must be a whole number from 0 to {MOST_SEED}, not {describe(seed)}"
        )
    return number


def describe(value: object, longest: int = 60) -> str:
    """Returns the start of a value's repr, for a message."""
    try:
        text = repr(value)
    except Exception:  # a repr may fail in any way, and an integer of many digits does
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."
