"""Run of `xflow chat`, with a canvas that is revised in place."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from xflow_jax.cli.generate_run import chat_note, decode_lengths, longest_task
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import (
    SETTLED,
    Rule,
    Trace,
    generate,
    parse_budget,
    parse_rule,
    resolve_steps,
    stream,
)
from xflow_jax.errors import UserError, printable, require
from xflow_jax.lm import LM, load
from xflow_jax.parallel import default_mesh
from xflow_jax.serving import current_tokens, token_texts
from xflow_jax.tasks import Task, find_tasks
from xflow_jax.tokenizer import Messages, chat_ids, decode_responses, with_system

MASK, END = "░", "·"
LONGEST_REPLAY = 3.0  # seconds for all passes of an answer
HELP = """/rule RULE      decode with another rule, like /rule threshold:tau=0.9
/budget B       take another share of the full number of steps, like /budget 1/2
/system TEXT    set the system prompt, or remove it without TEXT
/clear          forget the earlier messages
/quit           leave (or Ctrl-D). Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Snapshot:
    """State of an answer after a pass.

    Attributes:
        tokens: int [N].
        progress: t, float [N].
        passes: forward passes so far.
        steps: forward passes of the whole budget.
    """

    tokens: np.ndarray
    progress: np.ndarray
    passes: int
    steps: int


@dataclass
class Chat:
    """Model, decoder and earlier messages of a chat.

    Attributes:
        lm: a model with a tokenizer.
        label: the rule as on the command line.
        rule: how far each position moves in a step.
        budget: share of the full number of steps.
        gen_length: N as given by the user, or None.
        block_length: positions of a block as given by the user, or None.
        seed: of rules that draw.
        system: the system prompt, or None.
        turns: earlier messages. They stay empty for a model of single requests.
    """

    lm: LM
    label: str
    rule: Rule
    budget: Fraction
    gen_length: int | None = None
    block_length: int | None = None
    seed: int = 0
    system: str | None = None
    turns: Messages = field(default_factory=list)

    @property
    def tasks(self) -> list[Task]:
        """The only tasks that the model was trained for."""
        return find_tasks(self.lm.tasks)

    def messages(self, text: str) -> Messages:
        """Returns the chat that ends with a new message of the user."""
        return with_system([*self.turns, {"role": "user", "content": text}], self.system)

    def remember(self, text: str, answer: str) -> None:
        """Adds a message and its answer to the chat.

        A model of single requests reads no earlier turns, so for it nothing is added.
        """
        if not self.tasks:
            self.turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]

    def decode(self, messages: Messages) -> Iterator[Snapshot]:
        """Yields the state of the answer after each pass."""
        lm, tasks = self.lm, self.tasks
        assert lm.tokenizer is not None
        task = longest_task(tasks, [messages[-1]["content"]])
        length, block_length = decode_lengths(task, self.gen_length, self.block_length)
        steps = resolve_steps(lm.config, self.budget, length, block_length)
        request = (lm, [chat_ids(lm.tokenizer, messages)], self.rule, length, steps)
        try:
            states = stream(*request, block_length=block_length, seed=self.seed)
        except UserError:
            # Some rules and families decode in `generate` alone. It raises all other errors again.
            out = generate(*request, block_length=block_length, seed=self.seed, trace=True)
            assert out.trace is not None
            yield from replay(out.trace, steps)
            yield Snapshot(out.tokens[0], out.progress[0], int(out.forward_passes[0]), steps)
            return
        for state in states:
            passes = int(state.forward_passes[0])
            yield Snapshot(state.tokens[0], state.progress[0], passes, steps)


def run_chat(args: argparse.Namespace) -> None:
    """Reads messages and commands until the end of the input.

    Args:
        args: the arguments of `xflow chat`.

    Raises:
        UserError: for bad arguments, or a model without a tokenizer.
    """
    label, rule = parse_rule(args.rule)
    budget = parse_budget(args.budget)
    require(jax.process_count() == 1, "xflow chat runs in one process, not in several")
    lm = load(args.model, dtype=args.dtype, mesh=default_mesh(args.mesh), mask_id=args.mask_id)
    if lm.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer.json, without which a chat cannot be read")
    lengths = (args.gen_length, args.block_length)
    chat = Chat(lm, label, rule, budget, *lengths, args.seed, args.system)
    console = Console(highlight=False)
    if chat.tasks:
        names = " and ".join(task.name for task in chat.tasks)
        print_text(
            f"{args.model} knows single requests of {names} alone, so each message is a chat of "
            f"its own. Try: {chat.tasks[0].example}"
        )
    if console.is_terminal and sys.stdin.isatty():
        print_text("/help lists the commands.")
    for line in read_lines(console):
        if line in ("/quit", "/exit"):
            return
        try:
            reply(chat, line, console)
        except UserError as error:
            print_text(f"error: {error}")


def read_lines(console: Console) -> Iterator[str]:
    """Yields the lines of the input, without empty ones."""
    is_typed = console.is_terminal and sys.stdin.isatty()
    if is_typed:
        # Importing it gives `input` the keys of a line editor, and the lines before.
        import readline  # noqa: F401
    while True:
        try:
            line = input("\n> " if is_typed else "").strip()
        except EOFError:
            return
        if line:
            yield line


def reply(chat: Chat, line: str, console: Console) -> None:
    """Runs a command of the chat, or answers a message.

    Raises:
        UserError: for a wrong command or message.
    """
    if line.startswith("/"):
        name, _, value = line.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise UserError(f"there is no command {name}. There are {', '.join(COMMANDS)}, /quit.")
        print_text(command(chat, value.strip()))
        return
    messages = chat.messages(line)
    note = chat_note(chat.tasks, messages)
    if note is not None:
        print_text(f"note: {note}")
    view = show_live if console.is_terminal else show_plain
    try:
        answer, passes = view(chat, messages, console)
    except KeyboardInterrupt:
        print_text("[stopped]")
        return
    print_text(f"[{chat.label}, {passes} forward passes]")
    chat.remember(line, answer)


def show_plain(chat: Chat, messages: Messages, console: Console) -> tuple[str, int]:
    """Prints the finished answer, if the output is no terminal.

    Returns:
        (answer, forward passes).
    """
    *_, last = chat.decode(messages)
    answer = final_text(chat.lm, last)
    print_text(answer)
    return answer, last.passes


def show_live(chat: Chat, messages: Messages, console: Console) -> tuple[str, int]:
    """Revises the canvas of the answer in place.

    Returns:
        (answer, forward passes).
    """
    texts, before = token_texts(chat.lm), None
    with Live(Text(MASK), console=console, auto_refresh=False, transient=True) as live:
        for snapshot in chat.decode(messages):
            live.update(draw_canvas(chat.lm, texts, snapshot, before), refresh=True)
            before = snapshot
    assert before is not None
    answer = final_text(chat.lm, before)
    print_text(answer)
    return answer, before.passes


def final_text(lm: LM, last: Snapshot) -> str:
    """Returns the text of the last state, up to its first EOS."""
    assert lm.tokenizer is not None
    return decode_responses(lm.tokenizer, last.tokens[None], lm.config.stop_ids)[0]


def draw_canvas(lm: LM, texts: list[str], now: Snapshot, before: Snapshot | None) -> Text:
    """Draws the tokens of a state: the further along, the more distinct.

    Args:
        lm: the model, for its special tokens.
        texts: text of every token id.
        now: the state.
        before: the state one pass earlier, or None. A token that has changed since it was settled
            is underlined and in reverse, which needs no colour.
    """
    settled = now.progress >= SETTLED
    ends = np.flatnonzero(settled & np.isin(now.tokens, list(lm.config.stop_ids)))
    length = int(ends[0]) if len(ends) else len(now.tokens)
    edited = np.zeros(len(now.tokens), bool)
    if before is not None:
        edited = (before.progress > now.progress) | (
            (before.progress >= SETTLED) & (before.tokens != now.tokens)
        )
    head = f"pass {now.passes} of {now.steps}, {100 * settled.mean():.0f} % settled"
    head += f", {edited.sum()} re-edited" if edited.any() else ""
    text = Text().append(f"[{head}]\n", style="dim")
    for token, t, is_edited in zip(now.tokens[:length], now.progress, edited, strict=False):
        text.append(_spell(lm, texts, int(token)), style=_style(float(t), bool(is_edited)))
    return text


def _spell(lm: LM, texts: list[str], token: int) -> str:
    """Returns the text of a token without characters that a terminal obeys."""
    if token == lm.config.mask_id:
        return MASK
    return END if token in lm.config.stop_ids else printable(texts[token], keep="\n\t")


def _style(t: float, is_edited: bool) -> str:
    """Returns the style of a token at progress t."""
    if is_edited:
        return "reverse underline dark_orange3"
    if t >= SETTLED:
        return "bold"
    return "yellow" if t >= 0.5 else "dim"


def replay(trace: Trace, steps: int) -> Iterator[Snapshot]:
    """Yields the passes of a trace at a readable pace.

    Passes that early exit skipped are left out.
    """
    tokens, progress, reedited, confidence = (
        np.asarray(getattr(trace, name))[:, 0]
        for name in ("tokens", "progress", "reedited", "confidence")
    )
    passes = np.flatnonzero(confidence.max(axis=-1) > 0).tolist()
    current = current_tokens(tokens, progress, reedited)
    for count, step in enumerate(passes, 1):
        yield Snapshot(current[step], progress[step], count, steps)
        time.sleep(min(0.25, LONGEST_REPLAY / len(passes)))


def _set_rule(chat: Chat, value: str) -> str:
    require(bool(value), f"the rule is {chat.label}. Write /rule RULE for another one.")
    chat.label, chat.rule = parse_rule(value)
    return f"[the rule is {chat.label}]"


def _set_budget(chat: Chat, value: str) -> str:
    require(bool(value), f"the budget is {chat.budget}. Write /budget B for another one.")
    chat.budget = parse_budget(value)
    return f"[the budget is {chat.budget}]"


def _set_system(chat: Chat, value: str) -> str:
    chat.system = value or None
    return "[there is a system prompt]" if value else "[there is no system prompt]"


def _clear(chat: Chat, value: str) -> str:
    chat.turns = []
    return "[the chat is empty]"


def _help(chat: Chat, value: str) -> str:
    return HELP


COMMANDS: dict[str, Callable[[Chat, str], str]] = {
    "/rule": _set_rule,
    "/budget": _set_budget,
    "/system": _set_system,
    "/clear": _clear,
    "/help": _help,
}
