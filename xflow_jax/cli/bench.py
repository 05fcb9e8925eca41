"""Where the time of a decode goes: `xflow bench --model DIR|tiny|PRESET`.

Three programs are timed side by side: the decode itself, its backbone with the head's matrix product, and the backbone
alone. Their rounds alternate and medians are reported, so that another load on the machine falls on all three alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from xflow_jax.benchmarks import (
    SHAPES,
    cache_bench,
    compare_with_torch,
    load_or_make,
    matmul_rate,
    measure_decode,
    seconds,
    timing_table,
)
from xflow_jax.checkpoints import refuse_existing, write_atomic
from xflow_jax.decoding import DecodeConfig, Rule, make_decode_config, parse_rule
from xflow_jax.errors import UserError
from xflow_jax.lm import LM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `xflow bench`."""
    models = f"a directory, tiny, or, with random weights, {', '.join(SHAPES)}"
    parser.add_argument("--model", required=True, metavar="DIR", help=models)
    parser.add_argument(
        "--rule",
        default="flow",
        metavar="RULE",
        help="mask, threshold, flow (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes", default="1,8,64", metavar="LIST", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--gen-length",
        type=int,
        default=48,
        metavar="N",
        help="of responses (default: %(default)s)",
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="of blocks (default: as the model was made for)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="forward passes (default: a quarter of the tokens)"
    )
    parser.add_argument(
        "--prompt-length",
        type=int,
        default=40,
        metavar="N",
        help="of prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help="float32 or bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--against", choices=("torch",), help="mask prediction beside a plain PyTorch model instead"
    )
    parser.add_argument(
        "--mesh", metavar="D,F,T", help="sizes of data, fsdp and tensor (default: one device)"
    )
    parser.add_argument("--json", metavar="FILE", help="keep every number in a new file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--cache-ratio",
        action="store_true",
        help="only: a step with the exact cache and without it",
    )
    only.add_argument(
        "--refresh",
        type=int,
        metavar="R",
        help="only: a step with the prompt read every R steps and in every one",
    )


def run(args: argparse.Namespace) -> None:
    """Measures and prints a table; every step is taken, early exits are off. UserError on bad input."""
    sizes = _sizes(args.batch_sizes)
    for name, value in (("prompt_length", args.prompt_length), ("rounds", args.rounds)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if args.json:
        refuse_existing(Path(args.json))
    label, rule = parse_rule(args.rule)
    lm = load_or_make(args.model, args.dtype, args.mesh)
    steps = max(args.gen_length // 4, 1) if args.steps is None else args.steps
    decode_config = make_decode_config(
        lm, args.prompt_length, args.gen_length, steps, None, args.block_length
    )
    if args.cache_ratio or args.refresh is not None:
        return _two_ways(args, lm, rule, decode_config, sizes)
    with lm.scope():
        rate = matmul_rate(lm.dtype)
    device = jax.devices()[0]
    parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    print(
        f"{args.model}: {parameters / 1e6:.2f} M parameters in {lm.dtype}, on {device.device_kind}, which multiplies "
        f"matrices at {rate / 1e9:.0f} GFLOP/s\n{label}: prompts of {args.prompt_length} tokens, responses of "
        f"{args.gen_length} in {steps} steps, none skipped; {args.rounds} rounds or more"
    )
    if args.against:
        print("mask prediction beside PyTorch on the same weights:")
        rivals = []
        for batch in sizes:
            rivals.append(
                r := compare_with_torch(lm, decode_config, batch, args.prompt_length, args.rounds)
            )
            print(
                f"batch {r.batch}: {r.ours:.1f} tokens/s, PyTorch {r.theirs:.1f}: {r.speedup:.2f} times; "
                f"{100 * r.agreement:.1f} % of the tokens are equal",
                flush=True,
            )
        _keep(args, device, parameters, rate, {"rivals": [dataclasses.asdict(r) for r in rivals]})
        return
    timings = []
    for batch in tqdm(sizes, desc="batch sizes", leave=False, disable=None):
        timings.append(
            measure_decode(lm, rule, decode_config, batch, args.prompt_length, rate, args.rounds)
        )
    print(timing_table(timings))
    _keep(args, device, parameters, rate, {"timings": [dataclasses.asdict(t) for t in timings]})


def _keep(
    args: argparse.Namespace, device: Any, parameters: int, rate: float, found: dict[str, Any]
) -> None:
    """Writes what was measured, and under what, where --json asks for it."""
    if args.json:
        facts = vars(args) | {
            "device": device.device_kind,
            "parameters": parameters,
            "matmul_flops_per_second": rate,
        }
        facts = {k: v for k, v in facts.items() if isinstance(v, str | int | float | None)}
        write_atomic(Path(args.json), json.dumps(facts | found, indent=1) + "\n")


def _two_ways(
    args: argparse.Namespace, lm: LM, rule: Rule, decode_config: DecodeConfig, sizes: list[int]
) -> None:
    if args.refresh is not None and args.refresh < 2:
        raise UserError(
            f"refresh must be at least 2 to be compared with every step, not {args.refresh}"
        )
    refresh = args.refresh or 0
    ways = cache_bench.cache_variants(lm, decode_config, refresh)
    parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    print(
        f"{args.model}: {parameters / 1e6:.1f} M parameters, prompts of {args.prompt_length} tokens, responses of "
        f"{decode_config.gen_length} in blocks of {decode_config.block_length} with {decode_config.steps} steps each"
    )
    for batch in sizes:
        result = cache_bench.measure_variants(
            lm, rule, ways, batch, args.prompt_length, args.rounds, seconds
        )
        print(f"batch {batch}: {cache_bench.ratio_sentence(result, refresh)}", flush=True)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(
            f"the batch sizes must be positive whole numbers with commas between them, not {text!r}"
        )
    return sizes
