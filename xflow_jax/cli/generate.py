"""`xflow generate`: prompts in, answers out; what is asked in microcode's language is run as well."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from xflow_jax.cli.arguments import MODEL, RULE, add_device_arguments, add_refresh_argument
from xflow_jax.decoding import generate, parse_budget, parse_rule, resolve_steps
from xflow_jax.errors import UserError
from xflow_jax.evaluation import judge_prompts, token_texts, verdict_sentence, write_trajectory_page
from xflow_jax.lm import BUNDLED, load
from xflow_jax.parallel import default_mesh
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids

GEN_LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow generate`."""
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="may be given several times",
    )
    parser.add_argument(
        "--rule", default="mask", metavar="RULE", help=RULE + " (default: %(default)s)"
    )
    parser.add_argument(
        "--gen-length", type=int, metavar="N", help="response tokens (default: 128; 48 with tiny)"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="of blocks (default: as the model was made for)",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--budget",
        metavar="B",
        help="share of the full number of steps, like 1/4 or 0.25 (default: 1)",
    )
    steps.add_argument(
        "--steps", type=int, metavar="N", help="forward passes for the whole response, instead"
    )
    add_refresh_argument(parser)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    parser.add_argument(
        "--trace", metavar="FILE.html", help="write a page that shows every step of the one prompt"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """`xflow generate`."""
    if args.trace is not None and len(args.prompt) > 1:
        raise UserError("--trace shows one decode, so give --prompt once")
    if any(not prompt.strip() for prompt in args.prompt):
        raise UserError("a prompt is empty: write what the model is to answer")
    label, rule = parse_rule(args.rule)
    budget = parse_budget(args.budget or "1")
    mesh = default_mesh(args.mesh)
    lm = load(args.model, dtype=args.dtype, mesh=mesh)
    if lm.tokenizer is None:
        raise UserError(
            f"{args.model} has no tokenizer.json, without which a prompt cannot be read"
        )
    length, block_length = args.gen_length, args.block_length
    if length is None:
        length = GEN_LENGTH
        if args.model in BUNDLED or Path(args.model).resolve() in BUNDLED.values():
            settings = microcode.TASK.config
            length, block_length = settings.gen_length, block_length or settings.block_length
    steps = args.steps
    if steps is None:
        steps = resolve_steps(lm.config, budget, length, block_length)
    began = time.perf_counter()
    out = generate(
        lm,
        [chat_ids(lm.tokenizer, prompt) for prompt in args.prompt],
        rule,
        gen_length=length,
        steps=steps,
        block_length=block_length,
        seed=args.seed,
        trace=args.trace is not None,
        refresh=args.refresh,
    )
    seconds = time.perf_counter() - began
    verdicts = judge_prompts(args.prompt, out.texts)
    if args.trace is not None:
        facts = {
            "rule": label,
            "steps": f"{steps} for {length} tokens",
            "forward passes": str(out.forward_passes[0]),
        }
        write_trajectory_page(
            args.trace,
            out.trace,
            0,
            token_texts(lm),
            args.prompt[0],
            facts | {"verdict": verdict_sentence(verdicts[0])},
        )
    for i, (prompt, text, verdict) in enumerate(zip(args.prompt, out.texts, verdicts, strict=True)):
        passes = int(out.forward_passes[i])
        if args.json:
            about = {
                "rule": label,
                "gen_length": length,
                "steps": steps,
                "forward_passes": passes,
                "seed": args.seed,
            }
            print(json.dumps({"prompt": prompt, "text": text, **about, **verdict}))
            continue
        print(("\n" if i else "") + (f"# {prompt}\n" if len(args.prompt) > 1 else "") + text)
        print(
            f"\n[{verdict_sentence(verdict)}]\n[{label}, {passes} forward passes for {length} tokens]"
        )
    if not args.json:
        print(f"[{seconds:.1f} s with compilation]")
        if args.trace is not None:
            print(f"[wrote {args.trace}]")
