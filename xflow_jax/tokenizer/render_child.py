"""Script that renders chat templates, run by chat_template.py.

A template is code of another person. Jinja keeps it from files and from Python, but it may loop for
ever or fill the memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers requests from stdin until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _limit_memory(request["most_bytes"])
        # The system ends this process, also inside of a long operation on a number.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _render(render_jinja_template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit_memory(most: int) -> None:
    """Limits the memory to `most` bytes more than before the first request."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, ValueError):  # other systems than Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + most
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _render(render: Any, request: dict[str, Any]) -> dict[str, str]:
    try:
        texts, _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            **request["options"],
        )
        if len(texts[0]) <= request["most_characters"]:
            return {"text": texts[0]}
        return {"error": f"makes more than {request['most_characters']} characters"}
    except MemoryError:
        return {"error": f"needs more than {request['most_bytes']} bytes of memory"}
    except Exception as error:  # the template may raise anything
        reason = str(error).strip().split("\n")[0][:500]
        return {"error": f"fails with {type(error).__name__}: {reason}"}


if __name__ == "__main__":
    main()
