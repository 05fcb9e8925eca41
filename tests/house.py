"""Measures the structure of the code: `python -m tests.house [ROOT]`.

The same functions serve tests/test_house.py, which fails if a rule of the layout is broken.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "xflow_jax"
PROGRAMS = ("train", "convert")  # they import the library, and never each other

# A package or module of the library imports lower ranks only.
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            "errors",
            "types input_files",
            "toml_config parallel sandbox tokenizer",
            "models tasks",
            "checkpoints decoding",
            "lm training",
            "evaluation planning benchmarks serving",
            "cli __init__ __main__",
        ]
    )
    for name in names.split()
}
ENTRY_POINTS = ("__main__",)  # a line that forwards to another module's main
TORCH = ("convert.verify", "xflow_jax.benchmarks.torch_baseline")
# Their text runs in bare interpreters.
SCRIPTS = tuple(
    f"xflow_jax.sandbox.{name}"
    for name in ("launch", "child", "codec", "seccomp", "program", "check_names", "judge", "zygote")
)
PROGRAM = "xflow_jax.sandbox.program"  # shares its memory with untrusted programs
LINEN = "xflow_jax.models"
# Packages in which no function may exceed MAX_FUNCTION lines.
SHORT_FUNCTIONS = ("decoding", "models", "training")
MAX_FUNCTION = 60
FAMILY_PACKAGES = ("models", "checkpoints")  # only these may compare a family's name
FAMILIES = ("llada", "llada2", "lladamoe", "illada", "dream", "sdar", "fast_dllm")
MAX_ANY = 0.02  # share of all parameters that may be Any
# A docstring's first line is a verb or noun phrase of at most this many words.
MAX_FIRST_LINE = 12
OPENINGS = ("What", "Who", "How", "Where", "Of", "Whether", "When", "Which", "Whose", "As")
# Calls whose arguments a user reads, besides `raise` and the keyword `help`.
MESSAGE_CALLS = ("require", "print", "warn", "error", "exit")
SEMICOLON = re.compile(r"(?:^|\w)[^\w\s;]*;\s+\w")  # between two clauses, not a separator alone

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: the name as written, made absolute. For `from a import b` it is "a.b".
        line: line number.
        in_function: True inside a function.
        typing_only: True under `if TYPE_CHECKING`.
    """

    module: str
    line: int
    in_function: bool = False
    typing_only: bool = False


@dataclass(frozen=True)
class Source:
    """A parsed file of the repository."""

    path: Path
    module: str
    tree: ast.Module
    text: str
    is_package: bool

    @functools.cached_property
    def imports(self) -> list[Import]:
        """All imports of the file, in functions and under TYPE_CHECKING too."""
        return list(find_imports(self.tree, self.module, self.is_package))

    @property
    def package(self) -> str:
        """Top-level name below the library: a package or a module."""
        return self.module.split(".")[1] if "." in self.module else "__init__"


def find_imports(tree: ast.AST, module: str, is_package: bool, **where: bool) -> Iterator[Import]:
    """Yields the imports below a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, **where)
        elif isinstance(node, ast.ImportFrom):
            base: list[str] = []
            if node.level:
                base = module.split(".")[: (1 if is_package else 0) - node.level or None]
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{prefix}.{alias.name}", node.lineno, **where)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from find_imports(node, module, is_package, **{**where, "in_function": True})
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from find_imports(node, module, is_package, **{**where, "typing_only": True})
        else:
            yield from find_imports(node, module, is_package, **where)


def read_sources(root: Path) -> dict[str, Source]:
    """Reads every module of the library and the programs: dotted name -> source."""
    found = {}
    for top in (LIBRARY, *PROGRAMS):
        for path in sorted((root / top).rglob("*.py")):
            is_package = path.name == "__init__.py"
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            found[module] = Source(path, module, ast.parse(text), text, is_package)
    return found


def target(name: str, sources: dict[str, Source]) -> str:
    """Returns the module that holds an imported name: the longest prefix that is a file."""
    while name not in sources and "." in name:
        name = name.rpartition(".")[0]
    return name


def exported(source: Source) -> set[str]:
    """Returns the names in a module's __all__."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def import_graph(sources: dict[str, Source]) -> dict[str, set[str]]:
    """Returns module -> modules that it imports, among the sources."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, source in sources.items():
        for imported in source.imports:
            other = target(imported.module, sources)
            # A module imports its own package's __init__ implicitly. That is no circle.
            if other in sources and other != module and not module.startswith(f"{other}."):
                graph[module].add(other)
    return graph


def import_circles(sources: dict[str, Source]) -> list[set[str]]:
    """Returns the groups of modules that import each other, directly or through others."""
    graph = import_graph(sources)
    reached: dict[str, set[str]] = {}
    for module in graph:
        found, todo = set[str](), [module]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        reached[module] = found
    circles: list[set[str]] = []
    for module, others in reached.items():
        if module in others and not any(module in circle for circle in circles):
            circles.append({other for other in others if module in reached[other]})
    return circles


def import_complaints(sources: dict[str, Source]) -> list[str]:
    """Returns a sentence for each import that breaks a rule of the layout."""
    found: list[str] = []
    for module, source in sources.items():
        if module.split(".")[0] == LIBRARY and source.package not in RANKS:
            found.append(f"{module} has no rank: give {source.package} a place in RANKS")
            continue
        for imported in source.imports:
            where = f"{module}, line {imported.line}"
            other = target(imported.module, sources)
            if other in sources and other != module:
                found += _wrong_direction(where, source, sources[other], imported, sources)
            found += _behind_a_fence(where, module, other, imported)
    for circle in import_circles(sources):
        found.append(f"modules import each other in a circle: {', '.join(sorted(circle))}")
    return found


def _wrong_direction(
    where: str, source: Source, other: Source, imported: Import, sources: dict[str, Source]
) -> list[str]:
    top, other_top = source.module.split(".")[0], other.module.split(".")[0]
    if top == LIBRARY and other_top in PROGRAMS:
        return [f"{where}: the library must not import the program {other.module}"]
    if top in PROGRAMS and other_top in PROGRAMS and top != other_top:
        return [f"{where}: {top}/ must not import {other.module}"]
    if other_top != LIBRARY or other.package not in RANKS:
        return []
    if top == LIBRARY:
        mine, its = source.package, other.package
        if mine == its:
            return []
        if RANKS[its] >= RANKS[mine] and mine not in ENTRY_POINTS:
            return [
                f"{where}: {mine} (rank {RANKS[mine]}) must not import {other.module} "
                f"(rank {RANKS[its]})"
            ]
    if source.package in ENTRY_POINTS:
        return []
    door = sources.get(f"{LIBRARY}.{other.package}")
    if door is None or not door.is_package:
        return []
    name = imported.module.removeprefix(f"{door.module}.")
    if name == door.module or name in exported(door):
        return []
    return [f"{where}: {imported.module} is not exported by {door.module}"]


def _behind_a_fence(where: str, module: str, other: str, imported: Import) -> list[str]:
    found = []
    name = imported.module
    if name.split(".")[0] == "torch" and not (module in TORCH and imported.in_function):
        found.append(f"{where}: torch is imported only inside functions of {' and '.join(TORCH)}")
    known = name.split(".")[0] in sys.stdlib_module_names or other in SCRIPTS
    if module in SCRIPTS and not known:
        found.append(f"{where}: a script of the sandbox imports only the standard library")
    if module == PROGRAM and name.split(".")[0] == "ctypes":
        found.append(f"{where}: ctypes must stay out of the sandbox's program")
    if other in SCRIPTS and module not in SCRIPTS:
        found.append(f"{where}: {other} is a script, and is not imported")
    if f"{name}.".startswith("flax.linen.") and not f"{module}.".startswith(f"{LINEN}."):
        found.append(f"{where}: flax.linen is imported only in {LINEN}")
    return found


def functions(sources: dict[str, Source]) -> Iterator[tuple[Source, Function]]:
    """Yields every function and method of the library and the programs."""
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, Function):
                yield source, node


def function_length(node: Function) -> int:
    """Returns the lines of a function with its docstring, without its decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(sources: dict[str, Source]) -> list[str]:
    """Returns the functions above MAX_FUNCTION lines in the packages that forbid them."""
    return [
        f"{source.module}.{node.name}: {function_length(node)} lines"
        for source, node in functions(sources)
        if source.module.split(".")[0] == LIBRARY
        and source.package in SHORT_FUNCTIONS
        and function_length(node) > MAX_FUNCTION
    ]


def parameters(sources: dict[str, Source]) -> Iterator[tuple[str, ast.arg]]:
    """Yields (place, parameter) of every function, without self and cls."""
    for source, node in functions(sources):
        a = node.args
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]:
            if arg.arg not in ("self", "cls"):
                yield f"{source.module}.{node.name}: {arg.arg}", arg


def any_parameters(sources: dict[str, Source]) -> tuple[list[str], int]:
    """Returns the parameters that are Any or have no annotation, and the number of all."""
    every = list(parameters(sources))
    loose = [
        place
        for place, arg in every
        if arg.annotation is None or ast.unparse(arg.annotation) in ("Any", "typing.Any")
    ]
    return loose, len(every)


def family_comparisons(sources: dict[str, Source]) -> list[str]:
    """Returns comparisons with a family's name outside the packages that may make them."""
    found = []
    for source in sources.values():
        if source.module.split(".")[0] == LIBRARY and source.package in FAMILY_PACKAGES:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Compare):
                values = [x for part in (node.left, *node.comparators) for x in ast.walk(part)]
                if any(isinstance(x, ast.Constant) and x.value in FAMILIES for x in values):
                    found.append(f"{source.module}, line {node.lineno}: {ast.unparse(node)}")
    return found


def docstrings(sources: dict[str, Source]) -> Iterator[tuple[str, str]]:
    """Yields (place, docstring) of every module, class and function that has one."""
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Module | ast.ClassDef | Function):
                text = ast.get_docstring(node)
                if text:
                    name = getattr(node, "name", "")
                    yield f"{source.module}{'.' if name else ''}{name}", text


def docstring_complaints(sources: dict[str, Source]) -> dict[str, list[str]]:
    """Returns the places where a docstring breaks a rule of style, by rule."""
    found: dict[str, list[str]] = {"opening": [], "first line": [], "semicolon": []}
    for place, text in docstrings(sources):
        words = text.split("\n\n")[0].split()
        opening = re.split(r"\W", words[0])[0]
        if opening in OPENINGS:
            found["opening"].append(f"{place}: begins with {opening!r}")
        if len(words) > MAX_FIRST_LINE:
            found["first line"].append(f"{place}: {len(words)} words")
        if ";" in text:
            found["semicolon"].append(f"{place}: {text.count(';')}")
    return found


def semicolon_comments(sources: dict[str, Source]) -> list[str]:
    """Returns the comments in which a semicolon joins two clauses."""
    found = []
    for source in sources.values():
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and SEMICOLON.search(token.string):
                found.append(f"{source.module}, line {token.start[0]}: {token.string}")
    return found


def semicolon_messages(sources: dict[str, Source]) -> list[str]:
    """Returns the texts for users in which a semicolon joins two clauses."""
    found = {}
    for source in sources.values():
        for node in ast.walk(source.tree):
            for line, text in _messages(node):
                if SEMICOLON.search(text):
                    found[source.module, line] = text
    return [f"{module}, line {line}: {text}" for (module, line), text in found.items()]


def _messages(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, text) in a raised error, a call of MESSAGE_CALLS or a help text."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.Raise) and node.exc:
        parts = [node.exc]
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).split(".")[-1]
        parts = [*node.args] if name in MESSAGE_CALLS or name.endswith("Error") else []
        parts += [keyword.value for keyword in node.keywords if keyword.arg == "help"]
    for part in parts:
        for child in ast.walk(part):
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                yield child.lineno, child.value


def missing_docstrings(sources: dict[str, Source]) -> list[str]:
    """Returns the functions and classes in a package's __all__ that have no docstring."""
    found = []
    for source in sources.values():
        if source.is_package:
            for name in sorted(exported(source)):
                node = definition(source, name, sources)
                if isinstance(node, ast.ClassDef | Function) and not ast.get_docstring(node):
                    found.append(f"{source.module}.{name}")
    return found


def definition(source: Source, name: str, sources: dict[str, Source]) -> ast.stmt | None:
    """Returns the statement that defines a module's name, in another module if imported."""
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return node
    for imported in source.imports:
        prefix, _, last = imported.module.rpartition(".")
        if last == name and prefix in sources and prefix != source.module:
            return definition(sources[prefix], name, sources)
    return None


def long_lines(sources: dict[str, Source], width: int = 100) -> int:
    """Counts lines above `width` columns."""
    return sum(len(line) > width for s in sources.values() for line in s.text.split("\n"))


def top_level_names(root: Path) -> list[str]:
    """Returns the packages and modules directly in the library's folder."""
    return sorted(
        p.stem
        for p in (root / LIBRARY).iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    )


def package_graph(sources: dict[str, Source]) -> dict[str, set[str]]:
    """Returns package -> packages that it imports, within the library."""
    graph: dict[str, set[str]] = {}
    for source in sources.values():
        if source.module.split(".")[0] != LIBRARY:
            continue
        for imported in source.imports:
            other = sources.get(target(imported.module, sources))
            if other and other.module.split(".")[0] == LIBRARY and other.package != source.package:
                graph.setdefault(source.package, set()).add(other.package)
    return graph


def measure(root: Path) -> dict[str, str]:
    """Returns the figures that the documentation cites."""
    sources = read_sources(root)
    lengths = [(function_length(node), f"{s.module}.{node.name}") for s, node in functions(sources)]
    short = [
        (function_length(node), f"{s.module}.{node.name}")
        for s, node in functions(sources)
        if s.module.split(".")[0] == LIBRARY and s.package in SHORT_FUNCTIONS
    ]
    loose, total = any_parameters(sources)
    texts = [text for _, text in docstrings(sources)]
    openings, first_lines, _ = docstring_complaints(sources).values()
    names = top_level_names(root)
    graph = package_graph(sources)
    return {
        "top-level names in the library": str(len(names)),
        "arrows between them": str(sum(map(len, graph.values()))),
        "modules in circles of imports": str(sum(map(len, import_circles(sources)))),
        "longest function": "{} lines ({})".format(*max(lengths)),
        "longest in decoding, models, training": "{} lines ({})".format(
            *max(short, default=(0, ""))
        ),
        "parameters that are Any or bare": (
            f"{len(loose)} of {total} ({100 * len(loose) / total:.1f} %)"
        ),
        "family comparisons outside models, checkpoints": str(len(family_comparisons(sources))),
        "docstrings that open like a clause": f"{len(openings)} of {len(texts)}",
        "docstrings with a first line above 12 words": f"{len(first_lines)} of {len(texts)}",
        "semicolons in docstrings": str(sum(text.count(";") for text in texts)),
        "semicolons in comments": str(len(semicolon_comments(sources))),
        "semicolons in messages": str(len(semicolon_messages(sources))),
        "exported names without a docstring": str(len(missing_docstrings(sources))),
        "files above 400 lines": str(sum(s.text.count("\n") > 400 for s in sources.values())),
        "lines above 100 columns": str(long_lines(sources)),
    }


def main(root: Path) -> None:
    """Prints the figures of a checkout."""
    figures = measure(root)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {re.sub(r'xflow_jax[.]', '', value)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
