"""Rules of the user's own, from Python files or modules."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from xflow_jax.decoding.rules.base import Action
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import is_cloud, to_path

MEMBERS = (
    "early_exit",
    "settled",
    "needs_keys",
    "revises",
    "belief_options",
    "init_memory",
    "is_open",
    "__call__",
)
GUARDED = ("belief_options", "init_memory", "is_open", "__call__")


def load_rule_class(source: str, name: str) -> type:
    """Loads a class of rules.

    Args:
        source: path of a .py file, or a module such as "package.module". The current directory
            counts as a place of modules.
        name: name of the class.

    Raises:
        UserError: if there is no such file, module or class, if its code fails, or if the class
            is not a rule.
    """
    module = _load_file(source) if source.endswith(".py") else _load_module(source)
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        found = [n for n, v in vars(module).items() if isinstance(v, type) and _is_local(v, module)]
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        hint = f". It has {', '.join(found)}." if found else ""
        hint = f", did you mean {near[0]}?" if near else hint
        raise UserError(f"{source} has no class {name}{hint}")
    missing = [member for member in MEMBERS if not callable(cls) or not hasattr(cls, member)]
    if missing:
        raise UserError(
            f"{source}: {name} is no rule, it lacks {', '.join(missing)}. "
            "Derive it from xflow_jax.decoding.TokenConstraints."
        )
    options = vars(cls).get("__dataclass_params__")
    if options is None or not options.frozen:
        raise UserError(
            f"{source}: {name} must be a frozen dataclass: write @flax.struct.dataclass above it"
        )
    for method in GUARDED:
        _guard(cls, method, source)
    return cls


def _guard(cls: type, name: str, source: str) -> None:
    """Wraps a method so that its mistakes are one sentence."""
    method = vars(cls).get(name)
    if not inspect.isfunction(method) or hasattr(method, "__wrapped__"):
        return

    @functools.wraps(method)
    def guarded(self: Any, *args: Any) -> Any:
        try:
            result = method(self, *args)
        except UserError:
            raise
        except Exception as error:
            raise _failure(source, error, inspect.getsourcefile(cls)) from error
        if name == "__call__":
            _check_action(f"{source}: {cls.__name__}", result, args[1].t.shape)
        return result

    setattr(cls, name, guarded)


def _check_action(where: str, action: object, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the action has right shapes and dtypes."""
    if not isinstance(action, Action):
        raise UserError(f"{where} must return an Action, not {type(action).__name__}")
    for name, kind in (("a", "f"), ("reset", "b"), ("commit", "b")):
        value = getattr(action, name)
        found = (
            f"{getattr(value, 'dtype', type(value).__name__)} {list(getattr(value, 'shape', ()))}"
        )
        right = getattr(value, "shape", None) == shape and value.dtype.kind == kind
        dtype = "float32" if kind == "f" else "bool"
        require(right, f"{where} returned {name} of {found}, but it must be {dtype} {list(shape)}")


def source_hash(cls: type) -> str | None:
    """Returns a short hash of an external rule's file, or None."""
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    file = inspect.getsourcefile(cls)
    return None if file is None else hashlib.sha256(to_path(file).read_bytes()).hexdigest()[:16]


def _is_local(value: type, module: ModuleType) -> bool:
    return value.__module__ == module.__name__


def _load_file(source: str) -> ModuleType:
    if is_cloud(source):
        raise UserError(f"{source}: a rule is a file on a disk, FILE.py:Class. Copy it there.")
    path = to_path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{source}: there is no such file. A rule of your own is FILE.py:Class.")
    return _run_file(path, path.stat().st_mtime_ns)


@functools.lru_cache
def _run_file(path: Path, changed: int) -> ModuleType:
    """Runs a file once, until it changes.

    Its classes therefore stay the same.
    """
    name = f"rule_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be loaded as Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failure(str(path), error) from error
    return module


def _load_module(source: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and source.startswith(error.name):
            raise UserError(
                f"there is no rule and no module {source!r}. A rule of your own is FILE.py:Class "
                "or package.module:Class."
            ) from None
        raise _failure(source, error) from error
    except (Exception, SystemExit) as error:
        raise _failure(source, error) from error
    finally:
        sys.path.remove(here)


def _failure(source: str, error: Exception | SystemExit, file: str | None = None) -> UserError:
    """Describes an exception of the user's code in one sentence.

    Args:
        source: name of the file or module.
        error: the exception.
        file: path of the code. The last line in it is named, if the traceback has one.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if frame.filename == file] or frames
    line = f", line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, SyntaxError):
        line, text = f", line {error.lineno}", error.msg
    return UserError(f"{source}: its code fails with {type(error).__name__}: {text}{line}")
