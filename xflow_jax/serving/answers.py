"""Answers in OpenAI's form: choices, chunks, log probabilities and usage."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from xflow_jax.serving.json_fields import Json
from xflow_jax.serving.protocol import Generation
from xflow_jax.serving.stream import BeliefFrames, TextStream, TokenTexts
from xflow_jax.serving.ticket import RowState, Ticket


class Choice:
    """One answer under way.

    Attributes:
        index: its number in the request.
        ticket: its request in the engine.
        finish_reason: "stop", "length" or "cancelled" once it is over, else None.
    """

    def __init__(
        self,
        index: int,
        ticket: Ticket,
        text: TextStream,
        frames: BeliefFrames | None,
        stop_ids: Collection[int],
        stop: Callable[[Ticket], None],
    ) -> None:
        """Begins without any token. `stop` ends the ticket after a stop text."""
        self.index, self.ticket, self.text, self.frames = index, ticket, text, frames
        self._stop_ids, self._stop = stop_ids, stop
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self._version = 0

    def advance(self) -> tuple[Json | None, str, list[int]]:
        """Reads the engine's latest state.

        Returns:
            A belief frame or None, the new final text, and the new final tokens.

        Raises:
            ApiError: if the request has failed.
        """
        # The reason is read first, since the engine writes the state before it.
        reason, state = self.ticket.finish_reason, self.ticket.state
        if self.ticket.error is not None:
            raise self.ticket.error
        if state is None:
            self.finish_reason = reason
            return None, "", []
        if state.version == self._version and reason is None:
            return None, "", []
        self._version = state.version
        frame = None if self.frames is None else self.frames.frame(state, reason is not None)
        tokens = self._final_tokens(state, reason)
        new = self.text.push(tokens, is_end=reason is not None)
        fresh, self.tokens = tokens[len(self.tokens) :], tokens
        if self.text.is_stopped and reason in (None, "length"):
            self._stop(self.ticket)
            reason = "stop"
        self.finish_reason = reason
        return frame, new, fresh

    def _final_tokens(self, state: RowState, reason: str | None) -> list[int]:
        """Returns the tokens that stay, before EOS."""
        count = self.ticket.end if reason in ("stop", "length") else state.final
        if self.text.is_stopped:
            count = len(self.tokens)
        tokens = state.tokens[: min(count, self.ticket.max_tokens)].tolist()
        return list(itertools.takewhile(lambda token: token not in self._stop_ids, tokens))

    def about(self) -> Json:
        """Returns the object `xflow` of an answer."""
        ticket, state = self.ticket, self.ticket.state
        started = ticket.ended if ticket.started is None else ticket.started
        end = time.monotonic() if ticket.ended is None else ticket.ended
        settled = ticket.settled

        def ms(seconds: float) -> float:
            return round(max(seconds, 0.0) * 1000, 1)

        return {
            "rule": ticket.label,
            "steps": steps_of(ticket),
            "forward_passes": 0 if state is None else state.passes,
            "canvas": ticket.config.gen_length,
            "queue_ms": ms((end if started is None else started) - ticket.created),
            "first_settled_ms": None if settled is None else ms(settled - ticket.created),
            "decode_ms": 0.0 if started is None else ms(end - started),
        }


def steps_of(ticket: Ticket) -> int:
    """Returns the steps of all blocks of a request."""
    config = ticket.config
    return config.steps * max(config.gen_length // config.block_length, 1)


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Parts that all chunks of an answer share.

    Attributes:
        request: the request.
        model: name of the served model.
        texts: texts of single tokens.
        id: id of the answer.
        created: Unix time in seconds.
    """

    request: Generation
    model: str
    texts: TokenTexts
    id: str
    created: int

    @classmethod
    def make(cls, request: Generation, model: str, texts: TokenTexts) -> Envelope:
        """Makes the envelope of a new answer."""
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        return cls(request, model, texts, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def chunk(
        self,
        choice: Choice | None,
        text: str | None = None,
        role: str | None = None,
        finish_reason: str | None = None,
        tokens: Sequence[int] = (),
        **further: object,
    ) -> Json:
        """Returns one chunk of a stream."""
        chat = self.request.is_chat
        choices: list[Json] = []
        if choice is not None:
            delta: Json = {} if text is None else {"content": text}
            if role is not None:
                delta = {"role": role, "content": ""}
            part: Json = {"delta": delta} if chat else {"text": text or ""}
            logprobs = self.logprobs(choice, tokens) if tokens else None
            about = {"logprobs": logprobs, "finish_reason": finish_reason}
            choices.append({"index": choice.index, **part, **about})
        kind = "chat.completion.chunk" if chat else "text_completion"
        return self._whole(kind, choices) | further

    def answer(self, choices: Sequence[Choice]) -> Json:
        """Returns the answer as one object."""
        chat, parts = self.request.is_chat, list[Json]()
        for choice in choices:
            text = choice.text.text
            message = {"role": "assistant", "content": text, "refusal": None}
            part: Json = {"message": message} if chat else {"text": text}
            wanted = self.request.top_logprobs is not None
            logprobs = self.logprobs(choice, choice.tokens) if wanted else None
            about = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
            about["xflow"] = choice.about()
            parts.append({"index": choice.index, **part, **about})
        kind = "chat.completion" if chat else "text_completion"
        own = {"usage": self.usage(choices), "xflow": choices[0].about()}
        return self._whole(kind, parts) | own

    def _whole(self, kind: str, choices: Sequence[Json]) -> Json:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**about, "choices": choices}

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Returns the tokens of prompts and answers. A prompt counts once."""
        n = self.request.choices
        prompt = sum(len(c.ticket.prompt) for c in choices if c.index % n == 0)
        made = sum(len(choice.tokens) for choice in choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": made}
        return {**counts, "total_tokens": prompt + made}

    def logprobs(self, choice: Choice, tokens: Sequence[int]) -> Json | None:
        """Returns the log probabilities of a choice's last tokens."""
        most, state = self.request.top_logprobs, choice.ticket.state
        if most is None or state is None or state.top is None or state.top_tokens is None:
            return None
        first, entries = len(choice.tokens) - len(tokens), list[Json]()
        for position, token in enumerate(tokens, first):
            ids = state.top_tokens[position].tolist()
            chances = [float(p) for p in state.top[position]]
            own = float(state.c[position]) / 255
            if token in ids:
                own = chances[ids.index(token)]
            likeliest = list(zip(ids, chances, strict=True))[:most]
            entry = self._entry(token, own)
            entry["top_logprobs"] = [self._entry(i, p) for i, p in likeliest]
            entries.append(entry)
        if self.request.is_chat:
            return {"content": entries, "refusal": None}
        return self._old_logprobs(entries)

    def _entry(self, token: int, chance: float) -> Json:
        text = self.texts[token]
        value = math.log(chance) if chance > 0 else -9999.0
        return {"token": text, "logprob": value, "bytes": list(text.encode(errors="replace"))}

    def _old_logprobs(self, entries: Sequence[Json]) -> Json:
        """Returns log probabilities as completions have them."""
        offsets, at = [], 0
        for entry in entries:
            offsets.append(at)
            at += len(str(entry["token"]))
        tops = [entry["top_logprobs"] for entry in entries]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {str(e["token"]): e["logprob"] for e in top} if isinstance(top, list) else {}
                for top in tops
            ],
            "text_offset": offsets,
        }


def _announcement(ticket: Ticket) -> Json:
    """Returns the object `xflow` of a stream's first chunk."""
    return {
        "canvas": ticket.config.gen_length,
        "block_length": ticket.config.block_length,
        "steps": steps_of(ticket),
        "rule": ticket.label,
        "prompt_tokens": len(ticket.prompt),
    }


async def stream_chunks(
    envelope: Envelope, choices: Sequence[Choice], changed: asyncio.Event
) -> AsyncIterator[Json]:
    """Yields the chunks of a stream, as docs/reference/serving.md describes them.

    Args:
        envelope: parts that all chunks share.
        choices: the choices.
        changed: set whenever a choice has a new state.

    Yields:
        The chunks.

    Raises:
        ApiError: if a choice has failed.
    """
    request = envelope.request
    for choice in choices:
        first = envelope.chunk(choice, role="assistant")
        yield first if request.belief is None else first | {"xflow": _announcement(choice.ticket)}
    left = list(choices)
    while left:
        await changed.wait()
        changed.clear()
        for choice in list(left):
            frame, text, tokens = choice.advance()
            if frame is not None:
                yield envelope.chunk(choice, xflow=frame)
            if text or tokens and request.top_logprobs is not None:
                yield envelope.chunk(choice, text, tokens=tokens)
            if choice.finish_reason is not None:
                left.remove(choice)
                reason, about = choice.finish_reason, choice.about()
                yield envelope.chunk(choice, finish_reason=reason, xflow=about)
    if request.include_usage:
        yield envelope.chunk(None, usage=envelope.usage(choices))
