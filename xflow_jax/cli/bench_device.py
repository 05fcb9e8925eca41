"""The command `xflow bench-device`: measures one accelerator and writes one JSON file."""

from __future__ import annotations

import argparse
import json
import sys

from xflow_jax.benchmarks import SECTIONS, SHAPES, Numbers, run_sections
from xflow_jax.checkpoints import refuse_existing, write_atomic
from xflow_jax.cli.arguments import add_dtype_argument, add_number, require_positive
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import to_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow bench-device`."""
    parser.add_argument("--json", required=True, metavar="FILE", help="new file for all numbers")
    parser.add_argument(
        "--shapes",
        choices=tuple(SHAPES),
        default="released",
        help="shapes of LLaDA-8B and LLaDA2.0-mini, or small ones for a trial on a CPU "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sections",
        default=",".join(SECTIONS),
        metavar="LIST",
        help="measurements, with commas between them (default: %(default)s)",
    )
    add_number(parser, "--minutes", "time after which no further measurement begins", 8)
    add_dtype_argument(parser, default="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Measures the device, and writes the file after each section.

    Args:
        args: the arguments of `xflow bench-device`.

    Raises:
        UserError: for bad input.
    """
    require_positive(args, "minutes")
    require(args.dtype != "int8", "--dtype is of all sections. int8 is a section of its own.")
    sections = args.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise UserError(
            f"--sections has {unknown[0]!r}, but it must be some of {', '.join(SECTIONS)}"
        )
    file = to_path(args.json)
    refuse_existing(file)

    def keep(numbers: Numbers) -> None:
        facts = {"shapes": args.shapes, "dtype": args.dtype}
        write_atomic(file, json.dumps(facts | numbers, indent=1) + "\n")

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    numbers = run_sections(
        SHAPES[args.shapes], 60.0 * args.minutes, sections, args.dtype, report, keep
    )
    print(json.dumps(numbers, indent=1))
