"""Draws the packages by rank and fills in the figures of the house: a hook of MkDocs.

    python docs/scripts/draw_packages.py packages.svg

The picture and the figures are made from the source code while the site is built.
"""

from __future__ import annotations

import importlib.util
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
NAMES |= {"toml_config": "toml_config.py", "tokenizer": "tokenizer.py"}
HIDDEN = ("__main__", "harness")  # one line each that forwards to another module
BOX, GAP, ROW, WIDTH = (124, 34), 18, 92, 760


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the picture of the packages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PICTURE, content=draw(_house())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the table of figures into the page on the architecture."""
    if page.file.src_uri != PAGE:
        return markdown
    now = _house().measure(ROOT)
    rows = ["| figure | before the packages | with packages |", "| --- | ---: | ---: |"]
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


def draw(house: ModuleType) -> str:
    """Returns the picture as SVG: a row for each rank, and arrows from a package to its imports."""
    graph = house.package_graph(house.read_sources(ROOT))
    names = {n for n in {*graph, *(o for os in graph.values() for o in os)} if n not in HIDDEN}
    graph = {n: {o for o in graph.get(n, set()) if o in names} for n in names}
    top = max(house.RANKS[n] for n in names)
    places: dict[str, tuple[float, float]] = {}
    parts = []
    for rank in range(top + 1):
        row = [n for n in house.RANKS if n in names and house.RANKS[n] == rank]
        y = 20 + (top - rank) * ROW
        left = 50 + (WIDTH - 50 - len(row) * BOX[0] - (len(row) - 1) * GAP) / 2
        parts.append(f'<text x="14" y="{y + 22}" fill="#777">{rank}</text>')
        for i, name in enumerate(row):
            places[name] = left + i * (BOX[0] + GAP), y
    lines = []
    arrows = [(n, o) for n, os in sorted(reduce_graph(graph).items()) for o in sorted(os)]
    for name, other in arrows:
        # Arrows of a box leave and arrive side by side, in the order of their other ends.
        down = sorted((o for n, o in arrows if n == name), key=lambda o: places[o][0])
        up = sorted((n for n, o in arrows if o == other), key=lambda n: places[n][0])
        x0 = places[name][0] + BOX[0] * (down.index(other) + 1) / (len(down) + 1)
        x1 = places[other][0] + BOX[0] * (up.index(name) + 1) / (len(up) + 1)
        y0, y1 = places[name][1] + BOX[1], places[other][1] - 5
        bend = (y1 - y0) / 2
        path = f"M{x0:.0f},{y0} C{x0:.0f},{y0 + bend:.0f} {x1:.0f},{y1 - bend:.0f} {x1:.0f},{y1}"
        lines.append(f'<path d="{path}" fill="none" stroke="#8a8f98" marker-end="url(#tip)"/>')
    for name, (x, y) in places.items():
        is_package = (ROOT / "xflow_jax" / name).is_dir() or name == "__init__"
        fill, ink = ("#dbe7fb", "#16335f") if is_package else ("#f1f1f1", "#333")
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="{fill}"/>'
            f'<text x="{x + BOX[0] / 2:.0f}" y="{y + 22}" text-anchor="middle" fill="{ink}">'
            f"{NAMES.get(name, name)}</text>"
        )
    height = 20 + (top + 1) * ROW - 40
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8a8f98"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="14">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{tip}{"".join(lines + parts)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(_house()))
