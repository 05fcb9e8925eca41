"""Rows as text, Markdown and CSV, and the report of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from xflow_jax.checkpoints import write_atomic
from xflow_jax.evaluation.answers import Row
from xflow_jax.evaluation.plots import plot_accuracy
from xflow_jax.tasks import EXTRACTIONS, Task

_HEADER = ("rule", "budget", "steps", "n", "accuracy", "95 % CI", "passes", "seconds", "tokens/s")
_LEFT = 2  # columns of text, which are aligned on the left. The others hold numbers.


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the header and the cells of each row.

    There is a column for pass@k if k is above 1, and one for passes in the same interpreter if
    there are any.
    """
    with_k = [row for row in rows if row.k > 1]
    shared = any(row.same_interpreter for row in rows)
    header = (*_HEADER, f"pass@{with_k[0].k}") if with_k else _HEADER
    lines: list[tuple[str, ...]] = [(*header, "same interpreter") if shared else header]
    for row in rows:
        at_k = ("-" if row.pass_at_k is None else f"{row.pass_at_k:.1f} %",) if with_k else ()
        lines.append((*_cells(row), *at_k, *[str(row.same_interpreter)] * shared))
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    # Answers from elsewhere have neither steps nor seconds.
    cost = (f"{row.forward_passes:.1f}", f"{row.seconds:.1f}", f"{row.tokens_per_second:.0f}")
    return (
        row.rule,
        row.budget or "-",
        str(row.steps or "-"),
        str(row.n),
        f"{row.accuracy:.1f} %",
        f"{row.low:.1f}-{row.high:.1f}",
        *(cost if row.steps else ("-", "-", "-")),
    )


def rows_to_text(rows: Sequence[Row]) -> str:
    """Formats rows for a terminal, numbers aligned on the right."""
    lines = _lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = zip(line, widths, strict=True)
        aligned.append(
            "  ".join(c.ljust(w) if i < _LEFT else c.rjust(w) for i, (c, w) in enumerate(cells))
        )
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def rows_to_markdown(rows: Sequence[Row]) -> str:
    """Formats rows as a Markdown table."""
    header, *lines = _lines(rows)
    return markdown_table(header, lines, _LEFT)


def rows_to_csv(rows: Sequence[Row]) -> str:
    """Formats rows with all their fields as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
    return out.getvalue()


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """Builds a Markdown table.

    Args:
        header: names of the columns.
        lines: cells of each line.
        left: number of columns aligned on the left. The others are aligned on the right.
    """
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def table_legend(task: Task) -> str:
    """Describes the protocol of a task and the columns of rows."""
    s = task.config
    block = "default blocks" if s.block_length is None else f"blocks of {s.block_length}"
    options = "".join(f", {k}={v}" for k, v in s.rule_options)
    stop = f", ends at {' or '.join(s.stop)}" if s.stop else ""
    switches = "".join(
        f", {f.name}={getattr(s, f.name)}"
        for f in dataclasses.fields(s)
        if isinstance(getattr(s, f.name), bool)
    )
    return (
        f"{task.name}: {s.shots}-shot, {s.gen_length} response tokens, {block}{options}, "
        f"prompt {s.prompt!r}, code: {EXTRACTIONS[s.extraction].about} ({s.extraction}){stop}"
        f"{switches}, {s.limits.seconds:g} s for each program.\n"
        "passes: mean forward passes per sequence. seconds: decode time without compilation. "
        "tokens/s: response tokens per second."
    )


def write_report(
    folder: Path,
    task: Task,
    rows: Sequence[Row],
    notes: Sequence[str],
    tables: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Writes table.md, results.csv and, if anything was decoded, a plot.

    Args:
        folder: the output folder.
        task: the evaluated task.
        rows: one row for each rule and budget.
        notes: paragraphs below the table.
        tables: (title, Markdown) of further tables. Empty ones are left out.

    Returns:
        The files that were written.
    """
    written = [folder / "table.md", folder / "results.csv"]
    parts = [f"## {title}\n\n{text}" for title, text in tables if text]
    parts += ["## All figures"] * bool(parts) + [rows_to_markdown(rows), *notes]
    write_atomic(written[0], "\n\n".join(part.strip("\n") for part in parts) + "\n")
    write_atomic(written[1], rows_to_csv(rows))
    if any(row.steps for row in rows):
        written.append(folder / "accuracy-over-budget.png")
        plot_accuracy(rows, written[-1], title=f"{task.name}, {rows[0].n} problems")
    return written
