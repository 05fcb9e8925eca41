"""The command `xflow`: finds the subcommand, parses its arguments, runs it.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args)`.
It is imported only if it is the one that runs, so that `xflow --help` starts at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from xflow_jax.cli.arguments import Parser
from xflow_jax.errors import UserError

COMMANDS = {
    "demo": "the bundled model end to end: convert, load, decode, run its answers, draw",
    "generate": "answers to prompts",
    "evaluate": "accuracy of rules at budgets on a task",
    "bench": "tokens per second and where the time goes",
    "plan": "memory, time and links of a program on a TPU slice, from its compiler; "
    "exits with 1 if too large",
}


def build_parser(command: str | None = None) -> Parser:
    """Builds the parser of all commands, with the arguments of `command` alone filled in."""
    parser = Parser(
        prog="xflow",
        description="Flow decoding of masked diffusion language models (LLaDA, LLaDA2.0) in JAX.",
        epilog="Start with: xflow demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xflow-jax {version()}")
    parser.set_defaults(parser=parser, command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, help_ in COMMANDS.items():
        description = help_[0].upper() + help_[1:] + "."
        sub = commands.add_parser(name, help=help_, description=description, allow_abbrev=False)
        sub.set_defaults(parser=sub, command=name)
        if name == command:
            importlib.import_module(f"xflow_jax.cli.{name}").add_arguments(sub)
    return parser


def version() -> str:
    """Returns the installed version of the package, or "unknown" in a bare checkout."""
    try:
        return importlib.metadata.version("xflow-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words after `xflow`, or None for those of this process.

    Returns:
        The exit status: the command's own or 0, 2 for a user's mistake, 130 if interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(argv[0] if argv else None)
        args = parser.parse_all(argv)
        if args.command is None:
            parser.print_help()
            return 0
        multihost = importlib.import_module("xflow_jax.parallel.multihost")
        multihost.initialize_processes()
        multihost.enable_compilation_cache()
        status = importlib.import_module(f"xflow_jax.cli.{args.command}").run(args)
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
