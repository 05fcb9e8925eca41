"""Arguments of `xflow generate`."""

from __future__ import annotations

import argparse

from xflow_jax.cli.arguments import (
    MODEL,
    RULE,
    add_block_length_argument,
    add_cache_arguments,
    add_device_arguments,
    add_number,
)
from xflow_jax.errors import UserError
from xflow_jax.tasks import microcode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow generate`."""
    parser.epilog = f'Start with: xflow generate --model tiny --prompt "{microcode.TASK.example}"'
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="a prompt (repeat the option for several)",
    )
    parser.add_argument(
        "--rule", default="mask", metavar="RULE", help=RULE + " (default: %(default)s)"
    )
    add_number(parser, "--gen-length", "tokens of a response (default: 128, or 48 with tiny)")
    add_block_length_argument(parser)
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--budget",
        metavar="B",
        help="share of the full number of steps, like 1/4 or 0.25 (default: 1)",
    )
    add_number(steps, "--steps", "forward passes for the whole response, instead of a budget")
    add_cache_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each prompt")
    parser.add_argument(
        "--trace",
        metavar="FILE.html",
        help="write a page that shows every step of the decode (one prompt only)",
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answers the prompts."""
    if args.trace is not None and len(args.prompt) > 1:
        raise UserError("--trace shows one decode, so give --prompt once")
    if any(not prompt.strip() for prompt in args.prompt):
        raise UserError("a prompt is empty: write a text for the model to answer")
    # Imported here because the help and a wrong option must not wait for JAX.
    from xflow_jax.cli.generate_run import answer_prompts

    answer_prompts(args)
