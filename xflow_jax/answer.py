"""`xflow generate`: prompts in, answers out; what is asked in microcode's language is run as well."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xflow_jax.choices import blocks_of, parse_budget, parse_rule, steps_of
from xflow_jax.generate import generate
from xflow_jax.lm import BUNDLED, load
from xflow_jax.plot import trajectory_html
from xflow_jax.sandbox import run_many
from xflow_jax.sharding import make_mesh
from xflow_jax.strict import UserError
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids

GEN_LENGTH = 128


def judge(prompts: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the answers to prompts in microcode's language; a verdict for each prompt.

    {"judged": False, "reason"}, or {"judged": True, "passed", "reason", "input", "output"} with one of the inputs on
    which the answer was run and the right result for it.
    """
    problems = [microcode.parse(prompt) for prompt in prompts]
    judged = [i for i, problem in enumerate(problems) if problem is not None and problem.cases()]
    results = run_many([microcode.TASK.job(problems[i], texts[i]) for i in judged], microcode.TASK.settings.limits)
    verdicts: list[dict[str, Any]] = []
    for problem in problems:
        why = "the prompt is not in microcode's language" if problem is None else "the request leaves nothing to return"
        verdicts.append({"judged": False, "reason": f"{why}, so there is no right answer to compare with"})
    for i, result in zip(judged, results, strict=True):
        given, right = problems[i].cases()[0]
        verdicts[i] = {"judged": True, "passed": result.passed, "reason": result.reason}
        verdicts[i] |= {"input": given, "output": right}
    return verdicts


def say(verdict: dict[str, Any]) -> str:
    """A verdict as a sentence."""
    if not verdict["judged"]:
        return f"not judged: {verdict['reason']}"
    example = f"{verdict['input']} -> {verdict['output']!r}"
    if verdict["passed"]:
        return f"passed: its code returned what was asked for on every input, for example {example}"
    return f"failed: {verdict['reason']}; right would be, for example, {example}"


def run(args: Any) -> None:
    """`xflow generate`."""
    if args.trace is not None and len(args.prompt) > 1:
        raise UserError("--trace shows one decode, so give --prompt once")
    if any(not prompt.strip() for prompt in args.prompt):
        raise UserError("a prompt is empty: write what the model is to answer")
    label, rule = parse_rule(args.rule)
    budget = parse_budget(args.budget or "1")
    mesh = _mesh(args.mesh)
    lm = load(args.model, dtype=args.dtype, mesh=mesh)
    if lm.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer.json, without which a prompt cannot be read")
    length, block_length = args.gen_length, args.block_length
    if length is None:
        length = GEN_LENGTH
        if args.model in BUNDLED or Path(args.model).resolve() in BUNDLED.values():
            settings = microcode.TASK.settings
            length, block_length = settings.gen_length, block_length or settings.block_length
    steps = args.steps
    if steps is None:
        steps = steps_of(budget, length, blocks_of(lm.config.family, length, block_length))
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
    verdicts = judge(args.prompt, out.texts)
    if args.trace is not None:
        facts = {"rule": label, "steps": f"{steps} for {length} tokens", "forward passes": str(out.forward_passes[0])}
        trajectory_html(args.trace, out.trace, 0, spelling(lm), args.prompt[0], facts | {"verdict": say(verdicts[0])})
    for i, (prompt, text, verdict) in enumerate(zip(args.prompt, out.texts, verdicts, strict=True)):
        passes = int(out.forward_passes[i])
        if args.json:
            about = {"rule": label, "gen_length": length, "steps": steps, "forward_passes": passes, "seed": args.seed}
            print(json.dumps({"prompt": prompt, "text": text, **about, **verdict}))
            continue
        print(("\n" if i else "") + (f"# {prompt}\n" if len(args.prompt) > 1 else "") + text)
        print(f"\n[{say(verdict)}]\n[{label}, {passes} forward passes for {length} tokens]")
    if not args.json:
        print(f"[{seconds:.1f} s with compilation]")
        if args.trace is not None:
            print(f"[wrote {args.trace}]")


def spelling(lm: Any) -> list[str]:
    """Token id -> its text, for all rows of the head; rows without a token are shown by number."""
    known = len(lm.tokenizer)
    return [lm.tokenizer.decode([i]) if i < known else f"<{i}>" for i in range(lm.config.vocab_rows)]


def _mesh(spec: str | None) -> Any:
    """The mesh that was asked for, or all devices where there are several; None on a single one."""
    import jax

    return make_mesh(spec) if spec or jax.device_count() > 1 else None
