"""Times of a run: steps without compilation and pauses, and goodput across restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import step_clock
from train.step_clock import TIME_METRICS, StepClock
from xflow_jax.errors import UserError
from xflow_jax.planning import find_chip


class FakeTime:
    """A clock that moves when it is moved, 1000 seconds after 1970."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now - 500


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(step_clock, "time", fake)
    return fake


def start(folder: Path, step: int = 0, devices: int = 1, began: float | None = None) -> StepClock:
    times = StepClock(folder / "times.json", began, devices, writes=True)
    times.start(step)
    return times


def test_a_report_has_neither_compilation_nor_pauses(clock, tmp_path):
    times = start(tmp_path)
    clock.now += 30  # compiles
    times.count((), 64)
    for _ in range(4):
        clock.now += 2
        times.count((), 64)
    with times.paused(()):
        clock.now += 100  # evaluates
    clock.now += 20  # another shape compiles
    times.count((), 128)
    clock.now += 4
    times.count((), 128)
    assert times.report(()) == {
        "goodput": 12 / 162,
        "seconds_per_step": 12 / 5,
        "tokens_per_second": (4 * 64 + 128) / 12,
    }
    clock.now += 3
    times.count((), 128)
    with times.paused(()):
        times.saved(6, 0.5)
    times.written(2.5)
    report = times.report(())
    assert report == {
        "goodput": 15 / 165,
        "seconds_per_step": 3.0,
        "tokens_per_second": 128 / 3,
        "checkpoint_seconds": 0.5,
        "checkpoint_write_seconds": 2.5,
    }
    assert report.keys() <= set(TIME_METRICS)
    assert times.report(()).keys() == {"goodput"}, "no step since the last report"


def test_the_share_of_the_peak(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(step_clock, "find_chip", lambda kind: find_chip("TPU v5 lite"))
    times = start(tmp_path, devices=4)
    times.count((), 8)
    for passes in (1.0, 3.0):
        clock.now += 2
        times.count((), 8, 197e12, passes)
    assert times.report(())["model_flops_share"] == pytest.approx(4 * 197e12 / 4 / (4 * 197e12))


def test_goodput_counts_restarts_and_repeated_steps(clock, tmp_path):
    times = start(tmp_path, began=990.0)
    times.count((), 8)
    clock.now += 10
    times.count((), 8)
    times.saved(2, 0.1)
    clock.now += 7  # these steps are lost by a kill
    times.count((), 8)
    assert times.report(())["goodput"] == 17 / 27
    times.saved(3, 0.1)  # this checkpoint was not whole yet
    clock.now += 100  # until the machine is back

    times = start(tmp_path, step=2)
    assert times.goodput == 10 / 127
    times.count((), 8)
    clock.now += 13
    times.count((), 8)
    times.saved(4, 0.3)
    times.finish()
    clock.now += 1000  # nobody waits for a run that is complete
    assert times.goodput == 23 / 140
    assert times.summary() == (
        "16.4% of 140.0 s over 2 starts were spent in steps (goodput). A checkpoint held them up "
        "for 0.30 s"
    )

    times = start(tmp_path, step=4)  # for more steps
    clock.now += 20
    assert times.goodput == pytest.approx(23 / 160)


def test_a_run_killed_before_its_first_checkpoint_keeps_its_beginning(clock, tmp_path):
    times = start(tmp_path)
    times.count((), 8)
    clock.now += 10
    times.count((), 8)
    clock.now += 40
    times = start(tmp_path)
    assert times.goodput == 0 and times.summary() is None
    assert json.loads((tmp_path / "times.json").read_text())["starts"] == 2
    clock.now += 50
    times.count((), 8)
    clock.now += 50
    times.count((), 8)
    assert times.goodput == 50 / 150


@pytest.mark.parametrize("text", ["[1]", '{"began": "x"}', '{"steps": {"a": 1}}', '{"day": 3}'])
def test_other_files_are_one_sentence(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(UserError, match=r"times.json: it holds no times of a run. Remove it."):
        start(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    StepClock(tmp_path / "times.json", None, 1, writes=False).start(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 80GB SXM"),
    ],
)
def test_devices_by_the_names_of_jax(kind, name):
    chip = find_chip(kind)
    assert chip is not None and chip.name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA H100 PCIe", "NVIDIA L4", "TPU v55"])
def test_devices_without_a_peak(kind):
    assert find_chip(kind) is None
