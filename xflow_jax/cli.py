"""The command xflow. What a command needs is imported when it runs, so that help and mistakes come at once."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from xflow_jax.strict import UserError

MODEL = "directory of a model (Hugging Face format or converted), its name on the hub, or tiny, the bundled one"
RULE = (
    "flow, mask, threshold, factor, eb, klass, softmask or edit, with options like flow:power=4 or "
    "mask:order=entropy,temperature=0.5"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """As parse_args, but an unknown option is answered with the nearest one."""
        args, rest = self.parse_known_args(argv)
        if rest:
            parser = args.parser
            known = [option for action in parser._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1, cutoff=0.5)
            parser.error(f"unknown argument {rest[0]!r}" + (f", did you mean {near[0]}?" if near else ""))
        return args


def build_parser(command: str | None = None) -> Parser:
    """The parser of all commands; of those whose arguments live elsewhere, only `command`'s are filled in."""
    parser = Parser(
        prog="xflow",
        description="Flow decoding of masked diffusion language models (LLaDA, LLaDA2.0) in JAX.",
        epilog="Start with: xflow demo",
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def add(name: str, help_: str) -> Parser:
        sub = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False)
        sub.set_defaults(parser=sub, run=name)
        return sub

    _demo(add("demo", "the bundled model end to end: convert, load, decode, run its answers, draw"))
    _generate(add("generate", "answers to prompts"))
    _evaluate(add("evaluate", "accuracy of rules at budgets on a task"))
    elsewhere = {
        "bench": "tokens per second and where the time goes",
        "plan": "memory, time and links of a program on a TPU slice, from its compiler; exits with 1 if too large",
    }
    for name, help_ in elsewhere.items():
        sub = add(name, help_)
        if command == name:
            importlib.import_module(f"xflow_jax.{name}").add_arguments(sub)
    return parser


def _demo(parser: Parser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where the files go (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=48, metavar="N", help="held-out problems (default: %(default)s)")


def _device_arguments(parser: Parser) -> None:
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--mesh", metavar="D,F,T", help="sizes of data, fsdp and tensor, like 1,8,1 (default: all devices on fsdp)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of rules that draw (default: %(default)s)")


def _refresh_argument(parser: Parser) -> None:
    parser.add_argument(
        "--refresh",
        type=int,
        default=0,
        metavar="R",
        help="LLaDA: read the prompt's keys and values anew every R steps of a block only, an approximation "
        "(default: in every step)",
    )


def _generate(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--rule", default="mask", metavar="RULE", help=RULE + " (default: %(default)s)")
    parser.add_argument("--gen-length", type=int, metavar="N", help="response tokens (default: 128; 48 with tiny)")
    parser.add_argument("--block-length", type=int, metavar="N", help="of blocks (default: as the model was made for)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--budget", metavar="B", help="share of the full number of steps, like 1/4 or 0.25 (default: 1)")
    steps.add_argument("--steps", type=int, metavar="N", help="forward passes for the whole response, instead")
    _refresh_argument(parser)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    parser.add_argument("--trace", metavar="FILE.html", help="write a page that shows every step of the one prompt")
    _device_arguments(parser)


def _evaluate(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help=MODEL)
    source.add_argument("--canonical", action="store_true", help="score the task's own reference answers")
    source.add_argument("--answers", metavar="FILE", help="score answers made elsewhere: jsonl, task_id and completion")
    parser.add_argument(
        "--task", required=True, metavar="TASK", help="microcode, humaneval or mbpp; likelihood, of given responses"
    )
    parser.add_argument("--rules", default="mask,threshold,flow", metavar="RULES", help="separated by commas: " + RULE)
    parser.add_argument("--budgets", default="1,1/2,1/4,1/8", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--ablate", action="store_true", help="the first flow of RULES without each of its parts, too")
    parser.add_argument(
        "--base", metavar="DIR", help="with --ablate: the model before its alignment (default: tiny-base with tiny)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to each problem, where a rule draws (default: 1)"
    )
    parser.add_argument("--k", type=int, default=1, metavar="K", help="pass@K beside pass@1 (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first problems")
    parser.add_argument("--out", metavar="DIR", help="keep every answer here; the same command again continues")
    parser.add_argument("--data", metavar="FILE", help="the task's public jsonl or jsonl.gz (default: from the hub)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    _refresh_argument(parser)
    _device_arguments(parser)


# command -> the module of the library that has its function `run`
_RUN = {"demo": "demo", "generate": "answer", "evaluate": "evaluate", "bench": "bench", "plan": "plan"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: the command's own, else 0, 2 for a mistake of the user, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(argv[0] if argv else None)
        args = parser.parse_all(argv)
        if args.run is None:
            parser.print_help()
            return 0
        hosts = importlib.import_module("xflow_jax.hosts")
        hosts.join_hosts()
        hosts.keep_programs()
        status = importlib.import_module(f"xflow_jax.{_RUN[args.run]}").run(args)
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
