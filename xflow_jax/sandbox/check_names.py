"""Names that checks use, and the ways in which they use them.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import ast
import symtable

# Checks without these words need no interpreter of their own.
_WORDS = ("except", "class", "with", "await", "async", "isinstance")


def free_names(checks: str) -> set[str]:
    """Returns the names that checks use and do not define."""
    found, defined = set[str](), set[str]()
    top = symtable.symtable(checks, "<checks>", "exec")
    for symbol in top.get_symbols():
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            defined.add(symbol.get_name())
        elif symbol.is_referenced():
            found.add(symbol.get_name())
    tables = top.get_children()
    while tables:
        table = tables.pop()
        found |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        tables += table.get_children()
    return found - defined


def needs_same_interpreter(checks: str, names: set[str]) -> bool:
    """Returns True if checks need more of a name than a stub.

    A stub cannot be caught, inherited from, entered, awaited, or isinstance's second argument.

    Args:
        checks: source of the checks.
        names: names of the program.
    """
    if not any(word in checks for word in _WORDS):
        return False  # most checks, without a look at their syntax
    places: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(checks)):
        if isinstance(node, ast.ExceptHandler):
            places.append(node.type)
        elif isinstance(node, ast.ClassDef):
            places += node.bases
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass"):
                places += node.args[node.func.id == "isinstance" :]
        elif isinstance(node, ast.With):
            places += [item.context_expr for item in node.items]
        elif isinstance(node, ast.Await | ast.AsyncFor):
            places.append(node.value if isinstance(node, ast.Await) else node.iter)
    parts = [part for place in places if place is not None for part in ast.walk(place)]
    return any(isinstance(part, ast.Name) and part.id in names for part in parts)


def attributes_of(checks: str, names: set[str]) -> dict[str, set[str]]:
    """Returns the attributes of names that checks use in no other way.

    Args:
        checks: source of the checks.
        names: names of the program.
    """
    found: dict[str, set[str]] = {}
    uses: dict[str, int] = {}
    for node in ast.walk(ast.parse(checks)):
        if isinstance(node, ast.Name):
            uses[node.id] = uses.get(node.id, 0) + 1
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            uses[node.value.id] = uses.get(node.value.id, 0) - 1
            found.setdefault(node.value.id, set()).add(node.attr)
    return {name: found[name] for name in found if name in names and uses[name] == 0}
