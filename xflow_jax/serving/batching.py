"""Continuous batching beside static batches, in one process and without HTTP.

Both answer the same requests, which arrive at the same times. A static batch takes what has arrived
once the batch before it has ended, and all its answers are there at its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from xflow_jax.decoding import Rule, generate
from xflow_jax.lm import LM
from xflow_jax.serving.engine import Engine, EngineOptions
from xflow_jax.serving.lanes import Lengths, request_config
from xflow_jax.serving.load import Outcome
from xflow_jax.serving.ticket import Ticket


def run_static(
    lm: LM, rule: Rule, prompts: Sequence[list[int]], lengths: Lengths, times: Sequence[float]
) -> list[Outcome]:
    """Answers prompts in batches of `lengths.slots` rows with `generate`.

    Args:
        lm: the model.
        rule: the rule.
        prompts: token ids.
        lengths: canvas, block and rows of a batch.
        times: seconds from the start at which each request arrives, ascending.

    Returns:
        An outcome for each, whose passes are those of its batch. Compilation takes none of its
        seconds.
    """
    n, slots = lengths.gen_lengths[0], lengths.slots

    def decode(rows: list[list[int]]) -> tuple[np.ndarray, int]:
        full = [*rows, *rows[:1] * (slots - len(rows))]
        out = generate(lm, full, rule, n, n, block_length=lengths.block_length, eos_early_stop=True)
        return out.tokens[: len(rows)], int(out.forward_passes.max())

    for size in sorted({-(-len(prompt) // 16) for prompt in prompts}):  # all shapes of a batch
        decode([next(prompt for prompt in prompts if -(-len(prompt) // 16) == size)])
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    while (first := len(outcomes)) < len(prompts):
        now = time.perf_counter() - began
        if times[first] > now:
            time.sleep(times[first] - now)
        arrived = int(np.searchsorted(times, time.perf_counter() - began, side="right"))
        batch = slice(first, min(max(arrived, first + 1), first + slots))
        tokens, passes = decode(list(prompts[batch]))
        end = time.perf_counter() - began
        sizes = np.sum(np.cumsum(np.isin(tokens, lm.config.stop_ids), axis=1) == 0, axis=1)
        for arrival, size in zip(times[batch], sizes, strict=True):
            outcomes.append(Outcome(end - arrival, end - arrival, int(size), passes, "ok"))
    return outcomes


def run_continuous(
    lm: LM, rule: Rule, prompts: Sequence[list[int]], lengths: Lengths, times: Sequence[float]
) -> list[Outcome]:
    """Answers prompts with an engine. Arguments and result are those of `run_static`."""
    engine = Engine(lm, {"rule": rule}, lengths, EngineOptions(max_queue=len(prompts)))
    engine.start()
    kind, n = engine.kinds[0], lengths.gen_lengths[0]
    config = request_config(lm, rule, lengths, n)
    tickets: list[Ticket] = []
    began = time.perf_counter()
    for prompt, arrival in zip(prompts, times, strict=True):
        if (wait := began + arrival - time.perf_counter()) > 0:
            time.sleep(wait)
        tickets.append(Ticket(prompt, "rule", kind, rule, config, n))
        engine.submit(tickets[-1:])
    engine.drain(float("inf"))
    engine.stop()
    return [_outcome(ticket) for ticket in tickets]


def _outcome(ticket: Ticket) -> Outcome:
    assert ticket.ended is not None and ticket.state is not None and ticket.error is None
    first = None if ticket.settled is None else ticket.settled - ticket.created
    return Outcome(ticket.ended - ticket.created, first, ticket.end, ticket.state.passes, "ok")
