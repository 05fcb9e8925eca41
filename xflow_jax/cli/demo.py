"""`xflow demo`: the bundled model from its Hugging Face files to a table and two pictures, in about a minute."""

from __future__ import annotations

import argparse
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from xflow_jax.checkpoints import save_params
from xflow_jax.decoding import MaskPrediction, generate, parse_rule
from xflow_jax.errors import UserError
from xflow_jax.evaluation import (
    Answers,
    evaluate,
    format_table,
    judge_prompts,
    legend,
    make_cells,
    token_texts,
    verdict_sentence,
    write_report,
    write_trajectory_page,
)
from xflow_jax.lm import BUNDLED, LM, load
from xflow_jax.parallel import default_mesh
from xflow_jax.tasks import microcode

FLOW = "flow:power=8"  # the best of the powers, by requests of the training set


POLICY = "flow:policy=tiny"  # the trained one


RULES = ("mask", "threshold", FLOW, POLICY)


BUDGETS = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))


BASE = "mask (base)"  # the usual decoder on the model as it was before its alignment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `xflow demo`."""
    parser.add_argument(
        "--out",
        default="runs/demo",
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=48,
        metavar="N",
        help="held-out problems (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """`xflow demo`."""
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made an output folder: {error.strerror}") from None
    began, task = time.perf_counter(), microcode.TASK
    mesh = default_mesh()
    lm = through_orbax("tiny", mesh)
    size = sum(x.size for x in jax.tree.leaves(lm.params))
    where = f"{jax.device_count()} device{'s' * (jax.device_count() > 1)} ({jax.devices()[0].device_kind})"
    print(f"The bundled model, {size / 1e6:.1f} M parameters: safetensors -> Orbax -> {where}.")
    problems, answers = task.problems(None, args.limit), Answers(None, {})
    rules = dict(parse_rule(text) for text in RULES)
    print(
        f"Decoding {len(problems)} requests that training never saw, and running every answer. The first request:\n"
    )
    print(f"  {problems[0].prompt}\n", flush=True)
    rows = []
    for model, its_rules in ((load("tiny-base", mesh=mesh), {BASE: MaskPrediction()}), (lm, rules)):
        rows += evaluate(
            model, task, problems, make_cells(model, task, its_rules, BUDGETS), answers, args.limit
        )
    page = out / "trajectory.html"
    print("\n" + _trajectory(lm, problems[0], rules[FLOW], page) + "\n")
    notes = [
        legend(task),
        "base: the model before its alignment; all other rows are of the aligned one.",
    ]
    print("\n".join([format_table(rows), *notes]))
    made = [
        *write_report(out, task, rows, [*notes, f"Made by: xflow demo --limit {args.limit}"]),
        page,
    ]
    print(f"\n{time.perf_counter() - began:.0f} s in all. Look at:")
    print("".join(f"  {path}\n" for path in made), end="")
    print(
        'Ask it yourself: xflow generate --model tiny --prompt "Multiply each number by 2 and return the sum."'
    )


def through_orbax(name: str, mesh: Any) -> LM:
    """The bundled model of that name, read from its Hugging Face files, written with Orbax, and loaded in shards."""
    with tempfile.TemporaryDirectory(prefix="xflow-demo-") as scratch:
        source = load(name, mesh=mesh)
        save_params(
            Path(scratch) / name, source.params, source.config, BUNDLED[name], {"source": name}
        )
        return load(Path(scratch) / name, mesh=mesh)


def _trajectory(lm: Any, problem: microcode.Problem, rule: Any, page: Path) -> str:
    """Writes the page of one flow decode at a quarter of the steps; the answer with its verdict, as text."""
    task = microcode.TASK
    length, steps = task.config.gen_length, task.config.gen_length // 4
    size = task.config.block_length
    out = generate(
        lm, [problem.prompt], rule, gen_length=length, steps=steps, block_length=size, trace=True
    )
    verdict = judge_prompts([problem.prompt], out.texts)[0]
    facts = {
        "rule": FLOW,
        "steps": f"{steps} for {length} tokens",
        "verdict": verdict_sentence(verdict),
    }
    write_trajectory_page(page, out.trace, 0, token_texts(lm), problem.prompt, facts)
    answer = "".join(f"  {line}\n" for line in out.texts[0].splitlines())
    return f"The first request, answered by the flow in {steps} steps:\n\n{answer}\n  {verdict_sentence(verdict)}"
