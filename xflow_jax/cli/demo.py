"""Arguments of `xflow demo`."""

from __future__ import annotations

import argparse

from xflow_jax.cli.arguments import add_number, require_positive
from xflow_jax.input_files import to_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow demo`."""
    parser.add_argument(
        "--out",
        default="runs/demo",
        metavar="DIR",
        help="folder for the table, the page and the plot (default: %(default)s)",
    )
    add_number(parser, "--limit", "number of held-out problems", 48)


def run(args: argparse.Namespace) -> None:
    """Runs the demonstration."""
    require_positive(args, "limit")
    # Imported here because the help and a wrong option must not wait for JAX.
    from xflow_jax.cli.demo_run import run_demo

    run_demo(to_path(args.out), args.limit)
