"""Locks of places: held, refused, given back, and taken over from processes that were killed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.kill_helpers import write_record
from xflow_jax.checkpoints import run_lock
from xflow_jax.checkpoints.run_lock import destination_lock, folder_lock
from xflow_jax.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from xflow_jax.checkpoints.run_lock import folder_lock
folder_lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_refused_and_given_back(tmp_path):
    with folder_lock(tmp_path / "a" / "run") as lock:
        assert not lock.inherited
        sentence = (
            f"^{tmp_path}/a/run: process {os.getpid()} on .* is writing it since .*. "
            "Wait until it ends, or choose another place.$"
        )
        with pytest.raises(UserError, match=sentence):
            folder_lock(tmp_path / "a" / "run").acquire()
        with destination_lock(tmp_path / "a" / "run"):
            pass  # another file, so another lock
    assert not list((tmp_path / "a" / "run").iterdir())
    with folder_lock(tmp_path / "a" / "run") as lock:
        assert not lock.inherited


def test_a_lock_is_the_same_under_every_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folder_lock(tmp_path / "real"), pytest.raises(UserError, match="link: process"):
        folder_lock(tmp_path / "link").acquire()
    with destination_lock(tmp_path / "real" / "x"), pytest.raises(UserError, match="link/x: proc"):
        destination_lock(tmp_path / "link" / "x").acquire()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            folder_lock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / "run.lock").exists()
    with folder_lock(tmp_path) as lock:
        assert lock.inherited
    assert not list(tmp_path.iterdir())


def test_one_thread_at_a_time(tmp_path):
    inside, most, turns = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(40):
            try:
                with destination_lock(tmp_path / "x"):
                    with guard:
                        inside, turns = inside + 1, turns + 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with guard:
                        inside -= 1
            except UserError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and turns > 4 and not list(tmp_path.iterdir())


def test_a_file_of_someone_else_is_left_alone(tmp_path):
    file = tmp_path / "run.lock"
    file.write_text("my notes")
    with pytest.raises(UserError, match=f"^{file}: not the lock of a program"):
        folder_lock(tmp_path).acquire()
    assert file.read_text() == "my notes"
    file.write_bytes(bytes(512))  # as after a loss of power
    with folder_lock(tmp_path) as lock:
        assert not lock.inherited


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_without_flock_the_record_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    with folder_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        folder_lock(tmp_path).acquire()
    file = tmp_path / "run.lock"
    for changes in ({}, {"host": "elsewhere", "pid": 1}):
        write_record(file, **changes)
        with pytest.raises(UserError, match="is writing it since noon"):
            folder_lock(tmp_path).acquire()
    # The process has ended, or the system was started again and its number is another process's.
    for changes in ({"pid": 2**22 + 1}, {"started": "another-boot 17"}):
        write_record(file, **changes)
        with folder_lock(tmp_path) as lock:
            assert lock.inherited


def test_a_full_disk_leaves_what_there_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock.os, "fsync", full)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: the disk is full$"):
        folder_lock(tmp_path).acquire()
    assert not list(tmp_path.iterdir())
    write_record(tmp_path / "run.lock")
    with pytest.raises(UserError, match="the disk is full"):
        folder_lock(tmp_path).acquire()
    monkeypatch.undo()
    with folder_lock(tmp_path) as lock:  # the evidence of the killed process is still there
        assert lock.inherited


def test_a_file_in_place_of_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for lock in (folder_lock(tmp_path / "file"), destination_lock(tmp_path / "file/x/y")):
        with pytest.raises(UserError, match="file.*: a file has the place of a directory. Choose"):
            lock.acquire()
    assert (tmp_path / "file").is_file()
