"""Compares decoders at equal forward passes, over all their thresholds.

    python docs/scripts/compare_curves.py RUN... [--first flow] [--every] [--picture curves.png]

RUN is a folder of `xflow evaluate --out`. Rules that differ only in their threshold (`tau`, `jump`,
`gamma`, `factor`, `left`, `replace_above`) or in their budget are one curve, but a flow with
`factor` or `left` is another curve than one without. With several folders, for several models, each
curve has the name of its folder in brackets.
The best point of the first curve is compared with each other curve at the same mean passes, and
with `--every` each of its points. There another decoder is a mixture: a random share of the
problems is answered with the threshold below that number of passes, and the rest with the one
above. p is the median over 101 such mixtures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from xflow_jax.evaluation import Answer, Row, aup_table
from xflow_jax.evaluation.answers import summarize_answers
from xflow_jax.evaluation.plots import plot_accuracy
from xflow_jax.evaluation.statistics import mcnemar
from xflow_jax.evaluation.tables import markdown_table

MIXTURES = 101
HEADER = ("decoder", "passes", "solved", "only the first", "only the other", "p")


@dataclasses.dataclass(frozen=True)
class Point:
    """One threshold of a decoder.

    Attributes:
        row: its summary.
        passed: task_id -> verdict.
    """

    row: Row
    passed: dict[str, bool]


def curve_name(rule: str) -> str:
    """Returns a rule without its threshold."""
    kind, _, options = rule.partition(":")
    # Flows whose masks enter by a factor or from the left are decoders of their own.
    named = options if kind == "factor" else re.sub(r"\b(factor|left)=[^,]*", r"\1", options)
    thresholds = r"(tau|jump|gamma|factor|replace_above)="
    kept = [o for o in named.split(",") if o and not re.match(thresholds, o)]
    return f"{kind}:{','.join(kept)}" if kept else kind


def read_curves(folder: Path, label: str = "") -> dict[str, list[Point]]:
    """Reads the points of each decoder, in the order of their passes.

    Args:
        folder: the run.
        label: end of the names of its curves. With one, the only curve of a run is named without
            its options.
    """
    run = json.loads((folder / "run.json").read_text())
    answers: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for line in (folder / "answers.jsonl").read_text().splitlines():
        answer = Answer(**json.loads(line))
        answers[answer.rule, answer.budget].append(answer)
    names = {rule: curve_name(rule) for rule, _ in answers}
    if label and len(set(names.values())) == 1:
        names = {rule: rule.partition(":")[0] for rule in names}
    curves: dict[str, list[Point]] = defaultdict(list)
    for (rule, budget), found in answers.items():
        name, length = names[rule] + label, run["settings"]["gen_length"]
        row = summarize_answers(name, budget, 0, length, found)
        curves[row.rule].append(Point(row, {a.task_id: a.passed for a in found}))
    return {k: sorted(v, key=lambda p: p.row.forward_passes) for k, v in curves.items()}


def mix(curve: Sequence[Point], passes: float, rng: random.Random) -> dict[str, bool]:
    """Returns verdicts of a curve at a number of passes, mixed from its neighbouring points."""
    below = [p for p in curve if p.row.forward_passes <= passes] or [curve[0]]
    above = [p for p in curve if p.row.forward_passes >= passes] or [curve[-1]]
    low, high = below[-1], above[0]
    width = high.row.forward_passes - low.row.forward_passes
    share = (passes - low.row.forward_passes) / width if width > 0 else 0.0
    return {i: (high if rng.random() < share else low).passed[i] for i in low.passed}


def compare(best: Point, curve: Sequence[Point]) -> tuple[str, ...]:
    """Compares a point with a curve at the same passes, as cells of the table."""
    passes, rng = best.row.forward_passes, random.Random(0)
    mixed = [mix(curve, passes, rng) for _ in range(MIXTURES)]
    tests = [mcnemar([(best.passed[i], other[i]) for i in best.passed]) for other in mixed]
    solved = statistics.mean(sum(other.values()) / len(other) for other in mixed)
    # Outside of the curve, its end stands for it.
    used = min(max(passes, curve[0].row.forward_passes), curve[-1].row.forward_passes)
    middle = sorted(tests, key=lambda test: test[2])[MIXTURES // 2]
    first, second, p = middle
    return f"{used:.2f}", f"{100 * solved:.1f}", str(first), str(second), f"{p:.2g}"


def main() -> None:
    """Prints the tables, and draws the picture if it has a name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--first", default="flow", help="beginning of the first curve's name")
    parser.add_argument("--every", action="store_true", help="compare every point of that curve")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    curves: dict[str, list[Point]] = {}
    for folder in args.folders:
        curves |= read_curves(folder, f" [{folder.name}]" if args.folders[1:] else "")
    rows = [point.row for points in curves.values() for point in points]
    firsts = [p for name, points in curves.items() if name.startswith(args.first) for p in points]
    if not firsts:
        parser.error(f"--first: no curve begins with {args.first!r}. There are {', '.join(curves)}")
    lines: list[tuple[str, ...]] = []
    for point in firsts if args.every else [max(firsts, key=lambda p: p.row.accuracy)]:
        row = point.row
        lines.append((row.rule, f"{row.forward_passes:.2f}", f"{row.accuracy:.1f}", *"   "))
        lines += [(name, *compare(point, c)) for name, c in curves.items() if name != row.rule]
    print(markdown_table(HEADER, lines, 1), end="\n")
    print(aup_table(rows), end="")
    if args.picture:
        plot_accuracy(rows, args.picture, args.title)


if __name__ == "__main__":
    main()
