"""Compares runs of `xflow evaluate --out`, answer by answer, and prints a table.

    python docs/scripts/compare_runs.py BASE OTHER ...

Each rule and budget of the other folders is compared with the same one of the first folder.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from xflow_jax.evaluation.statistics import mcnemar
from xflow_jax.evaluation.tables import markdown_table

Cell = tuple[str, str]  # a rule and a budget
HEADER = ("rule", "budget", "run", "accuracy", "passes", "ms", "lost", "won", "p", "same text")


def read_run(folder: Path) -> dict[Cell, dict[str, dict]]:
    """Reads the first answer to each problem, by rule and budget."""
    run: dict[Cell, dict[str, dict]] = defaultdict(dict)
    for line in (folder / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        run[answer["rule"], answer["budget"]].setdefault(answer["task_id"], answer)
    return run


def cells_of(base: dict[str, dict], other: dict[str, dict]) -> tuple[str, ...]:
    """Formats the figures of a run beside the same rule and budget of the base.

    Milliseconds are of a decode, without compilation, for each answer.
    """
    n, answers = len(other), list(other.values())
    accuracy = 100 * sum(a["passed"] for a in answers) / n
    passes = sum(a["forward_passes"] for a in answers) / n
    seconds = sum(a["seconds"] for a in answers) / n
    figures = (f"{accuracy:.1f}", f"{passes:.1f}", f"{1e3 * seconds:.1f}")
    if base is other:
        return (*figures, "", "", "", "")
    pairs = [(base[i]["passed"], a["passed"]) for i, a in other.items()]
    lost, won, p = mcnemar(pairs)
    same = sum(base[i]["text"] == a["text"] for i, a in other.items()) / n
    return (*figures, str(lost), str(won), f"{p:.3f}", f"{100 * same:.0f} %")


def main(folders: list[str]) -> None:
    """Prints the table of these folders."""
    runs = {Path(folder).name: read_run(Path(folder)) for folder in folders}
    base = next(iter(runs.values()))
    lines = [
        (rule, budget, name, *cells_of(base[rule, budget], run[rule, budget]))
        for rule, budget in base
        for name, run in runs.items()
        if run.get((rule, budget), {}).keys() == base[rule, budget].keys()
    ]
    print(markdown_table(HEADER, lines, 3), end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", help="a folder of xflow evaluate --out")
    main(parser.parse_args().folders)
