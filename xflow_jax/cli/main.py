"""The command `xflow`: finds the subcommand, parses its arguments, runs it.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args)`. The module is
imported only for its own command, and `xflow --help` imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType

from xflow_jax.cli.arguments import Parser, did_you_mean
from xflow_jax.cli.process import run_process
from xflow_jax.errors import describe

COMMANDS = {
    "demo": "decode with the bundled model, run its answers, and draw the results",
    "generate": "answer prompts",
    "chat": "chat with a model in the terminal",
    "evaluate": "measure the accuracy of rules and budgets on a task",
    "bench": "measure tokens per second, and the time of each part of a step",
    "bench-device": "measure one GPU or TPU: its rates, decodes, attention, training",
    "serve": "serve a model over HTTP, with OpenAI's API and a page",
    "bench-serve": "measure a server under load, or its batches beside those of generate",
    "plan": "compute the memory and the speed of a program on TPU slices or GPUs",
}


def build_parser(command: str | None = None) -> Parser:
    """Builds the parser of all commands.

    Only `command` gets its arguments, since they need its module.
    """
    parser = Parser(
        prog="xflow",
        description="Flow decoding of masked diffusion language models in JAX: LLaDA, LLaDA2, Dream"
        ", SDAR and others.",
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
            _command_module(name).add_arguments(sub)
    return parser


def _command_module(name: str) -> ModuleType:
    return importlib.import_module(f"xflow_jax.cli.{name.replace('-', '_')}")


def version() -> str:
    """Returns the installed version, or "unknown" in a bare checkout."""
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
    argv = [_as_utf8(word) for word in (sys.argv[1:] if argv is None else argv)]
    return run_process(partial(_run, argv), needs_output=True)


def _as_utf8(word: str) -> str:
    """Decodes a word of the command line as UTF-8, whatever the locale."""
    try:
        return word.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return word


def _run(argv: Sequence[str]) -> int | None:
    """Parses the arguments and runs their command."""
    command = argv[0] if argv else None
    parser = build_parser(command)
    if command and not command.startswith("-") and command not in COMMANDS:
        hint = did_you_mean(command, list(COMMANDS)) or f". There are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {describe(command)}{hint}")
    args = parser.parse_all(argv)
    if args.command is None:
        parser.print_help()
        return 0
    multihost = importlib.import_module("xflow_jax.parallel.multihost")
    multihost.configure_process()
    return _command_module(args.command).run(args)
