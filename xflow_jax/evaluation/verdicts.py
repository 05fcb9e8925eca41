"""`xflow generate`: prompts in, answers out; what is asked in microcode's language is run as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xflow_jax.sandbox import run_many
from xflow_jax.tasks import microcode


def judge_prompts(prompts: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the answers to prompts in microcode's language; a verdict for each prompt.

    {"judged": False, "reason"}, or {"judged": True, "passed", "reason", "input", "output"} with one of the inputs on
    which the answer was run and the right result for it.
    """
    problems = [microcode.parse(prompt) for prompt in prompts]
    judged = [i for i, problem in enumerate(problems) if problem is not None and problem.cases()]
    results = run_many(
        [microcode.TASK.job(problems[i], texts[i]) for i in judged], microcode.TASK.config.limits
    )
    verdicts: list[dict[str, Any]] = []
    for problem in problems:
        why = (
            "the prompt is not in microcode's language"
            if problem is None
            else "the request leaves nothing to return"
        )
        verdicts.append(
            {"judged": False, "reason": f"{why}, so there is no right answer to compare with"}
        )
    for i, result in zip(judged, results, strict=True):
        given, right = problems[i].cases()[0]
        verdicts[i] = {"judged": True, "passed": result.passed, "reason": result.reason}
        verdicts[i] |= {"input": given, "output": right}
    return verdicts


def verdict_sentence(verdict: dict[str, Any]) -> str:
    """A verdict as a sentence."""
    if not verdict["judged"]:
        return f"not judged: {verdict['reason']}"
    example = f"{verdict['input']} -> {verdict['output']!r}"
    if verdict["passed"]:
        return f"passed: its code returned what was asked for on every input, for example {example}"
    return f"failed: {verdict['reason']}; right would be, for example, {example}"


def token_texts(lm: Any) -> list[str]:
    """Token id -> its text, for all rows of the head; rows without a token are shown by number."""
    known = len(lm.tokenizer)
    return [
        lm.tokenizer.decode([i]) if i < known else f"<{i}>" for i in range(lm.config.vocab_rows)
    ]
