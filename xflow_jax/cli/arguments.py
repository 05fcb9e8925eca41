"""Argument parser with one-sentence errors, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

MODEL = (
    "directory of a model (Hugging Face format or converted), its name on the hub, or tiny, "
    "the bundled one"
)
RULE = (
    "flow, mask, threshold, factor, eb, klass, softmask or edit, with options like flow:power=4 or "
    "mask:order=entropy,temperature=0.5"
)


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses like parse_args, and suggests the nearest option for an unknown one."""
        args, rest = self.parse_known_args(argv)
        if rest:
            parser = args.parser
            known = [option for action in parser._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            parser.error(f"unknown argument {rest[0]!r}{hint}")
        return args


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, --mesh and --seed."""
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help="float32 or bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--mesh",
        metavar="D,F,T",
        help="sizes of data, fsdp and tensor, like 1,8,1 (default: all devices on fsdp)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of rules that draw (default: %(default)s)"
    )


def add_refresh_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --refresh."""
    parser.add_argument(
        "--refresh",
        type=int,
        default=0,
        metavar="R",
        help="LLaDA: compute the prompt's keys and values only every R steps of a block, "
        "an approximation (default: in every step)",
    )
