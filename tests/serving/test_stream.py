"""Text that only grows, and frames that describe a canvas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.helpers import TOKENIZER, toy
from xflow_jax.serving.stream import KEY_EVERY, BeliefFrames, TextStream, TokenTexts
from xflow_jax.serving.ticket import RowState


def text_stream(stops=()):
    return TextStream(dataclasses.replace(toy(), tokenizer=TOKENIZER), stops)


def stream(ids, stops=(), step=1):
    texts = text_stream(stops)
    parts = [texts.push(ids[:end], end == len(ids)) for end in range(0, len(ids) + 1, step)]
    return texts, parts


TEXTS = ["abs(x) + 1", "smile \U0001f600, \u00e9 and \u4f60\u597d!", "def f(a):\n    return a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 3])
def test_deltas_join_to_the_text(text, step):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    texts = text_stream()
    parts = [texts.push(ids[:end], False) for end in range(0, len(ids) + 1, step)]
    parts.append(texts.push(ids, True))
    assert "".join(parts) == texts.text == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(map(bool, parts)) > 1


def test_an_incomplete_character_at_the_end_is_given_out():
    ids = TOKENIZER.encode("\U0001f600", add_special_tokens=False)[:-1]
    texts = text_stream()
    assert texts.push(ids, False) == ""
    assert set(texts.push(ids, True)) == {"\ufffd"}


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["return"], "def f(a):\n    "),
        (["turn a", "f("], "def "),
        (["nothing"], TEXTS[2]),
        (["aX"], TEXTS[2]),
    ],
)
def test_stop_texts_across_tokens(stops, expected):
    ids = TOKENIZER.encode(TEXTS[2], add_special_tokens=False)
    texts, parts = stream(ids, stops)
    assert "".join(parts) == expected
    assert texts.is_stopped == (expected != TEXTS[2])
    assert texts.push([*ids, ids[0]], True) == "" or not texts.is_stopped


def state(version, passes, tokens, t=None, c=None, edits=None, final=0):
    n = len(tokens)
    fill = [np.zeros(n, np.uint8) if x is None else np.asarray(x, np.uint8) for x in (t, c, edits)]
    top = np.full((n, 4), 0.25, np.float32)
    ids = np.tile(np.arange(4), (n, 1))
    return RowState(version, np.asarray(tokens), *fill, 0, passes, final, top, ids)


def frames(every=1, top=0):
    return BeliefFrames(TokenTexts(dataclasses.replace(toy(), tokenizer=TOKENIZER)), every, top)


def test_frames_hold_what_changed():
    made = frames()
    first = made.frame(state(1, 1, [20, 20, 5]), False)
    assert first["key"] and first["at"] == [0, 1, 2] and first["text"][:2] == ["", ""]
    assert made.frame(state(1, 1, [20, 20, 5]), False) is None
    second = made.frame(state(4, 2, [20, 7, 5], edits=[0, 0, 1]), False)
    assert not second["key"] and second["at"] == [1, 2] and second["edited"] == [0, 1]
    assert second["id"] == [7, 5] and second["step"] == 2 and made.dropped == 2


def test_frames_come_every_few_passes_and_at_the_end():
    made = frames(every=3, top=2)
    shown = [made.frame(state(i, i, [i]), i == 8) is not None for i in range(1, 9)]
    assert shown == [True, False, False, True, False, False, True, True]
    assert made.frame(state(9, 99, [3]), False)["top"] == [[[0, "!", 63], [1, '"', 63]]]


def test_every_sixteenth_frame_is_a_key():
    made = frames()
    keys = [made.frame(state(i, i, [i % 7, 1]), False)["key"] for i in range(1, 40)]
    assert [i for i, key in enumerate(keys) if key] == [0, KEY_EVERY, 2 * KEY_EVERY]


def test_frames_applied_in_order_give_the_state():
    made, rng = frames(), np.random.default_rng(0)
    canvas, version = np.zeros((3, 12), int), 0
    tokens, t, c = np.full(12, 20), np.zeros(12, np.uint8), np.zeros(12, np.uint8)
    for _ in range(40):
        for _ in range(rng.integers(1, 4)):  # a slow client misses some states
            version += 1
            at = rng.integers(0, 12, 3)
            tokens, t, c = tokens.copy(), t.copy(), c.copy()
            tokens[at], t[at], c[at] = rng.integers(0, 9, 3), rng.integers(0, 256, 3), 9
        frame = made.frame(state(version, version, tokens, t, c), False)
        for row, name in enumerate(("id", "t", "c")):
            canvas[row, frame["at"]] = frame[name]
        assert np.array_equal(canvas, [tokens, t, c])
