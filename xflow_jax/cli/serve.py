"""Arguments of `xflow serve`."""

from __future__ import annotations

import argparse
import os

from xflow_jax.cli.arguments import (
    MODEL,
    RULE,
    add_block_length_argument,
    add_cache_arguments,
    add_dtype_argument,
    add_mask_argument,
    add_mesh_argument,
    add_number,
    require_positive,
    whole_number,
)
from xflow_jax.errors import UserError, describe, require

AUTO = "auto"
KEY = "XFLOW_API_KEY"
MOST_PORT = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow serve`."""
    parser.epilog = "Start with: xflow serve --model tiny"
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    add_number(parser, "--port", "port to listen at, 0 for any free one", 8000, "PORT")
    parser.add_argument(
        "--rules",
        default="flow",
        metavar="LIST",
        help="rules with commas between them, the default first, each of which is compiled: "
        f"{RULE} (default: %(default)s)",
    )
    parser.add_argument(
        "--gen-lengths",
        type=_lengths,
        metavar="LIST",
        help="largest canvases, each of which is compiled (default: those of 64,256,512 that the "
        "model has room for, or that of its task)",
    )
    parser.add_argument(
        "--prompt-lengths",
        type=_lengths,
        metavar="LIST",
        help="longest prompts, each of which is compiled (default: those of 128,512,1024 that the "
        "model has room for)",
    )
    add_block_length_argument(parser)
    _add_limits(parser)
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send (default: the variable {KEY}, or none)",
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="name of the model (default: that of --model)"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="origin of another page that may call the API (repeat the option for several)",
    )
    parser.add_argument("--no-page", action="store_true", help="serve no page at /")
    add_dtype_argument(parser)
    add_mask_argument(parser)
    add_mesh_argument(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes and times of the engine."""
    for option, help_ in (
        ("--slots", "requests that are decoded together in a lane (default: 8 on CPUs, else 32)"),
        ("--steps-per-call", "passes of a call, 1 to 8 (default: as many as take about 50 ms)"),
    ):
        parser.add_argument(option, type=_auto_number, metavar="N", help=help_)
    add_cache_arguments(parser)
    add_number(parser, "--max-queue", "requests that may wait for a slot", 256)
    add_number(parser, "--request-timeout", "seconds of a request", 300, "S")
    add_number(parser, "--drain", "seconds for requests under way after SIGTERM", 30, "S")


def _auto_number(text: str) -> int | None:
    return None if text == AUTO else whole_number(text)


def _lengths(text: str) -> list[int]:
    """Parses whole numbers with commas between them."""
    numbers = [whole_number(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be lengths of at least 1, not {describe(text)}")
    return numbers


def run(args: argparse.Namespace) -> int:
    """Serves until a signal."""
    require_positive(args, "slots", "steps_per_call", "max_queue", "request_timeout", "drain")
    require(0 <= args.port <= MOST_PORT, f"--port must be from 0 to {MOST_PORT}, not {args.port}")
    require(
        args.steps_per_call is None or args.steps_per_call <= 8,
        f"--steps-per-call must be from 1 to 8, not {args.steps_per_call}",
    )
    require(args.block_length != 0, "block_length must be a whole number of at least 1, not 0")
    args.cache = None if args.cache == AUTO else args.cache
    args.api_key = args.api_key or os.environ.get(KEY) or None
    try:
        # Imported here because the help and a wrong option must not wait for JAX.
        from xflow_jax.cli.serve_run import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xflow_jax"):
            raise
        raise UserError(
            f"xflow serve needs the package {error.name}: pip install 'xflow-jax[serve]'"
        ) from None
    return serve(args)
