"""Argument parser with one-sentence errors, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xflow_jax.errors import UserError, check_seed, describe, disk_errors, require
from xflow_jax.input_files import is_cloud, object_exists

MODEL = (
    "tiny (the bundled model), a directory (Hugging Face format or converted), or a name on the hub"
)
RULE = (
    "flow, mask, threshold, factor, eb, klass, softmask, edit, dmax or mlfm, with options "
    "like flow:power=4 or mask:order=entropy,temperature=0.5, or a rule of your own "
    "from a Python file, like my_rule.py:MyRule(tau=0.3)"
)
ALL_DEVICES = "all devices on fsdp"
MOST_DIGITS = 15  # of a number on the command line


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        sentence = UserError(message)  # printable, and not too long
        self.exit(2, f"error: {sentence} (see {self.prog} --help)\n")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses like parse_args, and suggests the nearest option for an unknown one."""
        args, rest = self.parse_known_args(argv)
        if rest:
            parser = args.parser
            known = [option for action in parser._actions for option in action.option_strings]
            hint = did_you_mean(rest[0].partition("=")[0], known)
            parser.error(f"unknown argument {describe(rest[0])}{hint}")
        return args


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Returns ", did you mean X?" with the nearest name, or ""."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def whole_number(text: str) -> int:
    """Parses the value of an option.

    Raises:
        argparse.ArgumentTypeError: for anything but a whole number.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {describe(text)}") from None
    if abs(number) >= 10**MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"must have at most {MOST_DIGITS} digits, unlike {describe(text)}"
        )
    return number


def seed_number(text: str) -> int:
    """Parses the seed of random numbers.

    Raises:
        argparse.ArgumentTypeError: for anything but a seed (`check_seed`).
    """
    try:
        return check_seed(whole_number(text), "it")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_profile_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --profile."""
    parser.add_argument(
        "--profile",
        metavar="DIR[:CALLS]",
        help="trace further calls of the compiled decode with jax.profiler (3 without CALLS)",
    )


def check_output_file(path: Path) -> None:
    """Checks that a file can be written, before its content is made.

    Raises:
        UserError: if it cannot.
    """
    if is_cloud(path):
        with disk_errors(path):
            object_exists(path)  # fails without a bucket or without rights
        return
    require(
        not path.exists() or path.is_file(),
        f"{path} cannot be written: it is a folder, a pipe or a device",
    )
    with disk_errors(path):
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of these options is below 1."""
    for name in names:
        value = getattr(args, name)
        option = "--" + name.replace("_", "-")
        require(value is None or value >= 1, f"{option} must be at least 1, not {value}")


def add_number(
    parser: argparse._ActionsContainer,
    option: str,
    help_: str,
    default: int | None = None,
    metavar: str = "N",
) -> None:
    """Adds an option with a whole number and its default."""
    if default is not None:
        help_ += " (default: %(default)s)"
    parser.add_argument(option, type=whole_number, default=default, metavar=metavar, help=help_)


def add_dtype_argument(parser: argparse.ArgumentParser, default: str = "float32") -> None:
    """Adds --dtype."""
    parser.add_argument(
        "--dtype",
        default=default,
        metavar="TYPE",
        help="float32 or bfloat16, for parameters and computation, or int8 for the layers' "
        "matrices with bfloat16 for the rest (default: %(default)s)",
    )


def add_mask_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --mask-id."""
    add_number(
        parser,
        "--mask-id",
        "id of the mask token, for a model whose files do not name it",
        metavar="ID",
    )


def add_mesh_argument(parser: argparse.ArgumentParser, default: str = ALL_DEVICES) -> None:
    """Adds --mesh. The text `default` names the mesh without this option."""
    parser.add_argument(
        "--mesh",
        metavar="D,F,T",
        help=f"sizes of the mesh axes data, fsdp and tensor, like 1,8,1 (default: {default})",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, --mask-id, --mesh and --seed."""
    add_dtype_argument(parser)
    add_mask_argument(parser)
    add_mesh_argument(parser)
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        metavar="N",
        help="random seed, for rules that draw (default: %(default)s)",
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --cache, --refresh, --window and --prompt-every."""
    parser.add_argument(
        "--cache",
        metavar="CACHE",
        help="keys and values that steps share: none, exact (LLaDA2.0), or prompt, prefix or dual, "
        "which are approximations for models without an exact cache, like LLaDA (default: exact "
        "if possible)",
    )
    add_number(
        parser,
        "--refresh",
        "renew an approximate cache every R steps of a block, and without --cache keep the "
        "prompt's keys and values (default: in the first step of a block)",
        metavar="R",
    )
    add_number(
        parser,
        "--window",
        "positions on each side of the block that a step with the dual cache computes again",
        metavar="W",
    )
    add_number(
        parser,
        "--prompt-every",
        "read the prompt in the first step of every K-th block only",
        metavar="K",
    )
    parser.set_defaults(refresh=0, window=0, prompt_every=1)


def cache_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of decoding.CacheOptions."""
    names = ("cache", "refresh", "window", "prompt_every")
    return {name: getattr(args, name) for name in names}


def add_block_length_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --block-length."""
    add_number(parser, "--block-length", "tokens of a block (default: the model's own)")
