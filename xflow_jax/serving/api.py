"""HTTP of the server: endpoints, checks, streams and errors, on Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.metadata
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import anyio.to_thread
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from xflow_jax.errors import UserError, describe
from xflow_jax.serving.answers import Choice, Envelope, stream_chunks
from xflow_jax.serving.engine import Engine
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.json_fields import MOST_BYTES, Json, read_json
from xflow_jax.serving.protocol import Generation, parse_generation
from xflow_jax.serving.requests import make_tickets, prompt_ids
from xflow_jax.serving.stream import BeliefFrames, TextStream, TokenTexts
from xflow_jax.serving.ticket import Ticket
from xflow_jax.tasks import find_tasks
from xflow_jax.tokenizer import chat_ids, check_messages

_LOG = logging.getLogger(__name__)

BODY_SECONDS = 30.0  # for a request's body to arrive
PING_SECONDS, SEND_SECONDS = 15, 30.0
POLL_SECONDS = 0.2  # between two looks whether a waiting client is gone

Handler = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class ApiOptions:
    """Options of the HTTP side.

    Attributes:
        model_name: name of the model in answers.
        api_key: key that clients must send, or None.
        allow_origin: origins of other pages that may call the API.
        page: the page at /, or None.
    """

    model_name: str
    api_key: str | None = None
    allow_origin: tuple[str, ...] = ()
    page: str | None = None


def make_app(engine: Engine, options: ApiOptions) -> Starlette:
    """Makes the application.

    Args:
        engine: the engine. It need not be started.
        options: options of the HTTP side.
    """
    return _Api(engine, options).app()


class _Events(EventSourceResponse):
    """A stream that ends quietly if its client does not read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            _LOG.warning("a client did not read its stream for %g s", SEND_SECONDS)


class _Api:
    """Endpoints over one engine."""

    def __init__(self, engine: Engine, options: ApiOptions) -> None:
        self._engine, self._options = engine, options
        assert engine.lm.tokenizer is not None
        self._tokenizer = engine.lm.tokenizer
        self._texts = TokenTexts(engine.lm)
        self._created = int(time.time())
        self._open: dict[str, list[Choice]] = {}  # answers under way, by id

    def app(self) -> Starlette:
        """Returns the application with all routes."""
        routes = [
            ("/", "GET", self._page, False),
            ("/health", "GET", self._health, False),
            ("/ready", "GET", self._ready, False),
            ("/metrics", "GET", self._metrics, False),
            ("/version", "GET", self._version, False),
            ("/v1/models", "GET", self._models, True),
            ("/v1/models/{id:path}", "GET", self._model, True),
            ("/v1/chat/completions", "POST", self._chat, True),
            ("/v1/completions", "POST", self._complete, True),
            ("/tokenize", "POST", self._tokenize, True),
            ("/detokenize", "POST", self._detokenize, True),
            ("/v1/requests/{id}", "DELETE", self._cancel, True),
        ]
        origins = list(self._options.allow_origin)
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
        return Starlette(
            routes=[
                Route(path, self._guard(handler, needs_key), methods=[method])
                for path, method, handler, needs_key in routes
            ],
            middleware=[cors] if origins else [],
            exception_handlers={HTTPException: self._http_error, Exception: self._server_error},
        )

    # --- errors

    def _guard(self, handler: Handler, needs_key: bool) -> Handler:
        """Wraps a handler: the key before it, and its errors as JSON."""

        async def guarded(request: Request) -> Response:
            try:
                if needs_key:
                    self._check_key(request.headers)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=400)
            except ApiError as error:
                return self._error(error)
            except UserError as error:
                return self._error(ApiError(str(error)))
            except Exception:
                _LOG.exception("a request has failed")
                return self._error(ApiError("the server has failed", 500, code="internal"))

        return guarded

    def _error(self, error: ApiError) -> JSONResponse:
        self._engine.metrics.count_failure(error.code or str(error.status))
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        names = {404: "there is no such endpoint", 405: "the endpoint has no such method"}
        what = f"{names.get(status, 'the request is wrong')}: {request.method} {request.url.path}"
        return self._error(ApiError(what, status))

    async def _server_error(self, request: Request, error: Exception) -> Response:
        return self._error(ApiError("the server has failed", 500, code="internal"))

    def _check_key(self, headers: Mapping[str, str]) -> None:
        """Raises ApiError unless the key is right."""
        key = self._options.api_key
        if key is None:
            return
        given = headers.get("authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise ApiError(
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, request: Request) -> Json:
        """Reads the body, of limited size, as a JSON object."""
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > MOST_BYTES:
                        raise ApiError(
                            f"the body has more than {MOST_BYTES} bytes", 413, code="too_large"
                        )
        except TimeoutError:
            message = f"the body did not arrive in {BODY_SECONDS:g} s"
            raise ApiError(message, 408, code="timeout") from None
        return read_json(b"".join(parts))

    # --- small endpoints

    async def _page(self, request: Request) -> Response:
        if self._options.page is None:
            raise ApiError("the page is switched off", 404)
        return HTMLResponse(self._options.page)

    async def _health(self, request: Request) -> Response:
        if self._engine.failure is not None:
            raise self._engine.refusal()
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        self._check_ready()
        return JSONResponse({"status": "ready"})

    def _check_ready(self) -> None:
        """Raises ApiError unless requests are accepted."""
        if self._engine.is_draining or self._engine.failure is not None:
            raise self._engine.refusal()
        if not self._engine.is_ready:
            message = "the server is compiling its programs"
            raise ApiError(message, 503, code="starting", headers={"Retry-After": "5"})

    async def _metrics(self, request: Request) -> Response:
        text = self._engine.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _version(self, request: Request) -> Response:
        try:
            version = importlib.metadata.version("xflow-jax")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        return JSONResponse({"version": version})

    def _about_model(self) -> Json:
        engine = self._engine
        return {
            "id": self._options.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "xflow_jax",
            "max_model_len": engine.lm.config.max_length,
            "xflow": {
                "rules": [kind.label for kind in engine.kinds],
                "revises": [kind.rule.revises for kind in engine.kinds],
                "gen_lengths": list(engine.lengths.gen_lengths),
                "prompt_lengths": list(engine.lengths.prompt_lengths),
                "block_length": engine.lengths.block_length,
                "chat": self._tokenizer.chat_template is not None,
                "examples": [task.example for task in find_tasks(engine.lm.tasks)],
            },
        }

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["id"])
        return JSONResponse(self._about_model())

    def _check_model(self, name: str | None) -> None:
        """Raises ApiError for another model's name."""
        own = self._options.model_name
        if name is not None and name != own:
            message = f"there is no model {describe(name)}: this server has {own}"
            raise ApiError(message, 404, param="model", code="model_not_found")

    async def _tokenize(self, request: Request) -> Response:
        values = await self._body(request)
        if "messages" in values:
            messages = check_messages(values["messages"], "messages")
            ids = await anyio.to_thread.run_sync(chat_ids, self._tokenizer, messages)
        else:
            text = values.get("prompt")
            if not isinstance(text, str):
                raise ApiError(f"prompt must be a text, not {describe(text)}", param="prompt")
            ids = await anyio.to_thread.run_sync(prompt_ids, self._tokenizer, text)
        most = self._engine.lm.config.max_length
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids})

    async def _detokenize(self, request: Request) -> Response:
        ids = (await self._body(request)).get("tokens")
        last = len(self._tokenizer) - 1
        right = isinstance(ids, list) and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= last for i in ids
        )
        if not right or not isinstance(ids, list):
            raise ApiError(f"tokens must be a list of ids from 0 to {last}", param="tokens")
        return JSONResponse({"prompt": self._tokenizer.decode(ids)})

    async def _cancel(self, request: Request) -> Response:
        choices = self._open.get(request.path_params["id"])
        if choices is None:
            raise ApiError("there is no such request under way", 404, code="not_found")
        for choice in choices:
            self._engine.cancel(choice.ticket)
            choice.ticket.notify()
        return JSONResponse({"id": request.path_params["id"], "cancelled": True})

    # --- answers

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, is_chat=True)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, is_chat=False)

    async def _generate(self, request: Request, is_chat: bool) -> Response:
        """Answers a request, at once or as a stream."""
        wanted = parse_generation(await self._body(request), is_chat, check_messages)
        self._check_model(wanted.model)
        self._check_ready()
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed at the end of the server
                loop.call_soon_threadsafe(changed.set)

        tickets = await anyio.to_thread.run_sync(make_tickets, self._engine, wanted, notify)
        envelope = Envelope.make(wanted, self._options.model_name, self._texts)
        choices = [self._choice(wanted, i, ticket) for i, ticket in enumerate(tickets)]
        self._engine.submit(tickets)
        self._open[envelope.id] = choices
        headers = {"x-request-id": envelope.id}
        if wanted.ignored:
            headers["x-xflow-ignored"] = ", ".join(wanted.ignored)
        if wanted.stream:
            return _Events(
                self._events(envelope, choices, changed),
                headers=headers,
                ping=PING_SECONDS,
                send_timeout=SEND_SECONDS,
                sep="\n",
            )
        try:
            await self._wait(request, choices, changed)
            return JSONResponse(envelope.answer(choices), headers=headers)
        finally:
            self._close(envelope.id, choices)

    async def _wait(self, request: Request, choices: list[Choice], changed: asyncio.Event) -> None:
        """Waits for all choices. Raises ClientDisconnect if nobody waits for them."""
        looked = time.monotonic()
        while any(choice.finish_reason is None for choice in choices):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await changed.wait()
            changed.clear()
            for choice in choices:
                if choice.finish_reason is None:
                    choice.advance()
            if time.monotonic() - looked > POLL_SECONDS:
                if await request.is_disconnected():
                    raise ClientDisconnect
                looked = time.monotonic()

    async def _events(
        self, envelope: Envelope, choices: list[Choice], changed: asyncio.Event
    ) -> AsyncIterator[dict[str, str]]:
        """Yields the events of a stream."""
        try:
            async for chunk in stream_chunks(envelope, choices, changed):
                yield {"data": json.dumps(chunk, separators=(",", ":"))}
            yield {"data": "[DONE]"}
        except ApiError as error:
            self._engine.metrics.count_failure(error.code or str(error.status))
            yield {"data": json.dumps(error.body())}
        finally:
            self._close(envelope.id, choices)

    def _close(self, name: str, choices: list[Choice]) -> None:
        """Gives up what is left of an answer, and counts it."""
        self._open.pop(name, None)
        metrics = self._engine.metrics
        for choice in choices:
            ticket = choice.ticket
            if not ticket.is_over:
                self._engine.cancel(ticket)
            if choice.frames is not None:
                metrics.frames_dropped.inc(choice.frames.dropped)
            reason = choice.finish_reason or ticket.finish_reason
            if ticket.error is None and reason is not None:
                sizes = (len(ticket.prompt), len(choice.tokens), ticket.config.gen_length)
                metrics.count_answer(reason, *sizes)

    def _choice(self, wanted: Generation, index: int, ticket: Ticket) -> Choice:
        frames = None
        if wanted.belief is not None:
            frames = BeliefFrames(self._texts, wanted.belief.every, wanted.belief.top)
        text = TextStream(self._engine.lm, wanted.stops)
        ends = self._engine.lm.config.stop_ids

        def stop(ticket: Ticket) -> None:
            self._engine.cancel(ticket, "stop")

        return Choice(index, ticket, text, frames, ends, stop)
