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
    add_profile_argument,
    check_output_file,
)
from xflow_jax.errors import UserError, describe, require
from xflow_jax.input_files import to_path
from xflow_jax.tasks import microcode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow generate`."""
    parser.epilog = f'Start with: xflow generate --model tiny --prompt "{microcode.TASK.example}"'
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt (repeat the option for several)",
    )
    prompts.add_argument(
        "--messages",
        metavar="FILE",
        help='a chat to continue: JSON with a list of {"role": ..., "content": ...}, or jsonl with '
        "one message a line",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, before each prompt")
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
    parser.add_argument(
        "--beside",
        metavar="RULE",
        help="decode with this rule as well, and show both decodes side by side on the page of "
        "--trace",
    )
    add_profile_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answers the prompts."""
    if args.trace is not None and len(args.prompt or ()) > 1:
        raise UserError("--trace shows one decode, so give --prompt once")
    require(
        args.beside is None or args.trace is not None,
        "--beside is for the page of --trace, so give --trace FILE.html too",
    )
    for prompt in args.prompt or ():
        check_prompt(prompt)
    if args.system is not None:
        check_prompt(args.system, "the system prompt")
    # Zero would read as "not given" further on.
    require(args.block_length != 0, "block_length must be a whole number of at least 1, not 0")
    if args.trace is not None:
        page = to_path(args.trace)
        require(
            page.suffix in (".html", ".htm"), f"--trace writes a page: {page} must end in .html"
        )
        check_output_file(page)
    # Imported here because the help and a wrong option must not wait for JAX.
    from xflow_jax.cli.generate_run import answer_prompts

    answer_prompts(args)


def check_prompt(prompt: str, name: str = "a prompt") -> None:
    """Raises UserError for a prompt that is empty or no text."""
    require(bool(prompt.strip()), f"{name} is empty: write a text for the model to answer")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        raise UserError(f"the prompt {describe(prompt)} is not valid text") from None
