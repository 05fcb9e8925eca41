"""Requests of the API: OpenAI's fields and the object `xflow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

from xflow_jax.decoding import parse_budget
from xflow_jax.errors import UserError, check_seed
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.json_fields import Fields, Json, reject

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
    fields = Fields(values)
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


def _with_own_fields(request: Generation, fields: Fields) -> Generation:
    """Adds the object `xflow`."""
    own = fields.part("xflow", ("rule", "steps", "budget", "canvas", "belief"))
    if own is None:
        return request
    budget = own.values.get("budget")
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int | float | str):
            reject("xflow.budget", 'a share like "1/4" or 0.25', budget)
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
        reject("prompt", right, prompt)
    if all(_is_id(item) for item in prompt):
        return (prompt,)
    for item in prompt:
        is_ids = isinstance(item, list) and item and all(_is_id(i) for i in item)
        if not (isinstance(item, str) or is_ids):
            reject("prompt", right, item)
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
        reject("stop", f"a text or a list of at most {MOST_STOPS} texts {limit}", value)
    return tuple(stops)


def _seed(value: object) -> int | None:
    """Returns the seed."""
    if value is None:
        return None
    try:
        return check_seed(value)
    except UserError as error:
        raise ApiError(str(error), param="seed") from None


def _logprobs(fields: Fields, is_chat: bool) -> int | None:
    """Returns the number of likeliest tokens, or None without log probabilities."""
    if not is_chat:
        return fields.whole("logprobs", 0, MOST_TOP)
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (top or 0) if wanted else None
