"""Arguments of `xflow evaluate`."""

from __future__ import annotations

import argparse

from xflow_jax.cli.arguments import (
    MODEL,
    RULE,
    add_cache_arguments,
    add_device_arguments,
    add_number,
    require_positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow evaluate`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help=MODEL)
    source.add_argument(
        "--canonical", action="store_true", help="score the task's own reference answers"
    )
    source.add_argument(
        "--answers",
        metavar="FILE",
        help="score answers from a jsonl file with task_id and completion",
    )
    parser.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="microcode, microcode-long, latin-square, humaneval or mbpp, or likelihood for the "
        "likelihood of given responses",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="the problems as jsonl or jsonl.gz (default: those of the task), or for likelihood "
        "jsonl with prompt and response",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the protocol of the task, like extraction=first-fence, body_only=true or "
        "limits.seconds=3 (repeat the option for several)",
    )
    add_number(parser, "--limit", "use only the first N problems")
    parser.add_argument(
        "--rules",
        default="mask,threshold,flow",
        metavar="RULES",
        help="rules, separated by commas: " + RULE + " (default: %(default)s)",
    )
    parser.add_argument(
        "--budgets",
        default="1,1/2,1/4,1/8",
        metavar="LIST",
        help="shares of the full number of steps (default: %(default)s)",
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="also evaluate the first flow of RULES without each of its parts",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="with --ablate, the model before its alignment (default: tiny-base for tiny models)",
    )
    add_number(
        parser,
        "--samples",
        "answers to each problem, for rules that draw (default: 1), or masks of each response for "
        "likelihood (default: 128)",
    )
    add_number(parser, "--k", "also compute pass@K", 1, metavar="K")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for every answer, the tables and the plot. The same command continues there",
    )
    parser.add_argument(
        "--shard",
        default="",
        metavar="I/N",
        help="answer only every N-th batch, from the I-th on, for independent workers with one "
        "--out. auto reads I and N from Slurm or Kubernetes, merge makes the tables of all",
    )
    add_number(parser, "--batch-size", "problems that are decoded together", 64)
    add_cache_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates a model, or answers from elsewhere."""
    require_positive(args, "limit")
    # Imported here because the help and a wrong option must not wait for JAX.
    if args.task == "likelihood":
        from xflow_jax.cli.likelihood import print_likelihood

        print_likelihood(args)
    else:
        from xflow_jax.cli.evaluate_run import evaluate_task

        args.samples = 1 if args.samples is None else args.samples
        evaluate_task(args)
