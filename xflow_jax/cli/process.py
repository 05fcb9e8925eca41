"""Exit status and standard streams of a program, shared by all commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO

from xflow_jax.errors import UserError, printable


def run_process(
    run: Callable[[], int | None], needs_output: bool = False, interrupted: str = "interrupted"
) -> int:
    """Runs a program, and turns its errors into one sentence on stderr.

    Args:
        run: the program.
        needs_output: refuse to start if standard output is closed.
        interrupted: message after an interrupt.

    Returns:
        The exit status: that of the program or 0, 1 if the reader of the output is gone, 2 for a
        mistake of the user, 75 if it can be started again (`multihost.RESTART_STATUS`), 130 if
        interrupted.
    """
    is_closed = sys.stdout is None
    open_streams()
    try:
        if is_closed and needs_output:
            raise UserError(
                "standard output is closed, so nothing can be printed. Redirect it to a file or to "
                "/dev/null."
            )
        status = run() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(interrupted, "", 130)
    except BrokenPipeError:  # the reader of the output, for example `head`, has closed the pipe
        _discard_output()
        return 1
    except MemoryError:
        return _fail("there is not enough memory")
    except OSError as error:  # of the disk, or of the output itself
        _discard_output()
        return _fail(_describe(error))
    except ValueError as error:
        if "embedded null byte" in str(error):
            return _fail("a name holds the character NUL, so no file can have it")
        _end_if_alone(error)
        raise
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"there is not enough memory on the device: {_first_line(error)}")
        _end_if_alone(error)
        raise


def _end_if_alone(error: Exception) -> None:
    """Ends this process if another process of the run is gone.

    The usual end would wait for the other process.
    """
    multihost = sys.modules.get("xflow_jax.parallel.multihost")
    sentence = None if multihost is None else multihost.lost_process(error)
    if multihost is not None and sentence is not None:
        _fail(sentence)
        os._exit(multihost.RESTART_STATUS)


def open_streams() -> None:
    """Makes the standard streams safe to print to.

    A closed one discards what is printed. A character that the encoding lacks is escaped, so that
    no answer is lost.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _null_stream(number))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_text(text: str) -> None:
    """Prints lines of text, with other control characters escaped.

    Answers of a model, prompts and names may hold characters that a terminal obeys.
    """
    print(printable(text, keep="\n\t"), flush=True)


def _null_stream(number: int) -> TextIO:
    """Opens a stream without effect, at the number of a closed one."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    return os.fdopen(number, "w", errors="backslashreplace")


def _discard_output() -> None:
    """Discards the rest of the output, also at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    if error.filename is None:
        return f"cannot read or write: {reason}"
    return f"{error.filename}: cannot be read or written: {reason}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def _fail(message: str, prefix: str = "error: ", status: int = 2) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed too
        print(prefix + printable(message), file=sys.stderr, flush=True)
    return status
