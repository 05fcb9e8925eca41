"""Draws the packages by rank and fills in the figures of the house: a hook of MkDocs.

    python docs/scripts/draw_packages.py docs/packages.svg

The build of the site draws the picture again, and fills the figures in.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PICTURE = "packages.svg"
FIGURES = "<!-- figures of the house -->"
PAGE = "architecture.md"
# `python -m tests.house` for the layout without packages. A figure without an entry is left out.
BEFORE = {
    "top-level names in the library": "51",
    "arrows between them": "193",
    "modules in circles of imports": "5",
    "longest function": "121 lines (decode.decode)",
    "parameters that are Any or bare": "214 of 1708 (12.5 %)",
    "family comparisons outside models, checkpoints": "14",
    "docstrings with a first line above 12 words": "520 of 719",
    "semicolons in docstrings": "320",
    "lines above 100 columns": "1545",
}
NAMES = {"__init__": "xflow_jax", "lm": "lm.py", "errors": "errors.py", "types": "types.py"}
NAMES |= {"toml_config": "toml_config.py"}
HIDDEN = ("__main__",)  # a line that forwards to another module
BOX, GAP, LANE, ROW, WIDTH = (124, 34), 18, 8, 92, 760


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the picture of the packages."""
    from mkdocs.structure.files import File

    committed = files.get_file_from_path(PICTURE)
    if committed is not None:
        files.remove(committed)
    files.append(File.generated(config, PICTURE, content=draw(_house())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the table of figures into the page on the architecture."""
    if page.file.src_uri != PAGE:
        return markdown
    now = _house().measure(ROOT)
    rows = ["| figure | flat layout (version 0.1.0) | packages |", "| --- | ---: | ---: |"]
    for name, before in BEFORE.items():
        rows.append(f"| {name} | {before} | {now[name].replace('xflow_jax.', '')} |")
    if FIGURES not in markdown:
        raise ValueError(f"{PAGE} has no place for the figures: {FIGURES}")
    return markdown.replace(FIGURES, "\n".join(rows))


def _house() -> ModuleType:
    """Loads tests/house.py, which reads imports and measures the code."""
    name = "house_of_the_docs"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def reduce_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Drops arrows that a longer way implies."""
    below: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set()
            for other in graph.get(name, set()):
                below[name] |= {other} | reach(other)
        return below[name]

    return {
        name: {o for o in others if not any(o in reach(p) for p in others if p != o)}
        for name, others in graph.items()
    }


def place(
    rows: list[list[str]], arrows: list[tuple[str, str]], ranks: dict[str, int]
) -> tuple[dict[str, tuple[float, float]], dict[tuple[str, str], list[str]]]:
    """Places boxes and lanes. An arrow passes a row in a lane of its own, never behind a box.

    Returns:
        The (left, top) of each box and lane, and for each arrow the names of its stops.
    """
    ways = {}
    for name, other in arrows:
        lanes = []
        for rank in range(ranks[name] - 1, ranks[other], -1):
            lanes.append(f"{name}>{other}>{rank}")
            rows[rank].append(lanes[-1])
        ways[name, other] = [name, *lanes, other]
    links = [link for way in ways.values() for link in itertools.pairwise(way)]
    centre = {n: (i + 0.5) / len(row) for row in rows for i, n in enumerate(row)}
    for sweep in range(24):
        for row in rows[::-1] if sweep % 2 else rows:
            # The mean place of the neighbours, which keeps crossings few.
            mean = {}
            for name in row:
                near = [centre[b if a == name else a] for a, b in links if name in (a, b)]
                mean[name] = sum(near) / len(near) if near else centre[name]
            row.sort(key=lambda n: (mean[n], n))
            centre |= {name: (i + 0.5) / len(row) for i, name in enumerate(row)}
    places: dict[str, tuple[float, float]] = {}
    for rank, row in enumerate(rows):
        widths = [LANE if ">" in name else BOX[0] for name in row]
        gap = (WIDTH - 60 - sum(widths)) / (len(row) + 1)
        left = 50 + gap
        for name, width in zip(row, widths, strict=True):
            places[name] = left, 20 + (len(rows) - 1 - rank) * ROW
            left += width + gap
    return places, ways


def route(way: list[str], ways: list[list[str]], places: dict[str, tuple[float, float]]) -> str:
    """Returns the SVG path of an arrow: curves between the rows, straight lines in the lanes."""
    # Arrows of a box leave and arrive side by side, in the order of their other ends.
    down = sorted((w[1] for w in ways if w[0] == way[0]), key=lambda n: places[n])
    up = sorted((w[-2] for w in ways if w[-1] == way[-1]), key=lambda n: places[n])
    x = places[way[0]][0] + BOX[0] * (down.index(way[1]) + 1) / (len(down) + 1)
    y = places[way[0]][1] + BOX[1]
    path = f"M{x:.0f},{y}"
    for stop in way[1:]:
        left, top = places[stop]
        if stop == way[-1]:
            end, top = left + BOX[0] * (up.index(way[-2]) + 1) / (len(up) + 1), top - 5
        else:
            end = left + LANE / 2
        bend = (top - y) / 2
        path += f" C{x:.0f},{y + bend:.0f} {end:.0f},{top - bend:.0f} {end:.0f},{top}"
        x, y = end, top + BOX[1]
        if stop != way[-1]:
            path += f" L{x:.0f},{y}"
    return path


def box(x: float, y: float, text: str, is_package: bool) -> str:
    """Returns a box with its name as SVG."""
    fill, ink = ("#dbe7fb", "#16335f") if is_package else ("#e9e9e9", "#333")
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="{fill}"/>'
        f'<text x="{x + BOX[0] / 2:.0f}" y="{y + 22:.0f}" text-anchor="middle" fill="{ink}">'
        f"{text}</text>"
    )


def draw(house: ModuleType) -> str:
    """Returns the picture as SVG: a row for each rank, and arrows from a package to its imports."""
    graph = house.package_graph(house.read_sources(ROOT))
    names = {n for n in {*graph, *(o for os in graph.values() for o in os)} if n not in HIDDEN}
    graph = {n: {o for o in graph.get(n, set()) if o in names} for n in names}
    rows = [
        [n for n in house.RANKS if n in names and house.RANKS[n] == rank]
        for rank in range(max(house.RANKS[n] for n in names) + 1)
    ]
    arrows = [(n, o) for n, os in sorted(reduce_graph(graph).items()) for o in sorted(os)]
    places, ways = place(rows, arrows, house.RANKS)
    stroke = 'fill="none" stroke="#8a8f98" marker-end="url(#tip)"'
    parts = [f'<path d="{route(w, list(ways.values()), places)}" {stroke}/>' for w in ways.values()]
    for rank in range(len(rows)):
        y = 42 + (len(rows) - 1 - rank) * ROW
        parts.append(f'<text x="14" y="{y}" fill="#777">{rank}</text>')
    for name in sorted(names):
        is_package = (ROOT / "xflow_jax" / name).is_dir() or name == "__init__"
        parts.append(box(*places[name], NAMES.get(name, name), is_package))
    y = 20 + (len(rows) - 1) * ROW + 70
    parts.append(box(70, y, "package", True) + box(70 + BOX[0] + GAP, y, "module", False))
    x = 70 + 2 * (BOX[0] + GAP) + 10
    parts.append(f'<path d="M{x},{y + 17} L{x + 48},{y + 17}" {stroke}/>')
    parts.append(f'<text x="{x + 60}" y="{y + 22}" fill="#333">imports. Left: the rank</text>')
    height = y + BOX[1] + 16
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8a8f98"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="14">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{tip}{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(_house()))
