"""Verdicts on answers to prompts in the language of microcode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xflow_jax.sandbox import run_many
from xflow_jax.tasks import microcode


def judge_prompts(prompts: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the answers to prompts in the language of microcode.

    Args:
        prompts: requests, in that language or not.
        texts: one answer to each prompt.

    Returns:
        A verdict for each prompt. It is {"judged": False, "reason"} if there is no correct result
        to compare with. Otherwise it is {"judged": True, "passed", "reason", "input", "output"},
        with one input of the checks and the correct output for it.
    """
    problems = [microcode.parse(prompt) for prompt in prompts]
    jobs = {
        i: microcode.TASK.job(problem, text)
        for i, (problem, text) in enumerate(zip(problems, texts, strict=True))
        if problem is not None and problem.cases()
    }
    outcomes = run_many(list(jobs.values()), microcode.TASK.config.limits)
    results = dict(zip(jobs, outcomes, strict=True))
    verdicts: list[dict[str, Any]] = []
    for i, problem in enumerate(problems):
        if problem is None or i not in results:
            why = "the request leaves nothing to return"
            if problem is None:
                why = "the prompt is not in microcode's language"
            why += ", so there is no right answer to compare with"
            verdicts.append({"judged": False, "reason": why})
            continue
        verdict = {"judged": True, "passed": results[i].passed, "reason": results[i].reason}
        example, output = problem.cases()[0]
        verdicts.append({**verdict, "input": example, "output": output})
    return verdicts


def verdict_sentence(verdict: Mapping[str, Any]) -> str:
    """Returns a verdict of `judge_prompts` as a sentence."""
    if not verdict["judged"]:
        return f"not judged: {verdict['reason']}"
    example = f"{verdict['input']} -> {verdict['output']!r}"
    if verdict["passed"]:
        return f"passed: the code returned the right result for every input, such as {example}"
    return f"failed: {verdict['reason']}. A right result is, for example, {example}"
