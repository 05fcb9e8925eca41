"""Store of answers, and the rows that sum them up.

Answers are lines of jsonl, from which a later call continues.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from xflow_jax.checkpoints import append_text, close_text, make_directory, write_atomic
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.evaluation.statistics import pass_at_k, wilson_interval
from xflow_jax.input_files import is_cloud, open_regular, parse_json, read_json, to_path
from xflow_jax.parallel import Shard
from xflow_jax.sandbox import SAME_INTERPRETER
from xflow_jax.toml_config import coerce, field_types

SHARD = "shard-"  # before the name of a share


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to one problem with its verdict, a line of answers.jsonl.

    Attributes:
        task_id: name of the problem.
        rule: the rule as the user wrote it, or a label for answers from elsewhere.
        budget: the budget as text, such as "1/4". Empty for answers from elsewhere.
        seed: seed of the decode.
        text: the response.
        passed: True if all checks passed.
        reason: "passed", "passed in the same interpreter", or the first failure.
        forward_passes: passes that the sequence took part in.
        seconds: share of the decode time of its batch, without compilation.
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
    """Results of one rule at one budget.

    Attributes:
        rule: label of the rule.
        budget: the budget as text, or empty.
        steps: steps for the whole response. 0 for answers from elsewhere.
        n: number of problems.
        accuracy: pass@1 in percent.
        low, high: 95 % Wilson interval of the accuracy, in percent.
        forward_passes: mean per sequence.
        passes_per_token: forward_passes / N.
        seconds: decode time of all answers, without compilation.
        tokens_per_second: response positions, all N of each sequence, per second of decode time.
        k: k of pass@k.
        pass_at_k: in percent, or None if a problem has fewer than k answers.
        same_interpreter: answers that passed checks in their own process, where a hostile program
            can forge a pass.
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
    same_interpreter: int = 0


def summarize_answers(
    rule: str, budget: str, steps: int, gen_length: int, answers: Sequence[Answer], k: int = 1
) -> Row:
    """Computes the row of one rule and budget.

    With several answers to a problem, pass@1 is their mean. The interval counts problems, not
    answers, so it is then too wide rather than too narrow.

    Args:
        rule: label of the rule.
        budget: the budget as text.
        steps: steps for the whole response.
        gen_length: N, response positions.
        answers: all answers of this rule and budget.
        k: k of pass@k.
    """
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts.setdefault(answer.task_id, []).append(answer.passed)
    n = len(verdicts)
    passed = sum(sum(v) / len(v) for v in verdicts.values())
    low, high = wilson_interval(passed, n)
    at_k = None
    if n > 0 and min(map(len, verdicts.values())) >= k:
        at_k = 100 * sum(pass_at_k(len(v), sum(v), k) for v in verdicts.values()) / n
    passes = sum(a.forward_passes for a in answers) / max(len(answers), 1)
    seconds = sum(a.seconds for a in answers)
    return Row(
        rule=rule,
        budget=budget,
        steps=steps,
        n=n,
        accuracy=100 * passed / max(n, 1),
        low=100 * low,
        high=100 * high,
        forward_passes=passes,
        passes_per_token=passes / gen_length,
        seconds=seconds,
        tokens_per_second=len(answers) * gen_length / seconds if seconds else 0.0,
        k=k,
        pass_at_k=at_k,
        same_interpreter=sum(a.reason == SAME_INTERPRETER for a in answers),
    )


def shard_folder(folder: Path, shard: Shard) -> Path:
    """Returns the folder of a worker's answers in a run."""
    return folder / f"{SHARD}{shard.name}"


class Answers:
    """All answers of a run, in memory and in a folder.

    The folder is optional. It holds answers.jsonl and run.json. A folder that holds the beginning
    of the same run is continued. A last line that a crash cut off is removed from the file. A
    command locks the folder before (`open_answers`).

    Args:
        folder: the output folder, or None to keep answers in memory only.
        run: description of the run in JSON's types. It is stored as run.json.

    Raises:
        UserError: if the folder holds another run or cannot be used.
    """

    def __init__(self, folder: str | Path | None, run: Mapping[str, object]) -> None:
        self.folder = None if folder is None else to_path(folder)
        self._answers: dict[tuple[str, str, str], list[Answer]] = {}
        self._verdicts: dict[tuple[str, str], tuple[bool, str]] = {}
        if self.folder is None:
            return
        self._file = self.folder / "answers.jsonl"
        try:
            make_directory(self.folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be made an output folder: {error.strerror}") from None
        description = self.folder / "run.json"
        if description.exists() or self._file.exists():
            self._check(description, run)
            self._read()
        else:
            write_atomic(description, json.dumps(run, indent=2) + "\n")

    def _check(self, description: Path, run: Mapping[str, object]) -> None:
        """Raises UserError unless run.json describes the same run."""
        try:
            before = read_json(description)
        except UserError:
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"{self.folder} holds answers, but no run.json that describes their run. "
                "Choose another folder."
            )
        keys = [key for key in {**before, **run} if before.get(key) != run.get(key)]
        if differ := [key + _changed_rule(key, before.get(key), run.get(key)) for key in keys]:
            raise UserError(
                f"{self.folder} holds another run, which differs in {', '.join(differ)}. "
                "Choose another folder."
            )

    def _read(self) -> None:
        if not self._file.exists():
            return
        try:
            with open_regular(self._file) as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{self._file}: cannot be read: {error.strerror}") from None
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                self._keep(_parse_answer(line))
            except (UserError, ValueError, TypeError):
                raise UserError(
                    f"{self._file}, line {number} is no answer. "
                    "Correct the line, or choose another folder."
                ) from None
        if len(whole) < len(data) and not is_cloud(self._file):
            with disk_errors(self._file), self._file.open("r+b") as file:
                file.truncate(len(whole))

    def take_shards(self, run: Mapping[str, object]) -> None:
        """Adds the answers of independent workers, from folders of this one.

        Args:
            run: description of the run, which must be that of each worker.

        Raises:
            UserError: if there are none, or if one is of another run.
        """
        assert self.folder is not None
        shards = sorted(self.folder.glob(f"{SHARD}*-of-*"))
        require(
            bool(shards),
            f"{self.folder}: no shares of workers are in it. Run the command with --shard i/n "
            "before.",
        )
        for shard in shards:
            kept = Answers(shard, run).all()
            self.add([a for a in kept if not self.has(a.rule, a.budget, a.task_id, a.seed)])

    def close(self) -> None:
        """Makes one object of the answers in object storage.

        Raises:
            UserError: if it cannot be written.
        """
        if self.folder is not None:
            close_text(self._file)

    def _keep(self, answer: Answer) -> None:
        self._answers.setdefault((answer.rule, answer.budget, answer.task_id), []).append(answer)
        self._verdicts[answer.task_id, answer.text] = answer.passed, answer.reason

    def add(self, answers: Sequence[Answer]) -> None:
        """Stores answers. They are on the disk when this returns.

        Raises:
            UserError: if the file cannot be written.
        """
        if self.folder is not None:
            lines = [json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers]
            append_text(self._file, "".join(lines))
        for answer in answers:
            self._keep(answer)

    def has(self, rule: str, budget: str, task_id: str, seed: int | None = None) -> bool:
        """Returns True if a problem has an answer by a rule.

        Args:
            rule: label of the rule.
            budget: the budget as text.
            task_id: name of the problem.
            seed: seed of the answer, or None for any.
        """
        kept = self._answers.get((rule, budget, task_id), ())
        return any(seed is None or answer.seed == seed for answer in kept)

    def all(self) -> list[Answer]:
        """Returns every answer, in the order in which problems were first answered."""
        return [answer for kept in self._answers.values() for answer in kept]

    def verdict(self, task_id: str, text: str) -> tuple[bool, str] | None:
        """Returns the verdict of an equal text to the same problem.

        Returns:
            (passed, reason), or None if the text is new.
        """
        return self._verdicts.get((task_id, text))

    def select(self, rule: str, budget: str, task_ids: Iterable[str]) -> list[Answer]:
        """Returns all answers of one rule and budget, ordered by `task_ids`."""
        return [
            answer
            for task_id in task_ids
            for answer in self._answers.get((rule, budget, task_id), ())
        ]


def _parse_answer(line: bytes) -> Answer:
    """Parses a line of answers.jsonl. Raises UserError, ValueError or TypeError."""
    fields = parse_json(line.decode(), "")
    if not isinstance(fields, dict):
        raise TypeError
    hints = field_types(Answer)
    return Answer(
        **{name: coerce(value, hints.get(name, object)) for name, value in fields.items()}
    )


def _changed_rule(key: str, before: object, now: object) -> str:
    """Names the first rule that changed, if the labels are the same."""
    if key != "rules" or not (isinstance(before, dict) and isinstance(now, dict)):
        return ""
    for label, rule in now.items():
        old = before.get(label)
        if before.keys() == now.keys() and isinstance(old, dict) and old != rule:
            if old.get("source") != rule.get("source"):
                return f" (the file of {label} has changed)"
            return f" ({label}: {next(k for k in {**old, **rule} if old.get(k) != rule.get(k))})"
    return ""
