"""Programs that are killed, started twice at once, or run out of disk, as their users run them.

KILLS sets the number of kills of each program.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests import kill_programs

KILLS = int(os.environ.get("KILLS", "3"))
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", list(kill_programs.PROGRAMS))]


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    kill_programs.prepare(folder)
    return folder


def test_kills_at_random_moments_and_two_at_once(work, name):
    program, chance = kill_programs.PROGRAMS[name], random.Random()
    kills, _ = kill_programs.kill_often(program, work, name, KILLS, chance)
    assert kills >= KILLS
    kill_programs.run_twice_at_once(program, work, name)


def test_small_and_read_only_disks(work, name):
    if not can_mount():
        pytest.skip("needs unshare and user namespaces")
    program = kill_programs.PROGRAMS[name]
    if not (work / f"{name}-straight").exists():
        kill_programs.run_straight(program, work, name)
    assert len(kill_programs.fill_disk(program, work, name)) >= 2
