"""What an evaluation keeps: every answer as a line of jsonl, from which a second call continues, and tables of them."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

from xflow_jax.evaluation.answers import Row

_HEADER = ("rule", "budget", "steps", "n", "accuracy", "95 % CI", "passes", "seconds", "tokens/s")


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The header and a line for each row; pass@k has a column where k is not 1."""
    several = [row for row in rows if row.k > 1]
    lines = [(*_HEADER, f"pass@{several[0].k}") if several else _HEADER]
    for row in rows:
        at_k = ("-" if row.pass_at_k is None else f"{row.pass_at_k:.1f} %",) if several else ()
        lines.append((*_cells(row), *at_k))
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    interval = f"{row.low:.1f}-{row.high:.1f}"
    # Answers made elsewhere have neither steps nor seconds.
    decoded = (f"{row.forward_passes:.1f}", f"{row.seconds:.1f}", f"{row.tokens_per_second:.0f}")
    decoded = decoded if row.steps else ("-", "-", "-")
    return (
        row.rule,
        row.budget or "-",
        str(row.steps or "-"),
        str(row.n),
        f"{row.accuracy:.1f} %",
        interval,
        *decoded,
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal, numbers to the right."""
    lines = _lines(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
               for line in lines]  # fmt: skip
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header, *lines = _lines(rows)
    return markdown_lines(header, lines, left=2)


def markdown_lines(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns stand on the left, the others, numbers, on the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with all their fields as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
    return out.getvalue()
