"""Tokens a second of the engine beside `generate`, in equal batches.

    python -m xflow_jax.serving.throughput --model tiny --rule threshold --slots 8 --requests 200

Both answer the same requests of the microcode task in this process, without HTTP. `generate` takes
them in batches of as many rows as the engine has slots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from xflow_jax.decoding import Rule, generate, parse_rules
from xflow_jax.errors import UserError, require
from xflow_jax.lm import LM, load
from xflow_jax.serving.engine import Engine, EngineOptions
from xflow_jax.serving.lanes import Lengths, request_config
from xflow_jax.serving.load import make_prompts
from xflow_jax.serving.ticket import Ticket
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids


def run_generate(
    lm: LM, rule: Rule, prompts: list[list[int]], lengths: Lengths
) -> dict[str, float]:
    """Answers prompts in batches with `generate`.

    Args:
        lm: the model.
        rule: the rule.
        prompts: token ids.
        lengths: canvas, block and batch.

    Returns:
        Figures of the run, without compilation.
    """
    n, slots = lengths.gen_lengths[0], lengths.slots
    # The longest prompt comes first in each batch, so that all batches have one shape.
    longest = max(prompts, key=len)
    began, tokens, passes = 0.0, 0, 0
    for first in range(-slots, len(prompts), slots):
        batch = prompts[max(first, 0) : max(first, 0) + slots]
        batch = [longest, *batch[1:], *[longest] * (slots - len(batch))]
        if first == 0:
            began = time.perf_counter()
        out = generate(lm, batch, rule, n, n, block_length=lengths.block_length)
        if first >= 0:
            tokens += _count(out.tokens, lm.config.stop_ids)
            passes += int(out.forward_passes.max())
    return _figures(tokens, passes, len(prompts), time.perf_counter() - began)


def run_engine(lm: LM, rule: Rule, prompts: list[list[int]], lengths: Lengths) -> dict[str, float]:
    """Answers prompts with an engine whose queue holds them all.

    Arguments and result are those of `run_generate`.
    """
    engine = Engine(lm, {"rule": rule}, lengths, EngineOptions(max_queue=len(prompts)))
    engine.start()
    config = request_config(lm, rule, lengths, lengths.gen_lengths[0])
    kind, n = engine.kinds[0], lengths.gen_lengths[0]
    tickets = [Ticket(prompt, "rule", kind, rule, config, n) for prompt in prompts]
    began = time.perf_counter()
    engine.submit(tickets)
    engine.drain(1e9)
    seconds = time.perf_counter() - began
    engine.stop()
    states = [ticket.state for ticket in tickets if ticket.state is not None]
    tokens = sum(ticket.end for ticket in tickets)
    return _figures(tokens, sum(state.passes for state in states), len(prompts), seconds)


def _count(tokens: np.ndarray, stop_ids: Sequence[int]) -> int:
    """Counts the tokens before the end of each row."""
    return int(np.sum(np.cumsum(np.isin(tokens, stop_ids), axis=1) == 0))


def _figures(tokens: int, passes: int, requests: int, seconds: float) -> dict[str, float]:
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(requests / seconds, 2),
        "tokens": tokens,
        "passes": passes,
        "seconds": round(seconds, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures both, and prints the figures.

    Args:
        argv: the arguments, or None for those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Measures the engine beside generate.")
    parser.add_argument("--model", default="tiny", help="as for xflow generate")
    parser.add_argument("--rule", default="threshold", help="as for xflow generate")
    parser.add_argument("--slots", type=int, default=8, help="rows of a batch")
    parser.add_argument("--requests", type=int, default=200, help="number of requests")
    parser.add_argument("--rounds", type=int, default=2, help="alternating rounds")
    args = parser.parse_args(argv)
    try:
        require(min(args.slots, args.requests, args.rounds) >= 1, "numbers must be at least 1")
        lm = load(args.model)
        require(lm.tokenizer is not None, f"{args.model} has no tokenizer.json")
        assert lm.tokenizer is not None
        ((_, rule),) = parse_rules(args.rule).items()
        prompts = [chat_ids(lm.tokenizer, p) for p in make_prompts(args.requests)]
        task, longest = microcode.TASK.config, -(-max(map(len, prompts)) // 16) * 16
        lengths = Lengths((task.gen_length,), (longest,), task.block_length, args.slots)
        for _ in range(args.rounds):
            for name, run in (("generate", run_generate), ("engine", run_engine)):
                print(json.dumps({name: run(lm, rule, prompts, lengths)}), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
