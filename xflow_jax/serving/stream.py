"""Final text and belief frames of an answer under way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xflow_jax.lm import LM
from xflow_jax.serving.ticket import RowState

KEY_EVERY = 16  # every so many frames one holds all positions
REPLACEMENT = "\ufffd"  # stands for bytes that are no complete character


class TextStream:
    """Text of an answer, given out once it is final.

    Bytes of an incomplete character are held back, and so is what may begin a stop text.

    Attributes:
        text: what was given out.
        is_stopped: True after a stop text.
    """

    def __init__(self, lm: LM, stops: Sequence[str]) -> None:
        """Begins an empty text."""
        assert lm.tokenizer is not None
        self._tokenizer, self._stops = lm.tokenizer, [s for s in stops if s]
        self.text, self.is_stopped, self._count = "", False, 0
        self.tokens = 0

    def push(self, tokens: Sequence[int], is_end: bool) -> str:
        """Returns the text that is new.

        Args:
            tokens: all final tokens so far, before EOS.
            is_end: True if no further token follows.
        """
        if self.is_stopped or (len(tokens) == self._count and not is_end):
            return ""
        self._count = self.tokens = len(tokens)
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.is_stopped, whole = True, whole[: min(found)]
        elif not is_end:
            whole = whole[: len(whole) - self._held_back(whole)]
        if not whole.startswith(self.text):  # a tokenizer that changes what it has decoded
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new

    def _held_back(self, whole: str) -> int:
        """Returns the characters at the end that may still change or vanish."""
        broken = len(whole) - len(whole.rstrip(REPLACEMENT))
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(whole)), longest, -1):
                if whole.endswith(stop[:size]):
                    longest = size
                    break
        return max(broken, longest)


class TokenTexts:
    """Texts of single tokens, decoded once."""

    def __init__(self, lm: LM) -> None:
        """Begins with the mask token, whose text is empty."""
        assert lm.tokenizer is not None
        self._tokenizer, self._known = lm.tokenizer, {lm.config.mask_id: ""}

    def __getitem__(self, token: int) -> str:
        """Returns the text of a token."""
        text = self._known.get(token)
        if text is None:
            inside = token < len(self._tokenizer)
            text = self._tokenizer.decode([token]) if inside else f"<{token}>"
            self._known[token] = text
        return text


class BeliefFrames:
    """Frames of one canvas: differences of its states when sent.

    Attributes:
        dropped: states that no frame was made of.
    """

    def __init__(self, texts: TokenTexts, every: int, top: int) -> None:
        """Begins before the first frame."""
        self._texts, self._every, self._top = texts, every, top
        self._last: RowState | None = None
        self._number = self.dropped = 0

    def frame(self, state: RowState, is_end: bool) -> dict[str, object] | None:
        """Returns the next frame, or None if it is too early.

        Args:
            state: the latest state.
            is_end: True if no further state follows.
        """
        last = self._last
        if last is not None:
            if state.version == last.version:
                return None
            if state.passes - last.passes < self._every and not is_end:
                return None
            self.dropped += max(state.version - last.version - 1, 0)
        is_key = self._number % KEY_EVERY == 0
        edited = np.zeros(len(state.t), bool) if last is None else state.edits != last.edits
        if last is None:
            edited = state.edits != 0
        if is_key or last is None:
            at = np.arange(len(state.t))
        else:
            changed = edited | (state.tokens != last.tokens)
            changed |= (state.t != last.t) | (state.c != last.c)
            at = np.flatnonzero(changed)
        self._last, self._number = state, self._number + 1
        ids = state.tokens[at].tolist()
        frame: dict[str, object] = {
            "step": state.passes,
            "block": state.blocks,
            "key": is_key,
            "at": at.tolist(),
            "id": ids,
            "text": [self._texts[i] for i in ids],
            "t": state.t[at].tolist(),
            "c": state.c[at].tolist(),
            "edited": edited[at].astype(int).tolist(),
        }
        if self._top:
            frame["top"] = [self._likeliest(state, i) for i in at.tolist()]
        return frame

    def _likeliest(self, state: RowState, position: int) -> list[list[object]]:
        """Returns [id, text, p] of a position's likeliest tokens."""
        if state.top is None or state.top_tokens is None:
            return []
        ids = state.top_tokens[position, : self._top].tolist()
        levels = np.floor(state.top[position, : self._top] * 255).astype(int).tolist()
        return [[i, self._texts[i], p] for i, p in zip(ids, levels, strict=True)]
