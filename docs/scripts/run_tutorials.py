"""Runs the tutorials while the site is built: a hook of MkDocs.

A tutorial is a script in docs/tutorials. A cell begins with `# %%`. The comments of a cell that
begins with `# %% [markdown]` are text. The output and the figures of a cell follow its code on the
page. Links to a tutorial lead to its script in the checkout, and to its page on the site.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
_SCRATCH = tempfile.TemporaryDirectory(prefix="xflow-docs-")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page and the figures of each tutorial. Fails if a tutorial fails."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    running = {}
    for script in sorted(TUTORIALS.glob("*.py")):
        folder = Path(_SCRATCH.name) / script.stem
        folder.mkdir(exist_ok=True)
        # Its own interpreter, so that no tutorial depends on what another one has loaded.
        command = [sys.executable, __file__, str(script), str(folder)]
        environment = {**os.environ, "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        running[script.stem] = folder, process
    errors = {name: process.communicate()[1] for name, (_, process) in running.items()}
    for name, (folder, process) in running.items():
        if process.returncode:
            raise PluginError(f"the tutorial {name} failed:\n{errors[name]}")
        page = (folder / f"{name}.md").read_text()
        files.append(File.generated(config, f"tutorials/{name}.md", content=page))
        for figure in sorted(folder.glob(f"{name}-*.png")):
            uri = f"tutorials/{figure.name}"
            files.append(File.generated(config, uri, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to the scripts of the tutorials into links to their pages."""
    if page.file.src_uri.startswith("tutorials/"):  # these link to the scripts themselves
        return markdown
    return re.sub(r"(\]\((?:\.\./)*tutorials/\w+)\.py\)", r"\1.md)", markdown)


def split_cells(text: str) -> list[tuple[bool, str]]:
    """Splits a script into (is_text, source) of its cells."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        is_text = "[markdown]" in head
        if is_text:
            body = "\n".join(re.sub(r"^# ?", "", line) for line in body.splitlines())
        cells.append((is_text, body.strip("\n")))
    return cells


def run_cell(source: str, names: dict[str, object]) -> str:
    """Runs a cell and returns its output, with the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(value)
    return output.getvalue().rstrip("\n")


def save_figures(name: str, folder: Path, count: int) -> list[str]:
    """Saves the open figures of matplotlib and returns the Markdown that shows them."""
    from matplotlib import pyplot

    shown = []
    for number, identifier in enumerate(pyplot.get_fignums(), start=count):
        figure = pyplot.figure(identifier)
        figure.savefig(folder / f"{name}-{number}.png", dpi=150)
        shown.append(f"![{figure.get_label()}]({name}-{number}.png)")
    pyplot.close("all")
    return shown


def write_page(script: Path, folder: Path) -> None:
    """Runs a tutorial and writes its page and figures into a folder."""
    parts: list[str] = []
    names: dict[str, object] = {"__name__": "__main__"}
    figures = 0
    for is_text, source in split_cells(script.read_text()):
        if is_text:
            parts.append(source)
            continue
        output = run_cell(source, names)
        parts.append(f"```python\n{source}\n```")
        if output:
            parts.append(f"```text\n{output}\n```")
        shown = save_figures(script.stem, folder, figures + 1)
        figures += len(shown)
        parts += shown
    note = f"""
    This page was made by running [{script.name}]({script.name}), which you can download.
    """
    parts.append(textwrap.dedent(note).strip())
    (folder / f"{script.stem}.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), Path(sys.argv[2]))
