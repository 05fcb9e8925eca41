"""Requests of the API as tickets of the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from xflow_jax.serving.engine import Engine
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.lanes import Lengths, find_rule, request_config
from xflow_jax.serving.protocol import Generation
from xflow_jax.serving.ticket import Ticket
from xflow_jax.tokenizer import chat_ids
from xflow_jax.types import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[int] | list[dict[str, str]]) -> list[int]:
    """Converts a prompt to token ids.

    Args:
        tokenizer: the tokenizer.
        prompt: a text, ids, or a chat.

    Raises:
        ApiError: for a text that is not valid.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            message = "the prompt is not valid text: it holds half of a surrogate pair"
            raise ApiError(message, param="prompt") from None
        return tokenizer.encode(prompt, add_special_tokens=False)
    if prompt and isinstance(prompt[0], dict):
        return chat_ids(tokenizer, [m for m in prompt if isinstance(m, dict)])
    return [i for i in prompt if isinstance(i, int)]


def make_tickets(engine: Engine, wanted: Generation, notify: Callable[[], None]) -> list[Ticket]:
    """Builds the engine's requests of an API request.

    Args:
        engine: the engine, for its rules and lengths.
        wanted: the request.
        notify: called whenever one of them has a new state.

    Returns:
        The tickets of all prompts and choices in order.

    Raises:
        ApiError: if the server cannot answer it.
        UserError: for a wrong rule or wrong steps.
    """
    rows, tokenizer = engine.lm.config.vocab_rows, engine.lm.tokenizer
    assert tokenizer is not None
    label, kind, rule = find_rule(engine.kinds, wanted.rule)
    _check_temperature(wanted, kind.label, rule)
    canvas, most = _canvas(engine.lengths, wanted)
    config = request_config(engine.lm, rule, engine.lengths, canvas, wanted.steps, wanted.budget)
    needs_top = wanted.top_logprobs is not None
    needs_top |= wanted.belief is not None and wanted.belief.top > 0
    seen: Counter[tuple[int, ...]] = Counter()
    tickets = []
    for prompt in wanted.prompts:
        ids = prompt_ids(tokenizer, prompt)
        if not ids or max(ids) >= rows:
            what = "is empty" if not ids else f"holds ids outside of 0 to {rows - 1}"
            raise ApiError(f"the prompt {what}", param="prompt")
        for _ in range(wanted.choices):
            repeat = seen[tuple(ids)]
            seen[tuple(ids)] += 1
            tickets.append(
                Ticket(
                    ids,
                    label,
                    kind,
                    rule,
                    config,
                    most,
                    wanted.seed or 0,
                    repeat,
                    needs_top,
                    notify,
                )  # fmt: skip
            )
    return tickets


def _canvas(lengths: Lengths, wanted: Generation) -> tuple[int, int]:
    """Returns the positions of the canvas, and the most tokens."""
    most = wanted.max_tokens or wanted.canvas or lengths.gen_lengths[0]
    largest = lengths.gen_lengths[-1]
    if max(most, wanted.canvas or 0) > largest:
        raise ApiError(
            f"the answer may have {max(most, wanted.canvas or 0)} tokens, but the server has "
            f"room for {largest}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    canvas = lengths.round_up(most if wanted.canvas is None else wanted.canvas)
    if canvas < most:
        message = f"xflow.canvas is {canvas}, but max_tokens is {most}"
        raise ApiError(message, param="xflow.canvas")
    return canvas, most


def _check_temperature(wanted: Generation, label: str, rule: object) -> None:
    """Raises ApiError for a temperature that the rule does not have."""
    given, own = wanted.temperature, getattr(rule, "temperature", 0.0)
    if given is not None and given > 0 and given != own:
        has = f"has the temperature {own:g}" if own else "does not sample"
        message = f"temperature is {given:g}, but the rule {label} {has}"
        raise ApiError(f"{message}: leave it out, or start the server with such a rule",
                       param="temperature")  # fmt: skip
