"""Requests of the API: a strict reader, and OpenAI's errors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NoReturn, TypeAlias

from xflow_jax.decoding import parse_budget
from xflow_jax.errors import UserError, check_seed, describe, printable

Json: TypeAlias = dict[str, object]

MOST_BYTES = 4 * 2**20  # of a body
MOST_DEPTH = 16  # of nested lists and objects
MOST_ROWS = 64  # answers of one request: prompts times n
MOST_STOPS, MOST_STOP_LENGTH = 4, 256
MOST_CHOICES, MOST_TOP = 8, 4

# Fields that mean nothing here, with the values that change nothing.
NO_EFFECT: dict[str, tuple[object, ...]] = {
    "top_p": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
COMMON = (
    "model",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "stop",
    "n",
    "seed",
    "temperature",
    "logprobs",
    "top_logprobs",
    "xflow",
    "user",
)


class ApiError(Exception):
    """Error that a client gets as JSON.

    Attributes:
        status: HTTP status.
        kind: OpenAI's `type`.
        param: the wrong field, or None.
        code: a short name of the reason, or None.
        headers: further headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Escapes and shortens the message."""
        super().__init__(str(UserError(message)))
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else _BAD)

    def body(self) -> Json:
        """Returns the error as an object for JSON."""
        about = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": about}


_BAD = "invalid_request_error"


@dataclasses.dataclass(frozen=True)
class Belief:
    """Belief frames that a client asks for.

    Attributes:
        every: passes between two frames, at least.
        top: likeliest tokens of each position, 0 to 4.
    """

    every: int = 1
    top: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """One request for answers.

    Attributes:
        is_chat: True for chat completions.
        prompts: texts, chats, or lists of token ids.
        model: name of the model, or None.
        max_tokens: most tokens of an answer, or None for the server's default.
        stops: texts that end an answer.
        choices: n.
        seed: of rules that draw, or None.
        temperature: None or at least 0.
        stream, include_usage: as in OpenAI's API.
        top_logprobs: None without log probabilities, else 0 to 4.
        rule: text of the rule, or None for the default.
        steps, budget: passes for the whole canvas, or their share. At most one is given.
        canvas: positions of the canvas, or None.
        belief: frames of a stream, or None.
        ignored: unknown fields.
    """

    is_chat: bool
    prompts: tuple[str | list[int] | list[dict[str, str]], ...]
    model: str | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    choices: int = 1
    seed: int | None = None
    temperature: float | None = None
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    rule: str | None = None
    steps: int | None = None
    budget: Fraction | None = None
    canvas: int | None = None
    belief: Belief | None = None
    ignored: tuple[str, ...] = ()


def _wrong(param: str, right: str, value: object) -> NoReturn:
    raise ApiError(f"{param} must be {right}, not {describe(value)}", param=param)


def read_json(body: bytes) -> Json:
    """Reads the JSON object of a body.

    Args:
        body: the bytes.

    Returns:
        The object.

    Raises:
        ApiError: unless it is one object of RFC 8259, of limited depth.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ApiError("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, not {describe(value)}")
    _check_depth(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_depth(value: object) -> None:
    """Raises ApiError for a value of too many levels."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ApiError(f"the body has more than {MOST_DEPTH} levels of nesting")
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [
            child
            for part in inner
            if isinstance(part, list)
            for child in part
            if isinstance(child, dict | list)
        ]


class _Fields:
    """Fields of an object, read one by one with their types."""

    def __init__(self, values: Json, prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def _name(self, key: str) -> str:
        return self.prefix + key

    def whole(self, key: str, least: int, most: int | None = None) -> int | None:
        """Returns a whole number in a range, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        upper = math.inf if most is None else most
        if not (is_whole and isinstance(value, int) and least <= value <= upper):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            _wrong(self._name(key), f"a whole number {bounds}", value)
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """Returns a number in a range, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            _wrong(self._name(key), f"a number from {least:g} to {most:g}", value)
        if not least <= value <= most:
            _wrong(self._name(key), f"a number from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns a boolean. None is False."""
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            _wrong(self._name(key), "true or false", value)
        return bool(value)

    def text(self, key: str) -> str | None:
        """Returns a text, or None."""
        value = self.values.get(key)
        if not isinstance(value, str | None):
            _wrong(self._name(key), "a text", value)
        return value

    def part(self, key: str, known: Sequence[str]) -> _Fields | None:
        """Returns an object that may have known keys alone, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        name = self._name(key)
        if not isinstance(value, dict):
            _wrong(name, "an object", value)
        unknown = [k for k in value if k not in known]
        if unknown:
            raise ApiError(
                f"{name} has the unknown key {describe(unknown[0])}. It may have "
                f"{', '.join(known)}.",
                param=f"{name}.{printable(unknown[0])[:60]}",
            )
        return _Fields(value, f"{name}.")


def parse_generation(
    values: Json, is_chat: bool, check_chat: Callable[[object, str], list[dict[str, str]]]
) -> Generation:
    """Reads a request for answers.

    Args:
        values: the JSON object.
        is_chat: True for chat completions, False for completions.
        check_chat: the check of messages, which raises UserError.

    Returns:
        The request. Names, lengths and rules are not compared with those of the server.

    Raises:
        ApiError: for a wrong field, or one that would have no effect.
    """
    fields = _Fields(values)
    for name, neutral in NO_EFFECT.items():
        if not any(_equals(values.get(name), value) for value in neutral):
            raise ApiError(f"{name} has no effect on this decoder: leave it out", param=name)
    prompts = _chats(values, check_chat) if is_chat else _prompts(values)
    options = fields.part("stream_options", ("include_usage", "include_obfuscation"))
    limits = [fields.whole(key, 1) for key in ("max_completion_tokens", "max_tokens")]
    request = Generation(
        is_chat=is_chat,
        prompts=prompts,
        model=fields.text("model"),
        max_tokens=limits[1] if limits[0] is None else limits[0],
        stops=_stops(values.get("stop")),
        choices=fields.whole("n", 1, MOST_CHOICES) or 1,
        seed=_seed(values.get("seed")),
        temperature=fields.number("temperature", 0.0, 2.0),
        stream=fields.flag("stream"),
        include_usage=options is not None and options.flag("include_usage"),
        top_logprobs=_logprobs(fields, is_chat),
        ignored=_unknown(values, is_chat),
    )
    if len(prompts) * request.choices > MOST_ROWS:
        raise ApiError(f"the request wants more than {MOST_ROWS} answers: send several", param="n")
    if options is not None and not request.stream:
        raise ApiError("stream_options need stream to be true", param="stream_options")
    return _with_own_fields(request, fields)


def _equals(value: object, other: object) -> bool:
    """Compares values of JSON. Python takes True for 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _unknown(values: Json, is_chat: bool) -> tuple[str, ...]:
    """Returns the fields that are ignored, as a header can hold them."""
    known = {*COMMON, *NO_EFFECT, "messages" if is_chat else "prompt"}
    names = [name for name in values if name not in known]
    safe = (name.encode("ascii", "replace").decode()[:60] for name in names[:32])
    return tuple("".join(c if c.isprintable() and c != "," else "?" for c in name) for name in safe)


def _with_own_fields(request: Generation, fields: _Fields) -> Generation:
    """Adds the object `xflow`."""
    own = fields.part("xflow", ("rule", "steps", "budget", "canvas", "belief"))
    if own is None:
        return request
    budget = own.values.get("budget")
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int | float | str):
            _wrong("xflow.budget", 'a share like "1/4" or 0.25', budget)
        try:
            budget = parse_budget(budget if isinstance(budget, str) else f"{budget:.12f}")
        except UserError as error:
            raise ApiError(f"xflow.budget: {error}", param="xflow.budget") from None
    steps = own.whole("steps", 1)
    if steps is not None and budget is not None:
        raise ApiError("xflow has both steps and budget: give one", param="xflow.budget")
    belief = None
    if (part := own.part("belief", ("every", "top"))) is not None:
        belief = Belief(part.whole("every", 1) or 1, part.whole("top", 0, MOST_TOP) or 0)
        if not request.stream:
            raise ApiError("xflow.belief needs stream to be true", param="xflow.belief")
    return dataclasses.replace(
        request,
        rule=own.text("rule"),
        steps=steps,
        budget=budget,
        canvas=own.whole("canvas", 1),
        belief=belief,
    )


def _chats(
    values: Json, check: Callable[[object, str], list[dict[str, str]]]
) -> tuple[list[dict[str, str]], ...]:
    """Returns the one chat of a request."""
    if "messages" not in values:
        raise ApiError("messages is missing", param="messages")
    messages = values["messages"]
    if isinstance(messages, list):
        messages = [_plain_message(message) for message in messages]
    try:
        return (check(messages, "messages"),)
    except UserError as error:
        raise ApiError(str(error), param="messages") from None


def _plain_message(message: object) -> object:
    """Joins text parts, and drops keys without a meaning."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
    kinds = all(isinstance(p, dict) and p.get("type") == "text" for p in parts)
    if parts and kinds and len(texts) == len(parts):
        message = {**message, "content": "".join(texts)}
    if message.get("type") == "text":  # lm-evaluation-harness marks messages like this
        message = {k: v for k, v in message.items() if k != "type"}
    # An answer that is sent back has empty fields.
    return {k: v for k, v in message.items() if k != "name" and v is not None and v != []}


def _prompts(values: Json) -> tuple[str | list[int], ...]:
    """Returns the prompts of a completion."""
    prompt = values.get("prompt")
    if prompt is None:
        raise ApiError("prompt is missing", param="prompt")
    if isinstance(prompt, str):
        return (prompt,)
    right = "a text, a list of token ids, or a list of either"
    if not isinstance(prompt, list) or not prompt:
        _wrong("prompt", right, prompt)
    if all(_is_id(item) for item in prompt):
        return (prompt,)
    for item in prompt:
        is_ids = isinstance(item, list) and item and all(_is_id(i) for i in item)
        if not (isinstance(item, str) or is_ids):
            _wrong("prompt", right, item)
    return tuple(prompt)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _stops(value: object) -> tuple[str, ...]:
    """Returns the stop texts."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    right = (
        isinstance(stops, list)
        and len(stops) <= MOST_STOPS
        and all(isinstance(s, str) and 0 < len(s) <= MOST_STOP_LENGTH for s in stops)
    )
    if not right or not isinstance(stops, list):
        limit = f"of at most {MOST_STOP_LENGTH} characters"
        _wrong("stop", f"a text or a list of at most {MOST_STOPS} texts {limit}", value)
    return tuple(stops)


def _seed(value: object) -> int | None:
    """Returns the seed."""
    if value is None:
        return None
    try:
        return check_seed(value)
    except UserError as error:
        raise ApiError(str(error), param="seed") from None


def _logprobs(fields: _Fields, is_chat: bool) -> int | None:
    """Returns the number of likeliest tokens, or None without log probabilities."""
    if not is_chat:
        return fields.whole("logprobs", 0, MOST_TOP)
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (top or 0) if wanted else None
