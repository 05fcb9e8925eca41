"""Cheats in the sandbox, at each isolation level: none passes, and none reaches a later program."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from tests.sandbox.cheats import CALLS, CHEATS, CHECKS, LOOK
from tests.sandbox.test_hostile import CLEAN, HOSTILE, assert_nothing_runs
from xflow_jax.sandbox import commands, pool
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import Pool

LIMITS = Limits(seconds=0.3, memory_mb=256, minimum="limits")
PATIENT = Limits(seconds=60, memory_mb=256, minimum="limits")
# Fails with exactly this reason if it found the machine clean, and if nothing made it pass.
NEXT = CLEAN + "def add(a, b): return 7\n"
NEXT_REASON = "wrong answer: assert add(1, 2) == 3"
LEVELS = {
    "full": ("unshare", "namespaces"),
    "bubblewrap": ("bubblewrap", "namespaces"),
    "landlock": ("plain", "landlock"),
    "limits": ("bare", "limits"),
    # Namespaces, Landlock and seccomp without the audit hook, so the program has native code.
    "no hook": ("unshare", "namespaces"),
}
NATIVE = {**LOOK, **CALLS}


class Levels:
    """A pool of one worker for each level, started on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pools: dict[str, Pool] = {}
        (folder / "temporary").mkdir()
        # The scripts of the sandbox without the audit hook.
        shutil.copytree(Path(commands.__file__).parent, folder / "scripts")
        program = folder / "scripts/program.py"
        text = program.read_text()
        assert "    sys.addaudithook(guard)\n" in text
        program.write_text(text.replace("    sys.addaudithook(guard)\n", ""))

    def pool(self, level: str) -> Pool:
        if level not in self.pools:
            self.pools[level] = Pool(LIMITS, workers=1)
        return self.pools[level]

    def run(self, level: str, program: str, limits: Limits = LIMITS, checks: str = CHECKS):
        """Runs a program. A worker that replaces another one starts at the same level."""
        method, part = LEVELS[level]
        if method == "bubblewrap" and not commands.find_bubblewrap():
            pytest.skip("bubblewrap is not installed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "_methods", (method,))
            patch.setattr("tempfile.tempdir", str(self.folder / "temporary"))
            if level == "no hook":
                patch.setattr(commands, "__file__", str(self.folder / "scripts/commands.py"))
            each = self.pool(level)
            if part not in each.isolation:
                pytest.skip(f"this machine has only {each.isolation}")
            patch.setattr(each, "limits", limits)
            return each.run(program, checks)


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    levels = Levels(tmp_path_factory.mktemp("sandbox"))
    before = machine_state()
    yield levels
    assert machine_state() == before
    for each in levels.pools.values():
        each.close()
    assert list((levels.folder / "temporary").iterdir()) == []


def machine_state() -> list[object]:
    """Returns what a program could leave on the machine."""
    state: list[object] = [os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(7)]
    if sys.platform == "linux":
        state += [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg")]
        state += [os.sched_getaffinity(0), Path("/proc/keys").read_text().count("left")]
    return state


def cases():
    """Yields (level, name), of which the slower levels and programs are marked."""
    for level in LEVELS:
        # test_hostile.py has the others at the full level. Some of them are right without a hook.
        programs = CHEATS if level in ("full", "no hook") else {**CHEATS, **HOSTILE}
        for i, name in enumerate(programs):
            quick = level == "full" or (level == "no hook" and name in NATIVE) or i % 8 == 0
            yield pytest.param(level, name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("level", "name"), list(cases()))
def test_cheat(levels, level, name):
    if name in CALLS and platform.machine() != "x86_64":
        pytest.skip("its numbers are those of x86-64")
    program = CHEATS[name] if name in CHEATS else textwrap.dedent(HOSTILE[name])
    result = levels.run(level, program)
    assert not result.passed and result.reason not in ("", "passed"), result
    assert result.reason.isprintable() and not result.same_interpreter
    assert result.seconds < LIMITS.seconds + 60
    after = levels.run(level, NEXT, PATIENT)
    assert after.reason == NEXT_REASON
    assert_nothing_runs(levels.pools[level])


def test_there_are_many_cheats():
    assert len({**CHEATS, **HOSTILE}) >= 350
