"""What an evaluation keeps: every answer as a line of jsonl, from which a second call continues, and tables of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from xflow_jax.checkpoints import write_atomic
from xflow_jax.errors import UserError
from xflow_jax.evaluation.statistics import pass_at_k, wilson


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to one problem and its verdict, a line of answers.jsonl.

    rule and budget: as the user wrote them, empty for answers made elsewhere. seconds: its share of the time that its
    batch took to decode, compilation left out. forward_passes: those that it took part in.
    """

    task_id: str
    rule: str
    budget: str
    seed: int
    text: str
    passed: bool
    reason: str
    forward_passes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one rule at one budget.

    steps: allowed for the response. n: problems. accuracy, low, high: percent, with the 95 % Wilson interval.
    forward_passes: mean per sequence; passes_per_token: the same by N. seconds: of decoding, in all, compilation left
    out. tokens_per_second: response positions, all N of each sequence, by those seconds. pass_at_k: in percent, of k
    answers to each problem; None where not so many were given.
    """

    rule: str
    budget: str
    steps: int
    n: int
    accuracy: float
    low: float
    high: float
    forward_passes: float
    passes_per_token: float
    seconds: float
    tokens_per_second: float
    k: int = 1
    pass_at_k: float | None = None


def summarize_answers(
    rule: str, budget: str, steps: int, gen_length: int, answers: Sequence[Answer], k: int = 1
) -> Row:
    """The row of all answers of one rule and budget; with several answers to a problem, pass@1 is their mean.

    The interval is for as many problems as there are, so it is wide rather than narrow where answers are several.
    """
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts.setdefault(answer.task_id, []).append(answer.passed)
    n = len(verdicts)
    passed = sum(sum(v) / len(v) for v in verdicts.values())
    low, high = wilson(passed, n)
    passes = sum(a.forward_passes for a in answers) / max(len(answers), 1)
    seconds = sum(a.seconds for a in answers)
    speed = len(answers) * gen_length / seconds if seconds else 0.0
    share = 100 * passed / max(n, 1)
    enough = n > 0 and min(map(len, verdicts.values())) >= k
    at_k = (
        100 * sum(pass_at_k(len(v), sum(v), k) for v in verdicts.values()) / n if enough else None
    )
    per_token = passes / gen_length
    return Row(
        rule,
        budget,
        steps,
        n,
        share,
        100 * low,
        100 * high,
        passes,
        per_token,
        seconds,
        speed,
        k,
        at_k,
    )


class Answers:
    """The answers of a run, in `folder`/answers.jsonl or, without a folder, in memory.

    A folder that holds the beginning of the same run is continued, and a line that a crash cut off is dropped. `run`
    says what the run is, in JSON's own types: UserError where the folder belongs to another one.
    """

    def __init__(self, folder: str | Path | None, run: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self._answers: dict[tuple[str, str, str], list[Answer]] = {}
        self._verdicts: dict[tuple[str, str], tuple[bool, str]] = {}
        if self.folder is None:
            return
        self._file = self.folder / "answers.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made an output folder: {error.strerror}") from None
        about = self.folder / "run.json"
        if about.exists() or self._file.exists():
            self._check(about, run)
            self._read()
        else:
            write_atomic(about, json.dumps(run, indent=2) + "\n")

    def _check(self, about: Path, run: dict[str, Any]) -> None:
        try:
            before = json.loads(about.read_text())
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"{self.folder} holds answers, but no run.json says of which run; choose another folder"
            )
        if differ := [key for key in {**before, **run} if before.get(key) != run.get(key)]:
            what = ", ".join(differ)
            raise UserError(
                f"{self.folder} holds another run, which differs in {what}; choose another folder"
            )

    def _read(self) -> None:
        if not self._file.exists():
            return
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                self._keep(Answer(**json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(
                    f"{self._file}, line {number} is no answer; mend it or choose another folder"
                ) from None
        if len(whole) < len(data):
            with self._file.open("r+b") as file:
                file.truncate(len(whole))

    def _keep(self, answer: Answer) -> None:
        self._answers.setdefault((answer.rule, answer.budget, answer.task_id), []).append(answer)
        self._verdicts[answer.task_id, answer.text] = answer.passed, answer.reason

    def add(self, answers: Sequence[Answer]) -> None:
        """Keeps answers; they are on the disk when this returns."""
        if self.folder is not None:
            lines = "".join(json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers)
            try:
                with self._file.open("a") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self._file} cannot be written: {error.strerror}") from None
        for answer in answers:
            self._keep(answer)

    def has(self, rule: str, budget: str, task_id: str, seed: int | None = None) -> bool:
        """Whether there is an answer to this problem by this rule at this budget, of this seed (None: of any)."""
        kept = self._answers.get((rule, budget, task_id), ())
        return any(seed is None or answer.seed == seed for answer in kept)

    def all(self) -> list[Answer]:
        """Every answer, in the order in which problems were first answered."""
        return [answer for kept in self._answers.values() for answer in kept]

    def verdict(self, task_id: str, text: str) -> tuple[bool, str] | None:
        """(passed, reason) of this very answer to this problem, where another rule or budget has come to it before."""
        return self._verdicts.get((task_id, text))

    def of(self, rule: str, budget: str, task_ids: Iterable[str]) -> list[Answer]:
        """All answers of one rule and budget, in the order of `task_ids`."""
        return [
            answer
            for task_id in task_ids
            for answer in self._answers.get((rule, budget, task_id), ())
        ]
