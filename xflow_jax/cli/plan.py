"""Will it fit, and how fast can it be? `xflow plan` compiles the real programs for TPU slices that are not there.

The compiler is the one of the TPUs, from the package libtpu (extra [plan]); no TPU is needed. It says what memory the
program takes; FLOPs, memory traffic and collectives are read from what it made (plan_hlo.py), and the peak rates of the
chip (plan_chips.py) turn them into the least time of a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax

from xflow_jax.checkpoints import write_atomic
from xflow_jax.errors import UserError, require
from xflow_jax.models import PRESETS
from xflow_jax.planning import (
    GPUS,
    PROGRAMS,
    markdown_page,
    parse_device,
    parse_topology,
    plan_rows,
    plan_table,
    row_sentence,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `xflow plan`."""
    parser.add_argument(
        "--preset", required=True, metavar="LIST", help=f"with commas between: {', '.join(PRESETS)}"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology", metavar="LIST", help="slices like v5p:4x4x4 or v5e-8, with commas between"
    )
    where.add_argument(
        "--device",
        metavar="DEVICE",
        help=f"arithmetic alone: {', '.join(f'gpu:{n}' for n in GPUS)}[:N]",
    )
    parser.add_argument(
        "--program",
        default="decode",
        metavar="LIST",
        help=f"{', '.join(PROGRAMS)} (default: decode)",
    )
    parser.add_argument(
        "--mesh",
        metavar="D,F,T",
        help="sizes of data, fsdp, tensor (default: the fastest that fits)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="several meshes, the best by arithmetic first"
    )
    parser.add_argument(
        "--most", type=int, default=8, metavar="N", help="meshes of a sweep (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        default="1",
        metavar="LIST",
        help="rows of decodes, or max: as many as fit (default: 1)",
    )
    parser.add_argument(
        "--train-batch",
        type=int,
        default=64,
        metavar="N",
        help="of align and rollout (default: 64)",
    )
    parser.add_argument(
        "--prompt-length", type=int, default=128, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--gen-length", type=int, default=512, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="forward passes (default: a quarter of the tokens)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the alignment"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="keep the rows here; the same command again continues"
    )
    parser.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' text here")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as a page")


def run(args: argparse.Namespace) -> int:
    """Prints a table; the exit status: 1 where something does not fit. UserError on bad input."""
    args.preset = _choices("preset", args.preset, list(PRESETS))
    args.program = _choices("program", args.program, list(PROGRAMS))
    args.topology = args.topology.split(",") if args.topology else []
    args.batch = _batches(args.batch)
    require(args.train_batch > 0, f"train_batch must be at least 1, not {args.train_batch}")
    for text in args.topology:
        parse_topology(text)
    if args.device:
        parse_device(args.device)
    elif importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'the TPU compiler is missing; it comes with the extra [plan]: pip install "xflow-jax[plan]"'
        )
    if not args.device:
        jax.config.update("jax_platforms", "cpu")  # nothing is run, so no accelerator is taken
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # what comes out of it tells less of itself
    file = Path(args.json) if args.json else None
    kept = json.loads(file.read_text())["rows"] if file and file.exists() else []
    rows = []
    for row in plan_rows(args, kept):
        rows.append(row)
        print(row_sentence(row), flush=True)
        if file:
            others = [r for r in kept if r not in rows]
            write_atomic(file, json.dumps({"rows": rows + others}, indent=1) + "\n")
    print(plan_table(rows))
    if args.markdown:
        write_atomic(Path(args.markdown), markdown_page(rows, args))
    return 0 if all(row["fits"] for row in rows) else 1


def _choices(name: str, text: str, known: list[str]) -> list[str]:
    chosen = text.split(",")
    for one in chosen:
        require(one in known, f"there is no {name} {one!r}; there are {', '.join(known)}")
    return chosen


def _batches(text: str) -> list[Any]:
    parts = text.split(",")
    right = all(part == "max" or (part.isdigit() and int(part) > 0) for part in parts)
    require(
        right, f"the batch {text!r} must be positive whole numbers or max, with commas between them"
    )
    return [part if part == "max" else int(part) for part in parts]
