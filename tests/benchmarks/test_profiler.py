"""Traces of jax.profiler: the option, and the steps that they hold."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from xflow_jax.benchmarks import StepProfiler, parse_profile
from xflow_jax.errors import UserError


def test_the_option():
    assert parse_profile("") == (None, 3)
    assert parse_profile("traces") == (Path("traces"), 3)
    assert parse_profile("a:b/traces:12") == (Path("a:b/traces"), 12)
    with pytest.raises(UserError, match="it must be DIR or DIR:STEPS"):
        parse_profile("traces:0")


def test_steps_behind_the_compilation_are_traced(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *a, **k: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda *a, **k: calls.append("stop"))
    with StepProfiler(f"{tmp_path / 'new'}:2") as profiler:
        for step in range(6):
            profiler.step()
            calls.append(step)
            jnp.ones(()).block_until_ready()
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
    assert (tmp_path / "new").is_dir()
