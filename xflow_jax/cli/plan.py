"""The command `xflow plan`: memory and speed of programs on given hardware.

TPU programs are compiled by the TPU compiler of the package libtpu (extra [plan]). No TPU is
needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from xflow_jax.checkpoints import write_atomic
from xflow_jax.cli.arguments import (
    add_block_length_argument,
    add_cache_arguments,
    add_mesh_argument,
    add_number,
    cache_arguments,
    check_output_file,
    require_positive,
)
from xflow_jax.decoding import CacheOptions
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import read_json, to_path
from xflow_jax.models import PRESETS
from xflow_jax.planning import (
    DEVICES,
    PROGRAMS,
    PlanRequest,
    PlanRow,
    markdown_page,
    parse_device,
    parse_topology,
    plan_rows,
    plan_table,
    row_sentence,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow plan`."""
    parser.epilog = "The exit status is 1 if a program does not fit."
    parser.add_argument(
        "--preset",
        required=True,
        metavar="LIST",
        help=f"models, separated by commas: {', '.join(PRESETS)}",
    )
    hardware = parser.add_mutually_exclusive_group(required=True)
    hardware.add_argument(
        "--topology",
        metavar="LIST",
        help="TPU slices to compile for, separated by commas, like v5p:4x4x4 or v5e-8",
    )
    hardware.add_argument(
        "--device",
        metavar="DEVICE",
        help="chips to plan for by arithmetic alone, like gpu:h200:8: " + ", ".join(DEVICES),
    )
    parser.add_argument(
        "--program",
        default="decode",
        metavar="LIST",
        help=f"programs, separated by commas: {', '.join(PROGRAMS)} (default: %(default)s)",
    )
    add_mesh_argument(parser, default="the fastest that fits")
    parser.add_argument(
        "--sweep", action="store_true", help="plan several meshes, by arithmetic the fastest first"
    )
    add_number(parser, "--most", "most meshes of a sweep", 8)
    parser.add_argument(
        "--batch",
        default="1",
        metavar="LIST",
        help="rows of a decode, separated by commas, or max for as many as fit "
        "(default: %(default)s)",
    )
    add_number(parser, "--train-batch", "rows of an align, an sft or a rollout", 64)
    add_number(parser, "--prompt-length", "tokens of a prompt", 128)
    add_number(parser, "--gen-length", "tokens of a response", 512)
    add_number(parser, "--steps", "forward passes of a decode (default: a quarter of the tokens)")
    add_block_length_argument(parser)
    add_cache_arguments(parser)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="TYPE",
        help="dtype of a decode's weights: bfloat16, or int8 for the layers' matrices "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the training's configuration (repeat the option for several)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="file for the rows. The same command continues there"
    )
    parser.add_argument("--hlo", metavar="DIR", help="folder for the text of compiled programs")
    parser.add_argument("--markdown", metavar="FILE", help="file for the table as a page")


def run(args: argparse.Namespace) -> int:
    """Plans the programs and prints a table.

    Args:
        args: the arguments of `xflow plan`.

    Returns:
        The exit status, 1 if a program does not fit.

    Raises:
        UserError: for bad input, or without the TPU compiler.
    """
    request = _request(args)
    if not request.device:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "the TPU compiler is missing. It comes with the extra [plan]: "
                'pip install "xflow-jax[plan]"'
            )
        # Nothing is run, so no accelerator is taken. A program that comes from the compilation
        # cache reports less about itself.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
    file = to_path(args.json) if args.json else None
    for name in filter(None, (args.json, args.markdown)):
        check_output_file(to_path(name))
    previous_rows = _read_rows(file) if file and file.exists() else []
    rows = []
    for row in plan_rows(request, previous_rows):
        rows.append(row)
        print(row_sentence(row), flush=True)
        if file:
            others = [r for r in previous_rows if r not in rows]
            write_atomic(file, json.dumps({"rows": rows + others}, indent=1) + "\n")
    print(plan_table(rows))
    if args.markdown:
        write_atomic(to_path(args.markdown), markdown_page(rows, request, _command(args)))
    return 0 if all(row["fits"] for row in rows) else 1


def _read_rows(file: Path) -> list[PlanRow]:
    """Reads the rows of an earlier call.

    Raises:
        UserError: if the file has another form.
    """
    value = read_json(file)
    rows = value.get("rows") if isinstance(value, dict) else None
    try:
        if not isinstance(rows, list):
            raise TypeError
        plan_table(rows)
        for row in rows:
            row_sentence(row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError):
        raise UserError(f"{file}: it holds no rows of xflow plan. Choose another file.") from None
    return rows


def _request(args: argparse.Namespace) -> PlanRequest:
    """Converts the arguments. Raises UserError for bad input."""
    presets = _names("preset", args.preset, list(PRESETS))
    programs = _names("program", args.program, PROGRAMS)
    batches = _batches(args.batch)
    require_positive(args, "most", "train_batch", "prompt_length", "gen_length", "steps")
    require(
        not args.set or bool({"align", "sft"} & set(programs)),
        "--set sets keys of a training, so it needs align or sft among the programs of --program",
    )
    require(
        args.dtype in ("bfloat16", "int8"),
        f"--dtype is {args.dtype!r}, but it must be bfloat16 or int8",
    )
    require(
        args.dtype == "bfloat16" or set(programs) == {"decode"},
        "--dtype int8 is for decode, and the other programs train in bfloat16",
    )
    topologies = tuple(args.topology.split(",")) if args.topology else ()
    for text in topologies:
        parse_topology(text)
    if args.device is not None:
        parse_device(args.device)
    return PlanRequest(
        presets=presets,
        topologies=topologies,
        device=args.device,
        programs=programs,
        batches=batches,
        train_batch=args.train_batch,
        mesh=args.mesh,
        sweep=args.sweep,
        max_meshes=args.most,
        prompt_length=args.prompt_length,
        gen_length=args.gen_length,
        steps=args.steps,
        overrides=tuple(args.set),
        hlo_folder=to_path(args.hlo) if args.hlo else None,
        block_length=args.block_length,
        cache=CacheOptions(**cache_arguments(args)),
        dtype=args.dtype,
    )


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Splits a list of names, and checks each."""
    names = tuple(text.split(","))
    for name in names:
        require(name in known, f"there is no {option} {name!r}. There are {', '.join(known)}.")
    return names


def _batches(text: str) -> tuple[int | Literal["max"], ...]:
    batches: list[int | Literal["max"]] = []
    for part in text.split(","):
        if part == "max":
            batches.append("max")
        else:
            require(
                re.fullmatch("[0-9]{1,9}", part) is not None and int(part) > 0,
                f"the batch {text!r} must be positive whole numbers or max, "
                "with commas between them",
            )
            batches.append(int(part))
    return tuple(batches)


def _command(args: argparse.Namespace) -> str:
    """Returns the command line for the page."""
    parts = [f"xflow plan --preset {args.preset}"]
    names = ("device", "topology", "program", "mesh", "steps", "json", "markdown", "batch")
    for name in (*names, "block_length", "cache", "refresh", "window"):
        if getattr(args, name):
            parts.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    parts += [f"--prompt-every {args.prompt_every}"] if args.prompt_every > 1 else []
    parts += ["--dtype int8"] if args.dtype == "int8" else []
    parts += ["--sweep"] if args.sweep else []
    return " ".join(parts + [f"--set {text}" for text in args.set])
