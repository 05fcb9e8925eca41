"""Formats for the rows of `xflow plan`."""

from __future__ import annotations

from collections.abc import Sequence

from xflow_jax.planning.cost_model import PlanRow
from xflow_jax.planning.hardware import GIB
from xflow_jax.planning.planner import PlanRequest

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
# Collectives in the last column: the largest ones, from this many bytes on.
_MOST_COLLECTIVES, _LEAST_BYTES = 3, 1e5

_EXPLANATION = (
    "Prompts of {prompt} tokens, responses of {response}, {dtype}. Each row is a program that the "
    "compiler has made. Nothing here was run. A step is one forward pass with all that the "
    "decoder does around it, or one update. Memory is what the compiler assigns on a chip, of what "
    "it leaves to programs there. FLOPs, memory traffic and collectives are counted in the "
    "compiled program, with loops as often as they run. `/ least` is the FLOPs over those of the "
    "matrix products that the step cannot do without. The three times are what a step takes at "
    "the chip's peak rates if nothing else delays it. tokens/s is the bound that the largest of "
    "them sets, in response tokens of all rows. `decoder %` is the share of the compiler's own "
    "cycle estimate that is neither backbone nor head. For the grouped products of experts it has "
    "no estimate, so these count with the least time that they can take."
)


def row_sentence(row: PlanRow) -> str:
    """Formats one row as a sentence."""
    cells = _cells(row)
    start = (
        f"{cells['preset']} {cells['program']} on {cells['topology']}, mesh {cells['mesh']}, "
        f"batch {cells['batch']}:"
    )
    if not row["fits"]:
        return f"{start} does not fit, {cells['memory']} GiB a chip"
    source = "by arithmetic alone"
    if row["compiled"]:
        source = f"compiled in {row['compile_seconds']:.0f} s"
    return (
        f"{start} fits, {cells['memory']} GiB a chip, "
        f"at most {cells['tokens']} tokens/s ({row['bound']}), {source}"
    )


def plan_table(rows: Sequence[PlanRow]) -> str:
    """Formats rows as an aligned table without its empty columns."""
    lines = [list(_COLUMNS.values())] + [list(_cells(row).values()) for row in rows]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    aligned = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def markdown_page(rows: Sequence[PlanRow], request: PlanRequest, command: str) -> str:
    """Formats rows as a page with a table for each model.

    Args:
        rows: the rows of `plan_rows`.
        request: the request that they answer.
        command: the command line that makes the page.

    Returns:
        Markdown.
    """
    lines = [
        "# Plans for TPU slices",
        "",
        "Made with the TPU compiler, without a TPU, by",
        "",
        f"    {command}",
        "",
        _EXPLANATION.format(
            prompt=request.prompt_length, response=request.gen_length, dtype=request.dtype
        ),
        "",
    ]
    columns = {key: title for key, title in _COLUMNS.items() if key != "preset"}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        lines += [f"## {preset}", ""]
        lines.append("| " + " | ".join(columns.values()) + " |")
        lines.append("| " + " | ".join("---" for _ in columns) + " |")
        for row in (r for r in rows if r["preset"] == preset):
            cells = _cells(row)
            lines.append("| " + " | ".join(cells[key] for key in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: PlanRow) -> dict[str, str]:
    """Formats the values of a row by column."""
    memory, seconds = row["memory"], row.get("seconds", {})
    cells = dict.fromkeys(_COLUMNS, "")
    cells |= {key: str(row[key]) for key in ("preset", "topology", "program", "batch")}
    if name := row.get("cache", {}).get("cache"):
        cells["program"] += f", {name} cache"
    if row.get("dtype") == "int8":
        cells["program"] += ", int8"
    cells["mesh"] = ",".join(map(str, row["mesh"].values()))
    cells["fits"] = "yes" if row["fits"] else "no"
    cells["memory"] = f"{memory['total'] / GIB:.1f} / {memory['capacity'] / GIB:.1f}"
    if seconds:
        cells["flops"] = f"{row['flops'] / 1e12:.3g}"
        if "analytic_flops" in row:
            cells["ratio"] = f"{row['flops'] / row['analytic_flops']:.2f}"
        cells["bytes"] = f"{row['bytes'] / 1e9:.3g}"
        resources = {"compute": "compute", "traffic": "memory", "links": "links"}
        cells |= {key: f"{1e3 * seconds[name]:.3g}" for key, name in resources.items()}
        cells["tokens"] = f"{row['tokens_per_second']:,.0f}"
    if "decoder_share" in row:
        cells["decoder"] = f"{100 * row['decoder_share']:.1f}"
    large = [c for c in row.get("collectives", []) if c["bytes"] >= _LEAST_BYTES]
    cells["collectives"] = "; ".join(
        f"{c['count']:.0f} {c['kind']} of {c['group']}, {c['bytes'] / 1e6:.3g} MB"
        for c in large[:_MOST_COLLECTIVES]
    )
    return cells
