"""The direction of imports: down only, no cycles, and torch and Linen behind their fences."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "convert")  # they import the library, and never each other

# A module of xflow_jax (a folder counts as one) imports only from its own rank and below.
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            "strict config sandbox sharding storage hosts stats plan_chips plan_hlo plan_report hlo largest",
            "models losses belief policy tasks tokenizer optimizers",
            "rules rivals decode sight checkpoint data hf hf_names hf_write",
            "steps alignment rollout generate lm choices records identity",
            "evaluate bench bench_cache bench_torch plan plan_programs plot reports likelihood harness demo answer",
            "cli __init__ __main__",
        ]
    )
    for name in names.split()
}
TORCH = ("convert.verify", "xflow_jax.bench_torch")
# Their text runs in bare interpreters, of which that of child shares its memory with untrusted programs.
SCRIPTS = ("xflow_jax.sandbox.launch", "xflow_jax.sandbox.child")
LINEN = "xflow_jax.models"


@dataclass(frozen=True)
class Import:
    module: str  # as written, made absolute: what stands after `import`, or `from` and the name, joined
    line: int
    in_function: bool = False
    typing_only: bool = False  # never runs, so it closes no circle and brings in no library


def imports(tree: ast.AST, module: str, is_package: bool, **where: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, **where)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: (1 if is_package else 0) - node.level or None] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, **where)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, module, is_package, **{**where, "in_function": True})
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(node, module, is_package, **{**where, "typing_only": True})
        else:
            yield from imports(node, module, is_package, **where)


def read(root: Path) -> dict[str, list[Import]]:
    """Dotted module name -> its imports, for every module of the library and the programs under `root`."""
    found = {}
    for path in sorted(p for top in ("xflow_jax", *PROGRAMS) for p in (root / top).rglob("*.py")):
        is_package = path.name == "__init__.py"
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[module] = list(imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package))
    return found


def target(name: str, modules: dict[str, list[Import]]) -> str:
    """The module that an imported name lies in: the longest prefix that is a file."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def part(module: str) -> str:
    """The name under which a module of xflow_jax stands in RANKS."""
    return module.split(".")[1] if "." in module else "__init__"


def complaints(modules: dict[str, list[Import]]) -> list[str]:
    """One sentence for each import that points the wrong way, and for each module without a rank."""
    found, graph = [], {}
    for module, its_imports in modules.items():
        top = module.split(".")[0]
        if top == "xflow_jax" and part(module) not in RANKS:
            found.append(f"{module} has no rank: give {part(module)} a place in RANKS of {Path(__file__).name}")
            continue
        for imported in its_imports:
            where, other = f"{module}, line {imported.line}", target(imported.module, modules)
            other_top = other.split(".")[0]
            if other in modules and other != module and not imported.typing_only:
                graph.setdefault(module, set()).add(other)
            if top == "xflow_jax" and other_top in PROGRAMS:
                found.append(f"{where}: the library must not import the program {other}")
            elif top in PROGRAMS and other_top in PROGRAMS and top != other_top:
                found.append(f"{where}: {top}/ must not import {other}")
            elif top == other_top == "xflow_jax" and part(other) in RANKS and RANKS[part(other)] > RANKS[part(module)]:
                found.append(f"{where}: {part(module)} (rank {RANKS[part(module)]}) must not import {other}"
                             f" (rank {RANKS[part(other)]})")  # fmt: skip
            if imported.typing_only:
                continue
            if other_top == "torch" and not (module in TORCH and imported.in_function):
                found.append(f"{where}: torch is imported only inside the functions of {' and '.join(TORCH)}")
            if module in SCRIPTS and imported.module.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{where}: a script of the sandbox imports only the standard library")
            if module == SCRIPTS[1] and imported.module.split(".")[0] == "ctypes":
                found.append(f"{where}: ctypes must stay out of the sandbox's zygote")
            if other in SCRIPTS:
                found.append(f"{where}: {other} is a script, and is not imported")
            if f"{imported.module}.".startswith("flax.linen.") and not f"{module}.".startswith(f"{LINEN}."):
                found.append(f"{where}: flax.linen is imported only in {LINEN}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
    return found


def test_imports_go_down_only():
    modules = read(ROOT)
    assert {"xflow_jax", "xflow_jax.config"} <= set(modules)
    assert complaints(modules) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"xflow_jax/losses.py": "from xflow_jax.decode import step"}, "must not import xflow_jax.decode (rank 2)"),
        ({"xflow_jax/losses.py": "from xflow_jax import decode"}, "must not import xflow_jax.decode (rank 2)"),
        ({"xflow_jax/losses.py": "from .decode import step"}, "must not import xflow_jax.decode (rank 2)"),
        ({"xflow_jax/models/llada.py": "from ..decode import step"}, "must not import xflow_jax.decode (rank 2)"),
        ({"xflow_jax/losses.py": "def f():\n    import xflow_jax.decode"}, "losses, line 2: losses (rank 1) must not"),
        ({"xflow_jax/losses.py": "import xflow_jax"}, "losses (rank 1) must not import xflow_jax (rank 5)"),
        ({"xflow_jax/losses.py": "from . import load"}, "losses (rank 1) must not import xflow_jax (rank 5)"),
        ({"xflow_jax/odd.py": ""}, "xflow_jax.odd has no rank: give odd a place in RANKS"),
        ({"xflow_jax/losses.py": "import train.setup"}, "the library must not import the program train.setup"),
        ({"train/align.py": "import convert.names"}, "train/ must not import convert.names"),
        ({"convert/names.py": "from train import setup"}, "convert/ must not import train.setup"),
        ({"convert/names.py": "def f():\n    import torch"}, "torch is imported only inside the functions"),
        ({"convert/verify.py": "import torch.nn"}, "torch is imported only inside the functions"),
        ({"xflow_jax/steps.py": "from flax import linen as nn"}, "flax.linen is imported only in xflow_jax.models"),
        ({"train/align.py": "from flax.linen import Module"}, "flax.linen is imported only in xflow_jax.models"),
        ({"xflow_jax/sandbox/child.py": "import numpy"}, "a script of the sandbox imports only the standard library"),
        ({"xflow_jax/sandbox/child.py": "from ctypes import CDLL"}, "ctypes must stay out of the sandbox's zygote"),
        (
            {"xflow_jax/sandbox/x.py": "import xflow_jax.sandbox.launch", "xflow_jax/sandbox/launch.py": ""},
            "xflow_jax.sandbox.launch is a script, and is not imported",
        ),
        (
            {"xflow_jax/losses.py": "from xflow_jax.belief import x", "xflow_jax/belief.py": "import xflow_jax.losses"},
            "modules import each other in a circle",
        ),
    ],
)
def test_a_wrong_import_is_found(tmp_path, files, complaint):
    rest = ["xflow_jax/__init__.py", "xflow_jax/decode.py", "train/setup.py", "convert/names.py"]
    for name, source in {**dict.fromkeys(rest, ""), **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    found = complaints(read(tmp_path))
    assert len(found) == 1 and complaint in found[0]


def test_right_imports_pass(tmp_path):
    files = {
        "xflow_jax/__init__.py": "from xflow_jax.models import build\nfrom . import decode",
        "xflow_jax/decode.py": "from flax import struct\nfrom xflow_jax import models\nimport jax, xflow_jax.rules",
        "xflow_jax/rules.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import xflow_jax.decode",
        "xflow_jax/models/__init__.py": "from xflow_jax.models.llada import LLaDA",
        "xflow_jax/models/llada.py": "from flax import linen as nn\nfrom .layers import Linear",
        "xflow_jax/models/layers.py": "import flax.linen",
        "train/setup.py": "import xflow_jax as xf",
        "train/align.py": "from train.setup import run",
        "convert/verify.py": "def main():\n    import torch",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert complaints(read(tmp_path)) == []
