"""A stub of the server's HTTP protocol, which sends belief frames of a made-up decode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

END = ("<|endoftext|>", 98)
TEXT = (
    "Bees dance to tell their nestmates where the nectar is.\n"
    "A waggle points at the sun, and its length gives the distance."
)
WORDS = re.findall(r" ?\w+|\W", TEXT)
GUESSES = ["Ants", " say", " that", " far", " flower", "?"]
CANVAS = 32


def frames(passes: int, top: int) -> Iterator[dict[str, Any]]:
    """Yields the frames of a decode that settles from the left, with two re-edits."""
    before: dict[int, tuple[int, str, int]] = {}
    for step in range(1, passes + 1):
        frame: dict[str, Any] = {"step": step, "block": 0, "key": step == 1}
        names = ("at", "id", "text", "t", "c", "edited", *(["top"] if top else []))
        frame |= {name: [] for name in names}
        for i in range(CANVAS):
            word, token = (WORDS[i], i) if i < len(WORDS) else END
            pace = (step + 1) / passes - 0.5 * i / CANVAS
            t = max(0, min(255, int(255 * pace)))
            edited = int(i in (3, 9) and step == passes // 2)
            if pace < 0.45:
                token, word = 50 + (i + step) % 6, GUESSES[(i + step) % 6]
            if step == passes:
                t = 255
            elif edited:
                t = 120
            if i == 9 and step == passes // 2:
                token, word = 50, GUESSES[0]
            if step > 1 and before.get(i) == (token, word, t) and not edited:
                continue
            before[i] = (token, word, t)
            values = [i, token, word, t, min(255, t + 20), edited]
            likely = [[token, word, min(255, t + 20)], [50, "Ants", 20], [51, " say", 5]][:top]
            for name, value in zip(names, [*values, likely], strict=False):
                frame[name].append(value)
        yield frame


class Recorded:
    """Requests that the stub has received, and the gap between its frames."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gone = 0
        self.gap = 0.03
        self.key: str | None = None
        self.examples: list[str] = []


def make_app(page: str, seen: Recorded) -> Any:
    """Builds the Starlette application."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    def refused(request: Request) -> Response | None:
        if seen.key is None or request.headers.get("authorization") == f"Bearer {seen.key}":
            return None
        return JSONResponse({"error": {"message": "a key is needed"}}, 401)

    async def models(request: Request) -> Response:
        about = {"rules": ["flow:reedit=always", "threshold:tau=0.9"], "gen_lengths": [32, 64]}
        about["examples"] = seen.examples
        return refused(request) or JSONResponse({"data": [{"id": "stub-1", "xflow": about}]})

    async def chat(request: Request) -> Response:
        body = await request.json()
        seen.bodies.append(body)
        seen.headers.append(dict(request.headers))
        if body["max_tokens"] > 64:
            return JSONResponse({"error": {"message": "max_tokens is 65, at most 64"}}, 400)
        return StreamingResponse(events(body["xflow"]), media_type="text/event-stream")

    async def events(options: dict[str, Any]) -> AsyncIterator[str]:
        passes = 12 if options["rule"].startswith("flow") else 24
        about = {"canvas": CANVAS, "block_length": 32, "steps": passes, "rule": options["rule"]}
        try:
            yield ": ping\n\n" + chunk({"role": "assistant", "content": ""}, about)
            for frame in frames(passes, options["belief"]["top"]):
                yield chunk({}, frame)
                await asyncio.sleep(seen.gap)
            for part in (TEXT[:30], TEXT[30:]):
                yield chunk({"content": part}, None)
            times = {"queue_ms": 2, "first_settled_ms": 300, "decode_ms": 400}
            yield chunk({}, {"forward_passes": passes, "canvas": CANVAS, **times}, "stop")
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            seen.gone += 1
            raise

    async def home(_: Request) -> Response:
        return HTMLResponse(page)

    return Starlette(
        routes=[
            Route("/", home),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


def chunk(delta: dict[str, str], xflow: object, finish: str | None = None) -> str:
    """Formats one chunk of a stream."""
    data = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(data if xflow is None else data | {'xflow': xflow})}\n\n"


@contextlib.contextmanager
def serve(page: str, seen: Recorded) -> Iterator[str]:
    """Serves the page in a thread, and yields its address."""
    import uvicorn

    config = uvicorn.Config(make_app(page, seen), port=0, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(20)
