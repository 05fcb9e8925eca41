"""Commands that start a worker's processes, and their readable paths."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDERS = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
)
_DEVICES = (os.devnull, "/dev/urandom")
_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo", *_DEVICES)

# Ways to isolate a process, the best first. "bare" goes without Landlock. It is for interpreters
# whose libraries lie in a place that `readable_paths` does not know, so that even "plain" fails.
ISOLATION_METHODS = ("unshare", "bubblewrap", "plain", "bare")

# Scripts of a zygote, each after those that it imports.
SCRIPTS = ("child", "codec", "seccomp", "program", "check_names", "judge", "zygote")
_BOOTSTRAP = """
import sys, types
for name in ("xflow_jax", "xflow_jax.sandbox"):
    sys.modules[name] = types.ModuleType(name)
for name, text in {sources!r}:
    module = sys.modules["xflow_jax.sandbox." + name] = types.ModuleType(name)
    exec(compile(text, "<sandbox " + name + ">", "exec"), vars(module))
module.main(*sys.argv[1:])
"""


def interpreter_command() -> list[str]:
    """Returns the command of an isolated Python interpreter.

    It is the one behind the links of a virtual environment. The flags isolate it like -I -S, except
    that it reads PYTHONHASHSEED.
    """
    return [
        os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
        "-P",
        "-s",
        "-S",
        "-B",
    ]


@functools.cache
def library_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the folders of the packages that are installed, links resolved."""
    folders = []
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None:
            folders += [os.path.realpath(path) for path in spec.submodule_search_locations or ()]
    return tuple(folders)


def readable_paths(libraries: Sequence[str] = ()) -> list[str]:
    """Returns the existing paths that a program may read.

    These are the interpreter, its standard library, the libraries of both, and time zones.

    Args:
        libraries: folders of further packages. Their wheels may have shared libraries beside them.
    """
    homes = [
        f"{prefix}/{lib}"
        for prefix in (sys.base_prefix, sys.base_exec_prefix)
        for lib in ("lib", "lib64")
    ]
    further = [path for folder in libraries for path in (folder, f"{folder}.libs")]
    paths = [interpreter_command()[0], os.path.dirname(os.__file__), *homes, *_FOLDERS, *_FILES]
    return [path for path in dict.fromkeys([*paths, *further]) if os.path.exists(path)]


def find_bubblewrap() -> str | None:
    """Returns the path of bubblewrap, or None if it is not installed."""
    return shutil.which("bwrap")


def launch_command(
    method: str,
    scratch: str,
    scratch_bytes: int,
    control: int,
    libraries: Sequence[str] = (),
    cgroup: str = "",
    landlock: bool = True,
) -> list[str]:
    """Returns the command that isolates another command.

    The other command follows as its last arguments.

    Args:
        method: one of ISOLATION_METHODS.
        scratch: an empty folder, the only one that may be written.
        scratch_bytes: size of the folder's file system.
        control: descriptor for error messages, inherited by the command.
        libraries: folders of packages that may be read.
        cgroup: folder of a control group to enter, or "".
        landlock: True to use Landlock if the kernel has it and the method allows it.
    """
    readable = readable_paths(libraries)
    spec = {
        "method": {"bubblewrap": "inside", "bare": "plain"}.get(method, method),
        "landlock": landlock and method != "bare",
        "readable": readable,
        "scratch": scratch,
        "scratch_bytes": scratch_bytes,
        "control": control,
        "cgroup": cgroup,
    }
    command = [
        *interpreter_command(),
        "-c",
        Path(__file__).with_name("launch.py").read_text(),
        json.dumps(spec),
    ]
    if method != "bubblewrap":
        return command
    mounted = sorted({*readable, *map(os.path.realpath, readable)})
    return [
        find_bubblewrap() or "bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1",
        "--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534",
        *(part for path in mounted for part in ("--ro-bind", os.path.realpath(path), path)),
        *(part for path in _DEVICES for part in ("--dev-bind", path, path)),
        "--size", str(scratch_bytes), "--tmpfs", scratch, "--remount-ro", "/", "--", *command,
    ]  # fmt: skip


def zygote_command(role: str, scratch: str, control: int, libraries: Sequence[str]) -> list[str]:
    """Returns the command of a zygote, to which launch.py adds two arguments.

    Args:
        role: "program" or "judge".
        scratch: folder that its children may write.
        control: descriptor of its connection with the parent.
        libraries: folders of packages that may be imported.
    """
    folder = Path(__file__).parent
    sources = [(name, (folder / f"{name}.py").read_text()) for name in SCRIPTS]
    return [
        *interpreter_command(), "-c", _BOOTSTRAP.format(sources=sources),
        role, str(control), scratch, os.pathsep.join(libraries),
    ]  # fmt: skip
