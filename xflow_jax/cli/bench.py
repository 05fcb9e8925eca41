"""The command `xflow bench`: speed of decoding and of its parts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from functools import partial

import jax
from tqdm import tqdm

from xflow_jax.benchmarks import (
    RANDOM_MODELS,
    cache_variants,
    compare_with_torch,
    count_parameters,
    load_or_make,
    matmul_rate,
    measure_decode,
    measure_variants,
    profile_calls,
    ratio_sentence,
    timing_table,
)
from xflow_jax.checkpoints import refuse_existing, write_atomic
from xflow_jax.cli.arguments import (
    MODEL,
    RULE,
    add_block_length_argument,
    add_cache_arguments,
    add_dtype_argument,
    add_mask_argument,
    add_mesh_argument,
    add_number,
    add_profile_argument,
    cache_arguments,
    check_output_file,
    require_positive,
)
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import CacheOptions, DecodeConfig, Rule, make_decode_config, parse_rule
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow bench`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help=f"{MODEL}, or a model with random weights: {', '.join(RANDOM_MODELS)}",
    )
    parser.add_argument(
        "--rule", default="flow", metavar="RULE", help=RULE + " (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-sizes",
        default="1,8,64",
        metavar="LIST",
        help="numbers of prompts that are decoded together (default: %(default)s)",
    )
    add_number(parser, "--prompt-length", "tokens of a prompt", 40)
    add_number(parser, "--gen-length", "tokens of a response", 48)
    add_block_length_argument(parser)
    add_number(
        parser,
        "--steps",
        "forward passes for the whole response (default: a quarter of its tokens)",
    )
    add_number(parser, "--rounds", "least number of measurements of each program", 7)
    add_dtype_argument(parser)
    add_mask_argument(parser)
    add_mesh_argument(parser, default="one device")
    parser.add_argument("--json", metavar="FILE", help="new file for all numbers")
    parser.add_argument(
        "--against",
        choices=("torch",),
        help="compare mask prediction with the same model in plain PyTorch",
    )
    add_profile_argument(parser)
    add_cache_arguments(parser)
    parser.set_defaults(refresh=None)
    parser.add_argument(
        "--cache-ratio",
        action="store_true",
        help="compare a step with the cache with one without it (always with --refresh alone)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures a decode and prints a table.

    Every step is taken: early exits are off.

    Args:
        args: the arguments of `xflow bench`.

    Raises:
        UserError: for bad input.
    """
    sizes = _batch_sizes(args.batch_sizes)
    require_positive(args, "prompt_length", "rounds")
    if args.json:
        refuse_existing(to_path(args.json))
        check_output_file(to_path(args.json))
    label, rule = parse_rule(args.rule)
    lm = load_or_make(args.model, args.dtype, args.mesh, args.mask_id)
    steps = max(args.gen_length // 4, 1) if args.steps is None else args.steps
    decode_config = make_decode_config(
        lm, args.prompt_length, args.gen_length, steps, None, args.block_length
    )
    compare = args.cache_ratio or (args.refresh is not None and args.cache is None)
    require(
        not compare or args.refresh is None or args.refresh >= 2,
        f"--refresh must be at least 2 to differ from every step, not {args.refresh}",
    )
    args.refresh = args.refresh or 0
    cache = CacheOptions(**cache_arguments(args))
    if compare:
        _compare_cache(args, lm, rule, decode_config, cache, sizes)
        return
    decode_config = cache.apply(lm.config, decode_config)
    with lm.scope():
        rate = matmul_rate(lm.dtype)
    parameters, device = count_parameters(lm), jax.devices()[0].device_kind
    print_text(
        f"{args.model}: {parameters / 1e6:.2f} M parameters in {lm.weight_dtype}, on {device}, "
        f"which multiplies matrices at {rate / 1e9:.0f} GFLOP/s\n"
        f"{label}: prompts of {args.prompt_length} tokens, responses of {args.gen_length} "
        f"in {steps} steps, none skipped, {args.rounds} rounds or more"
    )
    if args.against:
        results = _compare_torch(args, lm, decode_config, sizes)
    else:
        results = _measure(args, lm, rule, decode_config, sizes, rate)
    if args.json:
        facts = {"device": device, "parameters": parameters, "matmul_flops_per_second": rate}
        _write_json(args, {**facts, **results})


def _measure(
    args: argparse.Namespace,
    lm: LM,
    rule: Rule,
    decode_config: DecodeConfig,
    sizes: list[int],
    rate: float,
) -> dict[str, object]:
    """Times the parts of a step and prints the table."""
    timings = [
        measure_decode(lm, rule, decode_config, batch, args.prompt_length, rate, args.rounds)
        for batch in tqdm(sizes, desc="batch sizes", leave=False, disable=None)
    ]
    print(timing_table(timings))
    again = partial(measure_decode, lm, rule, decode_config, sizes[0], args.prompt_length, rate, 1)
    profile_calls(args.profile, again)
    return {"timings": [dataclasses.asdict(t) for t in timings]}


def _compare_torch(
    args: argparse.Namespace, lm: LM, decode_config: DecodeConfig, sizes: list[int]
) -> dict[str, object]:
    """Times mask prediction here and in PyTorch, and prints the results."""
    print("mask prediction beside PyTorch on the same weights:")
    results = []
    for batch in sizes:
        r = compare_with_torch(lm, decode_config, batch, args.prompt_length, args.rounds)
        results.append(dataclasses.asdict(r))
        print(
            f"batch {r.batch}: {r.ours:.1f} tokens/s, PyTorch {r.theirs:.1f}: "
            f"{r.speedup:.2f} times, {100 * r.agreement:.1f} % of the tokens are equal",
            flush=True,
        )
    return {"rivals": results}


def _compare_cache(
    args: argparse.Namespace,
    lm: LM,
    rule: Rule,
    decode_config: DecodeConfig,
    cache: CacheOptions,
    sizes: list[int],
) -> None:
    """Times a step without and with a cache, and prints the results."""
    variants = cache_variants(lm, decode_config, cache)
    name = "the cache"
    if args.cache is None and cache.refresh:
        name = f"the prompt read every {cache.refresh} steps"
    elif args.cache is not None:
        name = f"the {args.cache} cache"
    print_text(
        f"{args.model}: {count_parameters(lm) / 1e6:.1f} M parameters, "
        f"prompts of {args.prompt_length} tokens, responses of {decode_config.gen_length} "
        f"in blocks of {decode_config.block_length} with {decode_config.steps} steps each"
    )
    for batch in sizes:
        result = measure_variants(lm, rule, variants, batch, args.prompt_length, args.rounds)
        print(f"batch {batch}: {ratio_sentence(result, name)}", flush=True)


def _write_json(args: argparse.Namespace, results: Mapping[str, object]) -> None:
    """Writes the arguments and the results to the file of --json."""
    options = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | None)}
    write_atomic(to_path(args.json), json.dumps(options | dict(results), indent=1) + "\n")


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(
            f"--batch-sizes must be positive whole numbers with commas between them, not {text!r}"
        )
    return sizes
