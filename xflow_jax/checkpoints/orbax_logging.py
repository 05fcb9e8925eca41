"""Silences Orbax, which logs tracebacks of errors that it also raises."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

JOIN_SECONDS = 10.0  # for each thread of a failed save
# Texts in errors that are raised as well: folders of packages, and words of tensorstore.
MARKS = ("/orbax/", "/tensorstore/", "tensorstore_spec=", " OCDBT database ")


class _WithoutOrbax(logging.Filter):
    """Drops records of asyncio about tasks and futures of Orbax and tensorstore."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for a record about Orbax."""
        texts, error = [record.getMessage()], record.exc_info[1] if record.exc_info else None
        if error is not None:
            frames = traceback.walk_tb(error.__traceback__)
            texts += [str(error), *(frame.f_code.co_filename for frame, _ in frames)]
        return not any(mark in text for mark in MARKS for text in texts)


class _LateErrors:
    """Hook of unraisable errors that drops those of closed event loops.

    Threads of tensorstore raise them, in no object, if a write ends after the save has failed.

    Args:
        hook: the hook for all other errors.
    """

    def __init__(self, hook: Callable[[sys.UnraisableHookArgs], object]):
        self._hook = hook

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Passes an error on unless it is one of these."""
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


_without_orbax = _WithoutOrbax()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax in the block, and its late tasks after it."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    # Whoever keeps an object of Orbax also keeps its tasks, so the filter stays.
    logging.getLogger("asyncio").addFilter(_without_orbax)
    try:
        yield
    except BaseException as error:
        # Other pending reads and writes find their event loop closed, with a delay.
        time.sleep(0.2)
        release_tasks(error)
        raise
    finally:
        _join_orbax_threads()
        logger.setLevel(level)
        # Threads of tensorstore may end later still.
        sys.unraisablehook = hook if isinstance(hook, _LateErrors) else _LateErrors(hook)


def release_tasks(error: BaseException) -> None:
    """Deletes the tasks in the frames of an error of Orbax.

    A task that nobody awaited reports its own error when it is deleted. Inside `quiet_orbax` that
    is silent. Without this function, the traceback of the error would keep it longer.
    """
    cause: BaseException | None = error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that never began
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        gc.collect()


def _join_orbax_threads() -> None:
    """Waits for threads of a failed save, which log its error."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, JOIN_SECONDS)
