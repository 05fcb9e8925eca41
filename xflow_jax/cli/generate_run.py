"""Run of `xflow generate`: decodes prompts and prints the answers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

from xflow_jax.benchmarks import profile_calls
from xflow_jax.cli.arguments import cache_arguments
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import Generation, generate, parse_budget, parse_rule, resolve_steps
from xflow_jax.errors import UserError
from xflow_jax.evaluation import judge_prompts, verdict_sentence
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh, multihost
from xflow_jax.serving import TracedDecode, token_texts, write_trajectory_page
from xflow_jax.tasks import Task, find_tasks
from xflow_jax.tokenizer import Messages, chat_ids, read_messages, with_system

GEN_LENGTH = 128


@dataclass(frozen=True)
class _Answer:
    """An answer to a chat, with its verdict and note."""

    chat: Messages
    text: str
    forward_passes: int
    verdict: dict[str, Any]
    note: str | None

    @property
    def prompt(self) -> str:
        return self.chat[-1]["content"]


def answer_prompts(args: argparse.Namespace) -> None:
    """Decodes the prompts and prints the answers.

    Answers to requests of a task that the library can judge are judged as well.

    Args:
        args: the arguments of `xflow generate`.

    Raises:
        UserError: for bad input.
    """
    chats = _read_chats(args)
    label, rule = parse_rule(args.rule)
    beside = None if args.beside is None else parse_rule(args.beside)
    budget = parse_budget(args.budget or "1")
    lm = load(args.model, dtype=args.dtype, mesh=default_mesh(args.mesh), mask_id=args.mask_id)
    if lm.tokenizer is None:
        raise UserError(
            f"{args.model} has no tokenizer.json, without which a prompt cannot be read"
        )
    tasks = find_tasks(lm.tasks)
    prompts = [chat[-1]["content"] for chat in chats]
    notes = [chat_note(tasks, chat) for chat in chats]
    for prompt, note in zip(prompts, notes, strict=True):
        if note is not None and multihost.is_first_process():
            print(f"note: {shorten(prompt, 60)!r}: {note}", file=sys.stderr, flush=True)
    task = longest_task(tasks, prompts)
    length, block_length = decode_lengths(task, args.gen_length, args.block_length)
    steps = args.steps
    if steps is None:
        steps = resolve_steps(lm.config, budget, length, block_length)
    decode = partial(
        generate,
        lm,
        [chat_ids(lm.tokenizer, chat) for chat in chats],
        gen_length=length,
        steps=steps,
        block_length=block_length,
        seed=args.seed,
        trace=args.trace is not None,
        **cache_arguments(args),
    )
    began = time.perf_counter()
    out = decode(rule=rule)
    seconds = time.perf_counter() - began
    profile_calls(args.profile, partial(decode, rule=rule))
    answers = _judge(chats, out, notes)
    if args.trace is not None:
        decodes = [_traced(label, out, answers[0], length)]
        if beside is not None:
            other = decode(rule=beside[1])
            decodes.append(_traced(beside[0], other, _judge(chats, other, notes)[0], length))
        write_trajectory_page(args.trace, decodes, token_texts(lm), chats[0], args.model)
    if args.json:
        about = {"rule": label, "gen_length": length, "steps": steps}
        _print_json(answers, about, args.seed)
        return
    _print_text(answers, label, length)
    print(f"[{seconds:.1f} s with compilation]")
    if args.trace is not None:
        print_text(f"[wrote {args.trace}]")


def _read_chats(args: argparse.Namespace) -> list[Messages]:
    """Returns the chats of --prompt or --messages, with the prompt of --system."""
    if args.messages is not None:
        chats = [read_messages(args.messages)]
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    return [with_system(chat, args.system) for chat in chats]


def _lengths(task: Task) -> tuple[int, int]:
    config = task.config
    return config.gen_length, config.block_length or config.gen_length


def longest_task(tasks: Sequence[Task], prompts: Sequence[str]) -> Task | None:
    """Returns the task of the prompts, the longest one of several.

    Args:
        tasks: the only tasks that the model was trained for.
        prompts: the prompts. Without one of these tasks, all tasks count.
    """
    known = [t for t in tasks if any(t.respell(prompt) is not None for prompt in prompts)]
    return max(known or tasks, key=_lengths, default=None)


def decode_lengths(
    task: Task | None, gen_length: int | None, block_length: int | None
) -> tuple[int, int | None]:
    """Fills in the default lengths of a model.

    A model that was trained for one task has those of the task. A response that is shorter than
    their block is one block.

    Args:
        task: the task of the prompts, if the model was trained for it alone, or None.
        gen_length: N as given by the user, or None.
        block_length: positions of a block as given by the user, or None.

    Returns:
        (N, positions of a block). The second is None for the default of the model's family.
    """
    if task is None:
        return GEN_LENGTH if gen_length is None else gen_length, block_length
    config = task.config
    length = config.gen_length if gen_length is None else gen_length
    own = config.block_length
    if block_length is None and own is not None and length >= own:
        block_length = own
    return length, block_length


def foreign_note(tasks: Sequence[Task], prompt: str) -> str | None:
    """Returns a note on a prompt that the model does not know.

    Args:
        tasks: the only tasks that the model was trained for, or none.
        prompt: the prompt.
    """
    spellings = [spelling for task in tasks if (spelling := task.respell(prompt)) is not None]
    if not tasks or prompt in spellings:
        return None
    if spellings:
        return f"the model knows this request in another spelling, so write it as {spellings[0]!r}"
    names = " and ".join(task.name for task in tasks)
    return (
        f"the model was trained on requests of {names} alone, and this prompt is none, so its "
        f"answer means nothing. A request that works is {tasks[0].example!r}"
    )


def chat_note(tasks: Sequence[Task], chat: Messages) -> str | None:
    """Returns a note on a chat that the model does not know.

    Args:
        tasks: the only tasks that the model was trained for, or none. Their requests are one
            message each.
        chat: the chat.
    """
    if tasks and len(chat) > 1:
        return (
            "the model was trained on single requests alone, so a system prompt or earlier "
            "messages mislead it"
        )
    return foreign_note(tasks, chat[-1]["content"])


def _judge(
    chats: Sequence[Messages], out: Generation, notes: Sequence[str | None]
) -> list[_Answer]:
    """Judges the answers to prompts of a task of the library."""
    assert out.texts is not None  # the model has a tokenizer
    verdicts = judge_prompts([chat[-1]["content"] for chat in chats], out.texts)
    passes = map(int, out.forward_passes)
    rows = zip(chats, out.texts, passes, verdicts, notes, strict=True)
    return [_Answer(*parts) for parts in rows]


def _traced(label: str, out: Generation, answer: _Answer, length: int) -> TracedDecode:
    """Describes a decode for the page of --trace."""
    assert out.trace is not None
    facts = {
        "forward passes": f"{answer.forward_passes} for {length} tokens",
        "verdict": verdict_sentence(answer.verdict),
    }
    return TracedDecode(label, out.trace, 0, facts)


def _print_json(answers: Sequence[_Answer], about: dict[str, object], seed: int) -> None:
    for answer in answers:
        fields = {"prompt": answer.prompt, "text": answer.text, **about}
        fields |= {"forward_passes": answer.forward_passes, "seed": seed, **answer.verdict}
        fields["note"] = answer.note
        if len(answer.chat) > 1:
            fields["messages"] = answer.chat
        print(json.dumps(fields))


def _print_text(answers: Sequence[_Answer], label: str, length: int) -> None:
    for i, answer in enumerate(answers):
        heading = f"# {answer.prompt}\n" if len(answers) > 1 else ""
        print_text(("\n" if i else "") + heading + answer.text)
        print_text(f"\n[{verdict_sentence(answer.verdict)}]")
        print_text(f"[{label}, {answer.forward_passes} forward passes for {length} tokens]")
