"""The rows of `xflow plan` as a line, a table, and a page."""

from __future__ import annotations

import argparse
from typing import Any

GIB = 2**30


_COLUMNS = {
    "preset": "model",
    "topology": "slice",
    "program": "program",
    "batch": "batch",
    "mesh": "mesh",
    "fits": "fits",
    "memory": "GiB of",
    "flops": "TFLOP",
    "ratio": "/ least",
    "bytes": "GB",
    "compute": "compute ms",
    "traffic": "memory ms",
    "links": "links ms",
    "tokens": "tokens/s",
    "decoder": "decoder %",
    "collectives": "collectives a step",
}


def row_sentence(row: dict[str, Any]) -> str:
    """One row, as soon as it is there."""
    cells = _cells(row)
    said = f"{cells['preset']} {cells['program']} on {cells['topology']}, mesh {cells['mesh']}, batch {cells['batch']}: "
    if not row["fits"]:
        return said + f"does not fit, {cells['memory']} GiB a chip"
    how = (
        f", compiled in {row['compile_seconds']:.0f} s"
        if row["compiled"]
        else ", by arithmetic alone"
    )
    return (
        said
        + f"fits, {cells['memory']} GiB a chip, at most {cells['tokens']} tokens/s ({row['bound']}){how}"
    )


def plan_table(rows: list[dict[str, Any]]) -> str:
    """All rows, columns aligned; those that say nothing are left out."""
    lines = [list(_COLUMNS.values())] + [list(_cells(row).values()) for row in rows]
    keep = [any(line[i] for line in lines[1:]) for i in range(len(_COLUMNS))]
    lines = [[cell for cell, wanted in zip(line, keep, strict=True) if wanted] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown_page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The page of a table: what was asked, the rows, and how they are to be read."""
    lines = [
        "# Plans for TPU slices",
        "",
        "Made with the TPU compiler, without a TPU, by",
        "",
        f"    {command(args)}",
        "",
        f"Prompts of {args.prompt_length} tokens, responses of {args.gen_length}, bfloat16. Each row is a program that "
        "the compiler has made; nothing here was run. A step is one forward pass with all that the decoder does around "
        "it, or one update. Memory is what the compiler assigns on a chip, of what it leaves to programs there. FLOPs, "
        "memory traffic and collectives are counted in the compiled program, with loops as often as they run; "
        "`/ least` is the FLOPs over those of the matrix products that the step cannot do without. The three times are "
        "what a step takes at the chip's peak rates if nothing else held it up; tokens/s is the bound that the largest "
        "of them sets, response tokens of all rows. `decoder %` is the share of the compiler's own cycle estimate that "
        "is neither backbone nor head; the grouped products of experts, for which it has none, count with the least "
        "time that they can take.",
        "",
    ]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        lines += [f"## {preset}", ""]
        shown = {key: name for key, name in _COLUMNS.items() if key != "preset"}
        lines += [
            "| " + " | ".join(shown.values()) + " |",
            "| " + " | ".join("---" for _ in shown) + " |",
        ]
        for row in (r for r in rows if r["preset"] == preset):
            cells = _cells(row)
            lines.append("| " + " | ".join(cells[key] for key in shown) + " |")
        lines.append("")
    return "\n".join(lines)


def command(args: argparse.Namespace) -> str:
    """The command line that asks for the same."""
    parts = ["xflow plan", f"--preset {','.join(args.preset)}"]
    parts.append(
        f"--device {args.device}" if args.device else f"--topology {','.join(args.topology)}"
    )
    parts.append(f"--program {','.join(args.program)}")
    for name in ("mesh", "steps", "json", "markdown"):
        if getattr(args, name):
            parts.append(f"--{name} {getattr(args, name)}")
    parts += [f"--batch {','.join(map(str, args.batch))}"] if args.batch else []
    parts += ["--sweep"] if args.sweep else []
    return " ".join(parts + [f"--set {text}" for text in args.set])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    memory, seconds = row["memory"], row.get("seconds", {})
    cells = dict.fromkeys(_COLUMNS, "")
    cells |= {key: str(row[key]) for key in ("preset", "topology", "program", "batch")}
    cells["mesh"] = ",".join(map(str, row["mesh"].values()))
    cells["fits"] = "yes" if row["fits"] else "no"
    cells["memory"] = f"{memory['total'] / GIB:.1f} / {memory['capacity'] / GIB:.1f}"
    if seconds:
        cells["flops"] = f"{row['flops'] / 1e12:.3g}"
        if "analytic_flops" in row:
            cells["ratio"] = f"{row['flops'] / row['analytic_flops']:.2f}"
        cells["bytes"] = f"{row['bytes'] / 1e9:.3g}"
        named = {"compute": "compute", "traffic": "memory", "links": "links"}
        cells |= {key: f"{1e3 * seconds[name]:.3g}" for key, name in named.items()}
        cells["tokens"] = f"{row['tokens_per_second']:,.0f}"
    if "decoder_share" in row:
        cells["decoder"] = f"{100 * row['decoder_share']:.1f}"
    largest = [c for c in row.get("collectives", []) if c["bytes"] >= 1e5][:3]
    cells["collectives"] = "; ".join(
        f"{c['count']:.0f} {c['kind']} of {c['group']}, {c['bytes'] / 1e6:.3g} MB" for c in largest
    )
    return cells
