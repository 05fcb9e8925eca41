"""Verdicts on answers to prompts of the library's own tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xflow_jax.sandbox import run_many
from xflow_jax.tasks import find_problem


def judge_prompts(prompts: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Judges the answers to prompts of microcode, microcode-long and latin-square.

    Args:
        prompts: requests of these tasks, or others.
        texts: one answer to each prompt.

    Returns:
        A verdict for each prompt. It is {"judged": False, "reason"} if there is no correct result
        to compare with. Otherwise it is {"judged": True, "passed", "reason", "input", "output"},
        with one input of the checks and the correct output for it.
    """
    verdicts: list[dict[str, Any]] = []
    jobs = {}
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        found = find_problem(prompt)
        case = None if found is None else found[0].case(found[1])
        if found is None or case is None:
            why = "the request has no right answer"
            if found is None:
                why = "the prompt is no request of a task that can be judged"
            why += ", so there is none to compare with"
            verdicts.append({"judged": False, "reason": why})
            continue
        jobs[i] = found[0].job(found[1], text)
        verdicts.append({"judged": True, "input": case[0], "output": case[1]})
    for i, result in zip(jobs, run_many(list(jobs.values())), strict=True):
        verdicts[i] |= {"passed": result.passed, "reason": result.reason}
    return verdicts


def verdict_sentence(verdict: Mapping[str, Any]) -> str:
    """Returns a verdict of `judge_prompts` as a sentence."""
    if not verdict["judged"]:
        return f"not judged: {verdict['reason']}"
    example = f"{verdict['input']} -> {verdict['output']!r}"
    if verdict["passed"]:
        return f"passed: every check holds. A right result is, for example, {example}"
    return f"failed: {verdict['reason']}. A right result is, for example, {example}"
