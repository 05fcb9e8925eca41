"""Atomic writes: complete or absent, after errors, after kills and over earlier results."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.kill_helpers import write_record
from xflow_jax.checkpoints import atomic_write, run_lock
from xflow_jax.checkpoints.atomic_write import append_text, atomic_directory, write_atomic
from xflow_jax.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def build(path: Path, text: str, **options: bool) -> None:
    with atomic_directory(path, **options) as folder:
        (folder / "file").write_text(text)


def test_an_error_leaves_nothing(tmp_path):
    for error in (FULL, KeyboardInterrupt()):
        with (
            pytest.raises((UserError, KeyboardInterrupt)),
            atomic_directory(tmp_path / "x") as folder,
        ):
            (folder / "file").write_text("half")
            raise error
        assert not names(tmp_path)
    build(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x"]


def test_what_a_killed_program_left_is_deleted(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "half").touch()
    write_record(tmp_path / "x.lock")  # nobody holds it, as after SIGKILL
    build(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["file"]


def test_what_no_program_left_stays(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "diary").touch()
    with pytest.raises(UserError, match="x.partial: its name is needed, but no killed program le"):
        build(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x.partial"] and names(tmp_path / "x.partial") == ["diary"]


def test_two_interrupts_leave_no_obstacle(tmp_path, monkeypatch):
    """The second one comes while the first one's half directory is deleted."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic_write.shutil, "rmtree", interrupted)
        with atomic_directory(tmp_path / "x") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt
    assert names(tmp_path) == ["x.lock", "x.partial"]
    build(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x"]


def test_a_kill_after_the_last_rename(tmp_path):
    """The result is complete, so only the file of the lock goes."""
    build(tmp_path / "x", "whole")
    write_record(tmp_path / "x.lock")
    with pytest.raises(UserError, match="x: the destination exists"):
        build(tmp_path / "x", "again")
    assert names(tmp_path) == ["x"]


def test_two_at_once(tmp_path):
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="x: process .* is writing it"):
            build(tmp_path / "x", "second")
    assert (tmp_path / "x" / "file").read_text() == "first"
    with pytest.raises(UserError, match="x: the destination exists"):
        build(tmp_path / "x", "second")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_an_earlier_result_is_replaced(tmp_path, monkeypatch, renames):
    """Before, between and after the two renames. At no time is there half a result."""
    build(tmp_path / "x", "earlier")
    done = []
    rename = Path.rename

    def killed(self, target):
        if len(done) == renames:
            raise SystemExit
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(atomic_write.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(run_lock.RunLock, "release", lambda lock: os.close(lock._descriptor))
        if renames < 2:
            with pytest.raises(SystemExit):
                build(tmp_path / "x", "later", replace=True)
        else:
            build(tmp_path / "x", "later", replace=True)
    if (tmp_path / "x").exists():
        assert (tmp_path / "x/file").read_text() == ("later" if renames == 2 else "earlier")
    build(tmp_path / "x", "again", replace=True)
    assert names(tmp_path) == ["x"] and (tmp_path / "x/file").read_text() == "again"


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x"
    write_atomic(file, "earlier")
    with monkeypatch.context() as patch:
        patch.setattr(atomic_write.os, "fsync", lambda _: (_ for _ in ()).throw(FULL))
        with pytest.raises(UserError, match=f"^{file}: the disk is full$"):
            write_atomic(file, "later")
        with pytest.raises(UserError, match=f"^{file}: the disk is full$"):
            append_text(file, "more\n")
    assert file.read_text() == "earlier" and names(tmp_path) == ["x"]
    append_text(file, "\nmore é\n")
    assert file.read_text(encoding="utf-8") == "earlier\nmore é\n"
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_atomic(file / "y", "text")


def test_a_full_device_is_one_sentence():
    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match="^/dev/full: the disk is full$"):
        append_text(Path("/dev/full"), "line\n")
