"""Rendering of chat templates in a process with limits."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from xflow_jax.errors import UserError

SECONDS = 1.0  # processor time of a template, which usually takes a thousandth
MOST_CHARACTERS = 2**22
MOST_MEMORY = 2**30  # bytes

_SCRIPT = Path(__file__).with_name("render_child.py")
_START_SECONDS, _ANSWER_SECONDS = 120, 60  # on a machine that is busy
_UNKNOWN = "stopped without an answer"


def render_chat(
    template: str, messages: Sequence[Mapping[str, object]], options: Mapping[str, object]
) -> str:
    """Renders a chat template.

    Args:
        template: the template, in Jinja.
        messages: chat messages {"role": ..., "content": ...}.
        options: further variables of the template, of JSON types, and arguments of transformers
            such as add_generation_prompt.

    Returns:
        The text.

    Raises:
        UserError: if the template is wrong or raises an exception, or if it exceeds its limits.
    """
    request = {
        "template": template,
        "messages": messages,
        "options": options,
        "seconds": SECONDS,
        "most_characters": MOST_CHARACTERS,
        "most_bytes": MOST_MEMORY,
    }
    try:
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError):
        raise UserError("chat messages must hold texts alone") from None
    answer = _RENDERER.ask(line)
    if "error" in answer:
        raise UserError(f"the chat template of the model's tokenizer {answer['error']}")
    text = answer["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("a prompt is not valid text: it holds half of a surrogate pair") from None
    return text


class _Renderer:
    """The process that renders templates, started for the first one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, str]:
        """Sends a line of JSON and returns the answer."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # after a fork
                self._process, self._owner = self._start(), os.getpid()
            process = self._process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            reply = _read_line(process, _ANSWER_SECONDS)
            if reply:
                return json.loads(reply)
            self._process = None
            status = _end(process)
        took_long = status in (-signal.SIGPROF, -signal.SIGKILL)
        return {"error": f"takes more than {SECONDS:g} seconds" if took_long else _UNKNOWN}

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a terminal's interrupt is for this process alone
        )
        if not _read_line(process, _START_SECONDS):
            _end(process)
            raise UserError(f"the process that renders chat templates cannot start: {_SCRIPT}")
        return process

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._owner == os.getpid():
            _end(self._process)
        self._process = None


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Reads a line, or b"" at the end or after the time."""
    assert process.stdout is not None
    descriptor, parts = process.stdout.fileno(), [b""]
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not parts[-1].endswith(b"\n"):
            part = os.read(descriptor, 2**16) if selector.select(seconds) else b""
            if not part:
                return b""
            parts.append(part)
    return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ends a process and returns its status."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.1)  # its own status, if it has ended
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    return process.wait()


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
