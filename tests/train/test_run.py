"""The folder of a training run: lock, damaged checkpoints, full disks, and metrics after kills."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kill_helpers import write_record
from train.event_file import EventFile
from train.run import Run
from xflow_jax.checkpoints import atomic_write
from xflow_jax.errors import UserError

STATE = {"w": jnp.arange(2048.0) / 7, "step": jnp.int32(0)}


def train(
    folder: Path, last: int, seed: int = 0, die_at: int = -1, frozen: str | None = None
) -> dict[str, np.ndarray]:
    """Counts to `last`. With `die_at` it ends after the metrics of that step, before its save."""
    with Run(folder, seed) as run:
        run.frozen = frozen
        state = STATE
        if run.latest is not None:
            state, notes = run.restore(STATE)
            assert notes == {"note": 1}
        for step in run.steps(int(state["step"]), last, "count"):
            state = {"w": state["w"] * 1.5 + step, "step": state["step"] + 1}
            run.log(step + 1, {"sum": state["w"].sum()})
            if step + 1 == die_at:
                break
            run.save(step + 1, state, notes={"note": 1})
        run.wait()
        return {name: np.asarray(x) for name, x in state.items()}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[dict, list]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train(folder, 6), metrics(folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 3 and 4."""
    folder = tmp_path_factory.mktemp("four") / "run"
    train(folder, 4)
    return folder


def assert_same(folder: Path, straight: tuple[dict, list]) -> None:
    state = train(folder, 6)
    for name, value in straight[0].items():
        np.testing.assert_array_equal(state[name], value)
    assert metrics(folder) == straight[1]
    assert not (folder / "run.lock").exists()


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def test_any_damage_to_the_last_checkpoint_is_noticed(four, straight, tmp_path, capsys):
    """Each file in turn gets a flipped bit, is cut off or goes. The run continues from step 3."""
    # These hold nothing that a resumed run uses.
    last = four / "checkpoints/4"
    empty = [last / "_CHECKPOINT_METADATA", last / "commit_success.txt"]
    names = [file.relative_to(last) for file in files(last)]
    assert len(names) > 9
    for number, name in enumerate(names):
        for kind, damage in (("flip", flip), ("cut", cut) if number % 2 else ("gone", Path.unlink)):
            folder = tmp_path / f"{number}-{kind}"
            shutil.copytree(four, folder)
            damage(folder / "checkpoints/4" / name)
            if kind == "gone" and name.name == "files.json":
                continue
            if number < 4 or last / name in empty:
                assert_same(folder, straight)
            else:
                Run(folder, 0).__exit__(None, None, None)
            warning = capsys.readouterr().err
            if last / name not in empty:
                assert f"warning: {folder}/checkpoints/4: " in warning, (name, kind)
                assert (folder / "damaged/4").exists()


def test_a_checkpoint_without_checksums_that_cannot_be_read(four, straight, tmp_path, capsys):
    shutil.copytree(four, tmp_path / "run")
    (tmp_path / "run/checkpoints/4/files.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/4/state")
    assert_same(tmp_path / "run", straight)
    assert re.search("warning: .*/checkpoints/4: it cannot be read", capsys.readouterr().err)


def test_only_damaged_checkpoints_are_one_sentence(four, tmp_path):
    shutil.copytree(four, tmp_path / "run")
    for step in "34":
        flip(max(files(tmp_path / "run/checkpoints" / step), key=lambda f: f.stat().st_size))
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="checkpoints/4: .* another checksum .* No other checkpoi"):
        train(tmp_path / "run", 6)
    assert files(tmp_path / "run") == before


def test_metrics_are_those_of_the_checkpoint(straight, tmp_path):
    """A kill between the metrics of a step and its checkpoint repeats the step, once."""
    train(tmp_path / "run", 6, die_at=3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "su')
    assert [m["step"] for m in metrics_whole(tmp_path / "run")] == [1, 2, 3]
    assert_same(tmp_path / "run", straight)


def metrics_whole(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_another_seed_is_another_run(four):
    before = files(four)
    with pytest.raises(UserError, match="its checkpoint is of another seed. It is 0 there and 5 h"):
        train(four, 6, seed=5)
    assert [f for f in files(four) if "tensorboard" not in f.parts] == [
        f for f in before if "tensorboard" not in f.parts
    ]


def test_another_frozen_model_is_another_run(four, tmp_path):
    shutil.copytree(four, tmp_path / "run")
    train(tmp_path / "run", 5, frozen="one")  # the checkpoint before it has no fingerprint
    train(tmp_path / "run", 6, frozen="one")
    sentence = "another model. The fingerprint of its weights is one there and two here. To start"
    with pytest.raises(UserError, match=sentence):
        train(tmp_path / "run", 7, frozen="two")
    train(tmp_path / "run", 7, frozen="one")


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, loss):
    with Run(tmp_path / "run", 0) as run:
        run.log(1, {"loss": 2.0, "other": np.nan})
        with pytest.raises(UserError, match=f"the loss is {loss} at step 2, so the training has d"):
            run.log(2, {"loss": loss})
        assert [line["step"] for line in run.metrics()] == [1]


def test_two_runs_never_share_a_folder(tmp_path):
    with Run(tmp_path / "run", 0) as run:
        run.log(1, {"x": 1.0})
        before = {file: file.read_bytes() for file in files(tmp_path)}
        with pytest.raises(UserError, match=f"run: process {os.getpid()} on .* is writing it"):
            Run(tmp_path / "run", 0)
        assert {file: file.read_bytes() for file in files(tmp_path)} == before
    write_record(tmp_path / "run/run.lock")  # as after SIGKILL
    train(tmp_path / "run", 1)


@contextlib.contextmanager
def small_files(most: int = 4096) -> Iterator[None]:
    """Lets no file grow above `most` bytes, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_is_one_sentence(four, straight, tmp_path, capfd):
    shutil.copytree(four, tmp_path / "run")
    with small_files(), pytest.raises(UserError) as error:
        train(tmp_path / "run", 6)
    assert str(error.value) == (
        f"{tmp_path}/run/checkpoints: cannot be written: File too large. The same command "
        "continues from the last checkpoint."
    )
    assert "Traceback" not in capfd.readouterr().err
    assert_same(tmp_path / "run", straight)


def test_tasks_that_a_failed_save_forgot_report_nothing(tmp_path, caplog):
    """Several parameters cannot be written, and only one of their errors is raised."""
    draw = np.random.default_rng(0)
    state = {str(n): jnp.asarray(draw.standard_normal(1000)) for n in range(80)}

    def fail(folder: Path) -> None:
        with (
            pytest.raises(UserError, match="File too large"),
            Run(folder, 0) as run,
            small_files(16384),
        ):
            run.save(1, state)
            run.wait()

    for number in range(2):
        fail(tmp_path / str(number))
        gc.collect()  # tasks are deleted, and their errors reported
    assert not caplog.records


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", range(1, 8, 2))
def test_an_error_at_any_write_is_one_sentence(straight, tmp_path, monkeypatch, number, call):
    """Each fsync of a run in turn fails: those of the lock, the metrics and the event file."""
    calls, fsync = [], os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_write.os, "fsync", failing)
        with pytest.raises(UserError) as error:
            train(tmp_path / "run", 6)
    reason = "the disk is full" if number == errno.ENOSPC else os.strerror(number)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert_same(tmp_path / "run", straight)


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run: a file has the place of a directory"):
        Run(tmp_path / "run", 0)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/checkpoints").touch()
    with pytest.raises(UserError, match="more/checkpoints: cannot be written"):
        Run(tmp_path / "more", 0)
    assert not (tmp_path / "more/run.lock").exists()


def test_lines_that_are_no_metrics_are_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    for line in ("[1]", '{"loss": 1}', '{"step": "x"}'):
        (tmp_path / "run/metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(UserError, match="metrics.jsonl, line 1: no metrics of a step"):
            Run(tmp_path / "run", 0)


def test_events_are_read_by_tensorboard(tmp_path):
    record = pytest.importorskip("tensorboardX.record_writer")
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    del record
    events = EventFile(tmp_path / "events", 5)
    events.add(6, {"loss": 0.5})
    events.close()
    (file,) = (tmp_path / "events").iterdir()
    data, read = file.read_bytes(), []
    while data:  # a length, its checksum, an event, its checksum
        size = int.from_bytes(data[:8], "little")
        read.append(proto.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in read] == [0, 5, 6]
    assert read[1].session_log.status == proto.SessionLog.START
    assert (read[2].summary.value[0].tag, read[2].summary.value[0].simple_value) == ("loss", 0.5)
