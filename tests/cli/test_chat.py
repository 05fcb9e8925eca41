"""The chat in the terminal: commands, history, and the canvas that is revised in place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import xflow_jax as xf
from xflow_jax.cli import chat_run, main
from xflow_jax.cli.chat_run import Chat, Snapshot, draw_canvas, replay, show_live
from xflow_jax.decoding import MaskPrediction, parse_budget
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import Messages, load_tokenizer

TOKENIZER = load_tokenizer(Path(xf.__file__).parent / "tiny")
SPECIAL = {
    name: TOKENIZER.convert_tokens_to_ids(f"<|{name}|>") for name in ("mdm_mask", "endoftext")
}
MASK, EOS = SPECIAL.values()
ANSWER = TOKENIZER("def solve(xs):\n    return len(xs)")["input_ids"]


def model(*tasks: str) -> SimpleNamespace:
    """A model that has no parameters, since `Chat.decode` is replaced."""
    config = SimpleNamespace(mask_id=MASK, stop_ids=(EOS,), vocab_rows=len(TOKENIZER))
    return SimpleNamespace(config=config, tokenizer=TOKENIZER, tasks=tasks)


def passes() -> list[Snapshot]:
    """An answer in three passes. The second one re-edits a token."""
    n = len(ANSWER)
    tokens = np.array([[*ANSWER, EOS, EOS]] * 3)
    tokens[0, n // 2 :] = MASK
    tokens[0, 1] = ANSWER[0]
    t = np.ones((3, n + 2))
    t[0, n // 2 :], t[1, n // 2 :] = 0, 0.5
    return [Snapshot(tokens[k], t[k], k + 1, 3) for k in range(3)]


@pytest.fixture
def chats(monkeypatch) -> list[Messages]:
    """Records the chats that are decoded."""
    seen: list[Messages] = []

    def decode(chat: Chat, messages: Messages) -> Iterator[Snapshot]:
        seen.append(messages)
        yield from passes()

    monkeypatch.setattr(Chat, "decode", decode)
    return seen


def talk(monkeypatch, lm: SimpleNamespace, *lines: str, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(chat_run, "load", lambda *args, **kwargs: lm)
    monkeypatch.setattr(chat_run, "default_mesh", lambda text: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main.main(["chat", "--model", "tiny", *options])


def test_a_chat_goes_on_with_its_history_and_is_plain_without_a_terminal(
    monkeypatch, capsys, chats
):
    lines = ("Hello", "", "And you?", "/clear", "/system Be short.", "Bye", "/quit", "unread")
    assert talk(monkeypatch, model(), *lines) == 0
    answer = {"role": "assistant", "content": "def solve(xs):\n    return len(xs)"}
    users = [{"role": "user", "content": text} for text in ("Hello", "And you?", "Bye")]
    system = {"role": "system", "content": "Be short."}
    assert chats == [[users[0]], [users[0], answer, users[1]], [system, users[2]]]
    printed = capsys.readouterr()
    assert printed.out.count("    return len(xs)\n[flow, 3 forward passes]\n") == 3
    assert "\x1b" not in printed.out and printed.err == "" and chat_run.MASK not in printed.out


def test_a_model_of_single_requests_has_no_history(monkeypatch, capsys, chats):
    example = microcode.TASK.example
    assert talk(monkeypatch, model("microcode"), example, "A joke!", options=("--seed=3",)) == 0
    assert [len(chat) for chat in chats] == [1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "tiny knows single requests of microcode alone, so each message is a chat of its own. "
        f"Try: {example}"
    )
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 1 and "trained on requests of microcode alone" in notes[0]


def test_commands_change_the_decoder_and_mistakes_are_sentences(monkeypatch, capsys, chats):
    lines = ("/rule threshold:tau=0.9", "/budget 1/2", "Hi", "/rule thresold", "/budget 2")
    lines += ("/nosuch", "/rule", "/budget", "/system", "/help")
    assert talk(monkeypatch, model(), *lines) == 0
    out = capsys.readouterr().out
    for text in (
        "[the rule is threshold:tau=0.9]\n[the budget is 1/2]\n",
        "[threshold:tau=0.9, 3 forward passes]",
        "error: ",
        "did you mean threshold?",
        "must be above 0 and at most 1",
        "error: there is no command /nosuch. There are /rule, /budget, /system, /clear, /help, ",
        "error: the rule is threshold:tau=0.9. Write /rule RULE for another one.",
        "error: the budget is 1/2. Write /budget B for another one.",
        "[there is no system prompt]",
        "/quit           leave (or Ctrl-D)",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--budget", "2"), "must be above 0 and at most 1"),
        (("--rule", "flwo"), "did you mean flow?"),
        (("--system", " "), "the system prompt is empty"),
        (("--block-length", "0"), "block_length must be a whole number of at least 1"),
    ],
)
def test_wrong_options(monkeypatch, capsys, options, sentence):
    assert talk(monkeypatch, model(), options=options) == 2
    assert sentence in capsys.readouterr().err


def test_an_interrupt_stops_the_answer_alone(monkeypatch, capsys, chats):
    def interrupt(*_: object) -> tuple[str, int]:
        raise KeyboardInterrupt

    chat = Chat(model(), "mask", MaskPrediction(), parse_budget("1"))
    monkeypatch.setattr(chat_run, "show_plain", interrupt)
    chat_run.reply(chat, "Hello", Console(file=io.StringIO()))
    assert capsys.readouterr().out == "[stopped]\n" and chat.turns == []


def test_the_canvas_becomes_distinct_with_progress():
    first, second, _ = passes()
    lm = model()
    texts = [TOKENIZER.decode([i]) for i in range(len(TOKENIZER))]
    start = draw_canvas(lm, texts, first, None)
    assert start.plain.startswith("[pass 1 of 3, ") and chat_run.MASK in start.plain
    later = draw_canvas(lm, texts, second, first)
    assert ", 1 re-edited]" in later.plain and later.plain.endswith("(xs)··")
    styles = [str(span.style) for span in later.spans]
    assert styles.count("reverse underline dark_orange3") == 1
    assert "bold" in styles and "yellow" in styles
    hostile = draw_canvas(lm, ["\x1b[2J"] * len(texts), second, None)
    assert "\x1b" not in hostile.plain and "\\x1b[2J" in hostile.plain


def test_a_terminal_gets_the_canvas_in_place_and_then_the_answer(chats, capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system="truecolor")
    chat = Chat(model(), "mask", MaskPrediction(), parse_budget("1"))
    answer, count = show_live(chat, chat.messages("Hello"), console)
    assert (answer, count) == ("def solve(xs):\n    return len(xs)", 3)
    drawn = screen.getvalue()
    assert all(f"pass {k} of 3" in drawn for k in (1, 2, 3))
    assert drawn.count("\x1b[1A") >= 3  # the cursor goes up, and the lines are written again
    assert capsys.readouterr().out == answer + "\n"


def test_a_trace_is_replayed_without_skipped_passes(monkeypatch):
    monkeypatch.setattr(chat_run, "LONGEST_REPLAY", 0)
    tokens = np.array([[[5, 6]], [[7, 8]], [[0, 0]], [[9, 9]]])
    progress = np.array([[[1, 0.5]], [[1, 0.9]], [[1, 0.9]], [[1, 1]]])
    confidence = np.array([[[0.9, 0.5]], [[0.9, 0.5]], [[0, 0]], [[0.9, 0.5]]])
    trace = SimpleNamespace(
        tokens=tokens, progress=progress, confidence=confidence, reedited=np.zeros((4, 1, 2), bool)
    )
    found = list(replay(trace, 8))
    assert [s.tokens.tolist() for s in found] == [[5, 6], [5, 8], [5, 9]]
    assert [s.passes for s in found] == [1, 2, 3] and found[-1].steps == 8
