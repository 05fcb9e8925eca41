"""The command `xflow bench-serve`: a server under load."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time

from xflow_jax.cli.arguments import MODEL, RULE, add_number, require_positive, seed_number
from xflow_jax.cli.process import print_text
from xflow_jax.errors import UserError, require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow bench-serve`."""
    parser.epilog = "Start with: xflow bench-serve --model tiny"
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="address of a running server, without /v1")
    where.add_argument(
        "--model",
        metavar="DIR",
        help="answer in this process, by the engine and in static batches in turn, instead of "
        f"over HTTP: {MODEL}",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second on average, at random times (default: 1, and with --model all at "
        "once)",
    )
    add_number(parser, "--requests", "number of requests of the task microcode", 50)
    parser.add_argument("--rule", help=f"rule of each request: {RULE}")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="random seed")
    http = parser.add_argument_group("over HTTP")
    http.add_argument(
        "--disconnects",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the clients that leave after the first text (default: %(default)s)",
    )
    add_number(http, "--max-tokens", "most tokens of an answer")
    http.add_argument("--api-key", default="none", metavar="KEY", help="key of the server")
    here = parser.add_argument_group("with --model")
    add_number(here, "--slots", "rows of a batch", 8)
    add_number(here, "--rounds", "alternating rounds", 2)


def run(args: argparse.Namespace) -> None:
    """Measures, and prints figures as JSON.

    Args:
        args: the arguments of `xflow bench-serve`.

    Raises:
        UserError: for bad input.
    """
    require_positive(args, "requests", "slots", "rounds", "max_tokens")
    rate, share = args.rate, args.disconnects
    require(rate is None or 0 < rate < math.inf, f"--rate must be above 0, not {rate}")
    require(0 <= share <= 1, f"--disconnects must be from 0 to 1, not {share}")
    try:
        _run_over_http(args) if args.model is None else _run_here(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xflow_jax"):
            raise
        raise UserError(
            f"xflow bench-serve needs the package {error.name}: pip install {error.name}"
        ) from None


def _run_over_http(args: argparse.Namespace) -> None:
    """Sends requests to a server."""
    from xflow_jax.serving import Load, run_load, summarize

    load = Load(
        args.url.rstrip("/"),
        1.0 if args.rate is None else args.rate,
        args.requests,
        args.disconnects,
        args.max_tokens,
        args.rule,
        args.seed,
        args.api_key,
    )
    began = time.perf_counter()
    outcomes = asyncio.run(run_load(load))
    print_text(json.dumps(summarize(outcomes, time.perf_counter() - began), indent=1))


def _run_here(args: argparse.Namespace) -> None:
    """Compares the engine with static batches."""
    from xflow_jax.decoding import parse_rule
    from xflow_jax.lm import load
    from xflow_jax.serving import (
        Lengths,
        arrival_times,
        make_prompts,
        run_continuous,
        run_static,
        summarize,
    )
    from xflow_jax.tasks import microcode
    from xflow_jax.tokenizer import chat_ids

    lm = load(args.model)
    require(lm.tokenizer is not None, f"{args.model} has no tokenizer.json")
    assert lm.tokenizer is not None
    rule = parse_rule(args.rule or "threshold")[1]
    prompts = [chat_ids(lm.tokenizer, p) for p in make_prompts(args.requests, args.seed)]
    task, longest = microcode.TASK.config, -(-max(map(len, prompts)) // 16) * 16
    lengths = Lengths((task.gen_length,), (longest,), task.block_length, args.slots)
    times = arrival_times(args.requests, args.rate or math.inf, args.seed)
    for _ in range(args.rounds):
        for name, answer in (("static", run_static), ("continuous", run_continuous)):
            began = time.process_time()
            outcomes = answer(lm, rule, prompts, lengths, times)
            processor = {"processor_seconds": round(time.process_time() - began, 2)}
            ends = [at + outcome.seconds for at, outcome in zip(times, outcomes, strict=True)]
            print_text(json.dumps({name: summarize(outcomes, max(ends)) | processor}))
