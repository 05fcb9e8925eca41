"""Arguments of `xflow chat`."""

from __future__ import annotations

import argparse

from xflow_jax.cli.arguments import (
    MODEL,
    RULE,
    add_block_length_argument,
    add_device_arguments,
    add_number,
)
from xflow_jax.cli.generate import check_prompt
from xflow_jax.errors import require
from xflow_jax.tasks import microcode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow chat`."""
    parser.epilog = (
        "Start with: xflow chat --model tiny, and the request "
        f'"{microcode.TASK.example}". In the chat, /help lists the commands.'
    )
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    parser.add_argument(
        "--rule", default="flow", metavar="RULE", help=RULE + " (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        default="1/4",
        metavar="B",
        help="share of the full number of steps, like 1/4 or 0.25 (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    add_number(parser, "--gen-length", "tokens of a response (default: 128, or 48 with tiny)")
    add_block_length_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the chat."""
    if args.system is not None:
        check_prompt(args.system, "the system prompt")
    # Zero would read as "not given" further on.
    require(args.block_length != 0, "block_length must be a whole number of at least 1, not 0")
    # Imported here because the help and a wrong option must not wait for JAX.
    from xflow_jax.cli.chat_run import run_chat

    run_chat(args)
