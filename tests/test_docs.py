"""README and docs: length, links, snippets, commands and quoted messages."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from xflow_jax.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
# Hosts of package registries, and of files that a page might load.
REGISTRY = re.compile(
    r"(py" r"pi\.org|python" r"hosted\.org|registry\.npm" r"js|dl-cdn\.|jsdeliv" r"r)"
)


def page_id(path: Path) -> str:
    """Returns a short name of a page for the report of pytest."""
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """Returns a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def fences(text: str, language: str) -> list[str]:
    """Returns the fenced blocks of a language."""
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Returns the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def commands(text: str) -> list[list[str]]:
    """Returns the words after `xflow` of each command in fenced bash blocks."""
    found = []
    for block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "xflow" in words[:4]:
                found.append(words[words.index("xflow") + 1 :])
    return found


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 600


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), f"{target} does not exist"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{target} has no such heading"


@pytest.mark.parametrize(
    "path", [p for p in PAGES if "```python" in p.read_text()] + TUTORIALS, ids=page_id
)
def test_snippets_parse_and_import_names_that_exist(path):
    text = path.read_text()
    for code in [text] if path.suffix == ".py" else fences(text, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("xflow_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        aliases = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name.startswith("xflow_jax")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
                module = importlib.import_module(aliases[node.value.id])
                assert hasattr(module, node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize(
    "path", [p for p in PAGES + TUTORIALS if "xflow " in p.read_text()], ids=page_id
)
def test_commands_parse(path):
    text = path.read_text()
    if path.suffix == ".py":
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    for words in commands(text):
        if words[:1] != ["--version"]:
            assert words[0] in COMMANDS
            args = build_parser(words[0]).parse_all(words)
            assert isinstance(args, argparse.Namespace) and args.command == words[0]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_programs_and_configurations_exist(path):
    text = path.read_text()
    for package, module in re.findall(r"python -m (train|convert)\.(\w+)", text):
        assert (ROOT / package / f"{module}.py").exists()
    for name in re.findall(r"configs/\w+\.toml", text):
        assert (ROOT / name).exists()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE)


def test_the_table_of_equations_names_code_that_exists():
    text = (DOCS / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+\.py)`", text):
        name = name.removeprefix("xflow_jax/")
        assert (ROOT / "xflow_jax" / name).exists() or (ROOT / name).exists(), name
    pairs = re.findall(r"`([\w/]+\.py): (\w+)`", text)
    assert pairs
    for name, function in pairs:
        assert re.search(rf"^def {function}\(", (ROOT / "xflow_jax" / name).read_text(), re.M), name


def test_the_picture_of_the_packages_is_current(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "scripts")
    from draw_packages import draw

    from tests import house

    again = "python docs/scripts/draw_packages.py docs/packages.svg"
    assert (DOCS / "packages.svg").read_text() == draw(house), f"imports have changed: {again}"


@pytest.mark.parametrize("path", sorted((DOCS / "reference").glob("*.md")), ids=page_id)
def test_the_reference_has_functions_that_share_the_name_of_their_module(path):
    package = path.stem
    if package == "xflow_jax":
        return
    door = importlib.import_module(f"xflow_jax.{package}")
    for name in door.__all__:
        if callable(getattr(door, name)) and (ROOT / "xflow_jax" / package / f"{name}.py").exists():
            # The generator of the reference takes the module for the function.
            assert f"::: xflow_jax.{package}.{name}.{name}\n" in path.read_text()


def message_text(node: ast.expr) -> str:
    """Returns the text of a string expression, with an ellipsis for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message_text(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp):
        return message_text(node.left) + message_text(node.right)
    return "…"


def test_the_messages_of_the_troubleshooting_page_are_real():
    nodes = [
        node
        for top in ("xflow_jax", "train", "convert")
        for file in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    kinds = (ast.JoinedStr, ast.Constant, ast.BinOp)
    texts = "\n".join({message_text(node) for node in nodes if isinstance(node, kinds)})
    page = (DOCS / "guides" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 20
    patterns = {m: "[^\n]*".join(map(re.escape, m.strip("… ").split("…"))) for m in quoted}
    assert [m for m, pattern in patterns.items() if not re.search(pattern, texts)] == []


def test_no_file_names_a_package_registry():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".png", ".npz", ".safetensors", ".gz") or not path.is_file():
            continue
        found = REGISTRY.search(path.read_text(errors="replace"))
        assert found is None, f"{name} names {found[0]}"
