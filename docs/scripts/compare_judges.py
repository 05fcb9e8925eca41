"""Runs the cheats of the tests through this sandbox, bubblewrap and EvalPlus, and counts passes.

    python docs/scripts/compare_judges.py --bwrap /usr/bin/bwrap --evalplus VENV/bin/python

EvalPlus has no isolation of its own, so it runs inside bubblewrap, and without the cheats that are
system calls. Give the Python of an environment that has it. Options that are left out are skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
INPUTS, RESULTS = [[1, 2], [-1, 1]], [3, 0]  # those of the checks


def read_cheats() -> ModuleType:
    """Imports the table of cheats."""
    spec = importlib.util.spec_from_file_location("cheats", ROOT / "tests/sandbox/cheats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def isolated(bwrap: str, *folders: Path) -> list[str]:
    """Returns a command of bubblewrap that isolates another command.

    Args:
        bwrap: path of bubblewrap.
        folders: folders below /tmp that the other command reads.
    """
    binds = [part for each in (ROOT, *folders) for part in ("--ro-bind", str(each), str(each))]
    return [
        bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/",
        "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", *binds,
        "--cap-drop", "ALL", "--chdir", "/tmp", "--",
    ]  # fmt: skip


def run_here() -> Callable[[str, str], bool]:
    """Returns (program, checks) -> passed, by this sandbox."""
    sys.path.insert(0, str(ROOT))
    from xflow_jax.sandbox import Limits, Pool

    pool = Pool(Limits(seconds=0.5, memory_mb=256), workers=2)
    return lambda program, checks: pool.run(program, checks).passed


def run_in_bubblewrap(bwrap: str) -> Callable[[str, str], bool]:
    """Returns (program, checks) -> passed, by one interpreter's exit code in bubblewrap."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    def run(program: str, checks: str) -> bool:
        command = [*isolated(bwrap), sys.executable, "-c", f"{program}\n{checks}"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=2, preexec_fn=limit)
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a null byte
            return False
        return done.returncode == 0

    return run


def run_in_evalplus() -> Callable[[str, str], bool]:
    """Returns (program, checks) -> passed, by EvalPlus in this interpreter."""
    from evalplus.eval import untrusted_check

    def run(program: str, checks: str) -> bool:
        given = ("humaneval", program, INPUTS, "add", RESULTS, 0, [0.01, 0.01], True, 0.3)
        return untrusted_check(*given)[0] == "pass"

    return run


def report(name: str, run: Callable[[str, str], bool], cheats: Iterable[str], workers: int) -> None:
    """Prints the passes of cheats, their names and the rate of a right program."""
    module = read_cheats()
    programs = [module.CHEATS[cheat] for cheat in cheats]
    with ThreadPoolExecutor(workers) as threads:
        passed = list(threads.map(lambda program: run(program, module.CHECKS), programs))
        right, began = "def add(a, b):\n    return a + b\n", time.monotonic()
        count = 100
        assert all(threads.map(lambda _: run(right, module.CHECKS), range(count)))
        rate = count / (time.monotonic() - began)
    print(f"{name}: {sum(passed)} of {len(passed)} pass, {rate:.0f} programs/s")
    names = [cheat for cheat, ok in zip(cheats, passed, strict=True) if ok]
    print("   ", ", ".join(names) or "none", flush=True)


def main() -> None:
    """Prints a line for each judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bwrap")
    parser.add_argument("--evalplus")
    parser.add_argument("--inside", action="store_true", help="this is the run of EvalPlus")
    args = parser.parse_args()
    module = read_cheats()
    python_only = [name for name in module.CHEATS if name not in module.CALLS]
    if args.inside:
        report("EvalPlus", run_in_evalplus(), python_only, 1)
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    report("this sandbox", run_here(), list(module.CHEATS), 2)
    if args.bwrap:
        report("bubblewrap", run_in_bubblewrap(args.bwrap), list(module.CHEATS), 2)
    if args.bwrap and args.evalplus:
        python = Path(args.evalplus).absolute()
        command = [*isolated(args.bwrap, python.parents[1]), str(python), __file__, "--inside"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
