"""Traces of jax.profiler: the option, and the steps that they hold."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from xflow_jax.benchmarks import StepProfiler, parse_profile, profiler
from xflow_jax.errors import UserError


def test_the_option():
    assert parse_profile("") == (None, 3)
    assert parse_profile("traces") == (Path("traces"), 3)
    assert parse_profile("a:b/traces:12") == (Path("a:b/traces"), 12)
    with pytest.raises(UserError, match="it must be DIR or DIR:STEPS"):
        parse_profile("traces:0")


def test_steps_behind_the_compilation_are_traced(monkeypatch):
    calls: list[object] = []

    @contextlib.contextmanager
    def trace(folder):
        calls.append(f"start {folder}")
        yield
        calls.append("stop")

    monkeypatch.setattr(profiler, "trace", trace)
    with StepProfiler("new:2") as steps:
        for step in range(6):
            steps.step()
            calls.append(step)
    assert calls == [0, 1, "start new", 2, 3, "stop", 4, 5]
    calls.clear()
    with StepProfiler("new:9") as steps:  # a run that ends before its trace
        for _ in range(4):
            steps.step()
    assert calls == ["start new", "stop"]
