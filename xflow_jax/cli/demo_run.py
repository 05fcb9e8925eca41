"""Run of `xflow demo`: the bundled model from end to end.

It goes from Hugging Face files to a table and two pictures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import jax
from jax.sharding import Mesh

from xflow_jax.benchmarks import count_parameters
from xflow_jax.checkpoints import make_directory, save_params
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import MaskPrediction, Rule, generate, parse_rule
from xflow_jax.errors import UserError
from xflow_jax.evaluation import (
    Answers,
    evaluate,
    judge_prompts,
    make_cells,
    rows_to_text,
    table_legend,
    verdict_sentence,
    write_report,
)
from xflow_jax.lm import BUNDLED, LM, load
from xflow_jax.parallel import default_mesh
from xflow_jax.serving import TracedDecode, token_texts, write_trajectory_page
from xflow_jax.tasks import Task, get_task, microcode

FLOW = "flow:reedit=always,jump=0.9,early_exit=true"
RULES = ("mask", "threshold:tau=0.95", FLOW)
BLOCK = "block_length=48"  # the aligned model decodes in one block, the base model in three
BUDGETS = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
BASE = "mask (base)"  # mask prediction with the model before its alignment


def run_demo(out: Path, limit: int) -> None:
    """Decodes held-out requests, runs the answers and draws the results.

    Args:
        out: folder for the files.
        limit: number of requests.

    Raises:
        UserError: if the folder cannot be made.
    """
    try:
        make_directory(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made an output folder: {error.strerror}") from None
    began, task = time.perf_counter(), get_task(microcode.TASK.name, [BLOCK])
    mesh = default_mesh()
    lm = load_through_orbax("tiny", mesh)
    size = f"{count_parameters(lm) / 1e6:.1f} M parameters"
    print(f"The bundled model, {size}: safetensors -> Orbax -> {_devices()}.")
    problems = task.problems(None, limit)
    print(
        f"Decoding {len(problems)} requests that training never saw, and running every answer. "
        f"The first request:\n\n  {problems[0].prompt}\n",
        flush=True,
    )
    rules = dict(parse_rule(text) for text in RULES)
    base_rules: dict[str, Rule] = {BASE: MaskPrediction()}
    models: tuple[tuple[LM, Task, Mapping[str, Rule]], ...] = (
        (load("tiny-base", mesh=mesh), microcode.TASK, base_rules),
        (lm, task, rules),
    )
    rows, answers = [], Answers(None, {})
    for model, protocol, model_rules in models:
        cells = make_cells(model, protocol, model_rules, BUDGETS)
        rows += evaluate(model, protocol, problems, cells, answers, limit)
    page = out / "trajectory.html"
    print_text("\n" + _show_trajectory(lm, task, problems[0], rules[FLOW], page) + "\n")
    notes = [
        table_legend(task),
        "base: the model before its alignments, in blocks of 16. All other rows are of `tiny`.",
    ]
    print("\n".join([rows_to_text(rows), *notes]))
    files = write_report(out, task, rows, [*notes, f"Made by: xflow demo --limit {limit}"])
    print(f"\n{time.perf_counter() - began:.0f} s in all. Look at:")
    print("".join(f"  {path}\n" for path in [*files, page]), end="")
    print(f'Try a request of your own: xflow generate --model tiny --prompt "{task.example}"')


def load_through_orbax(name: str, mesh: Mesh | None) -> LM:
    """Converts a bundled model to an Orbax checkpoint, and loads that."""
    with tempfile.TemporaryDirectory(prefix="xflow-demo-") as folder:
        source, converted = load(name, mesh=mesh), Path(folder) / name
        save_params(converted, source.params, source.config, BUNDLED[name], {"source": name})
        return load(converted, mesh=mesh)


def _devices() -> str:
    count = jax.device_count()
    return f"{count} device{'s' * (count > 1)} ({jax.devices()[0].device_kind})"


def _show_trajectory(lm: LM, task: Task, problem: microcode.Problem, rule: Rule, page: Path) -> str:
    """Writes the page of one decode, and returns its answer as text."""
    config = task.config
    steps = config.gen_length // 4
    out = generate(
        lm,
        [problem.prompt],
        rule,
        gen_length=config.gen_length,
        steps=steps,
        block_length=config.block_length,
        trace=True,
    )
    assert out.texts is not None and out.trace is not None
    passes = int(out.forward_passes[0])
    verdict = verdict_sentence(judge_prompts([problem.prompt], out.texts)[0])
    facts = {
        "passes": f"{passes} for {config.gen_length} tokens",
        "verdict": verdict,
    }
    chat = [{"role": "user", "content": problem.prompt}]
    decode = TracedDecode(FLOW, out.trace, 0, facts)
    write_trajectory_page(page, [decode], token_texts(lm), chat, "tiny")
    answer = "".join(f"  {line}\n" for line in out.texts[0].splitlines())
    return f"The first request, answered by the flow in {passes} passes:\n\n{answer}\n  {verdict}"
