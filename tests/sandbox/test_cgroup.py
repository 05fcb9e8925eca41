"""Control groups, on a copy of their files: which group is chosen, and its limits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from xflow_jax.sandbox import cgroup
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.worker import Worker

OWN = "user.slice/app.slice/run.scope"


@pytest.fixture
def tree(tmp_path):
    """A delegated group app.slice, and this process below it."""
    root = tmp_path / "cgroup"
    for folder in (root, root / "user.slice", root / "user.slice/app.slice", root / OWN):
        folder.mkdir()
        (folder / "cgroup.subtree_control").write_text("cpu memory pids\n")
        (folder / "cgroup.procs").write_text("")
    (tmp_path / "membership").write_text(f"5:pids:/other\n0::/{OWN}\n")
    return tmp_path


def find(tree: Path) -> Path | None:
    return cgroup.find_parent(tree / "cgroup", tree / "membership")


def test_the_nearest_group_above_is_chosen(tree):
    parent = tree / "cgroup/user.slice/app.slice"
    assert find(tree) == parent
    (parent / "cgroup.subtree_control").write_text("cpu memory\n")  # without pids
    assert find(tree) == parent.parent


def test_without_a_delegated_group_there_is_none(tree, tmp_path):
    for folder in (tree / "cgroup").rglob("cgroup.subtree_control"):
        folder.write_text("")
    (tree / "cgroup/cgroup.subtree_control").write_text("")
    assert find(tree) is None
    for text in ("", "5:pids:/other\n", "0::/gone/away\n", "0::/\n", "0::/../../..\n"):
        (tree / "membership").write_text(text)
        assert find(tree) is None
    assert cgroup.find_parent(tree / "cgroup", tmp_path / "no file") is None
    assert cgroup.create(Limits(), tmp_path / "no folder") == ""


def test_the_limits_of_a_group(tree):
    limits = Limits(memory_mb=100, processes=2, files=4, file_bytes=1000)
    group = Path(cgroup.create(limits, tree))
    assert group.parent == tree
    assert int((group / "memory.max").read_text()) == (200 << 20) + 4000 + (64 << 20)
    assert (group / "pids.max").read_text() == "6"
    assert (group / "memory.swap.max").read_text() == "0"


def test_a_removed_group_may_be_gone_already(tree):
    (tree / "empty").mkdir()
    cgroup.remove(str(tree / "empty"))
    cgroup.remove(str(tree / "empty"))
    cgroup.remove("")
    assert not (tree / "empty").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_zygote_enters_its_group(tree, monkeypatch):
    groups = []

    def create(limits: Limits) -> str:
        groups.append(tree / f"group-{len(groups)}")
        groups[-1].mkdir()
        return str(groups[-1])

    monkeypatch.setattr(cgroup, "create", create)
    monkeypatch.setattr(cgroup, "remove", lambda group: None)
    worker = Worker("unshare" if os.geteuid() == 0 else "plain", Limits())
    try:
        assert worker.isolation.split("+")[-2:] == ["cgroup", "limits"]
        assert [(group / "cgroup.procs").read_text() for group in groups] == ["0", "0"]
    finally:
        worker.close()
