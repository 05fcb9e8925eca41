"""Comparison of training runs in their folders, and runs that end early."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from train.run import Run
from train.step_clock import TIME_METRICS
from xflow_jax.training.data import read_lines


def metrics(out: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without measured times."""
    return [{k: v for k, v in row.items() if k not in TIME_METRICS} for row in all_metrics(out)]


def all_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def metrics_before(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in read_lines(out / "metrics.jsonl")]


def tensors(out: Path, folder: str = "hf") -> dict[str, np.ndarray]:
    return load_file(out / folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for name, value in tensors(a).items():
        np.testing.assert_array_equal(value, tensors(b)[name], err_msg=name)


def assert_close(a: Path, b: Path) -> None:
    """Compares the first step to 1e-5 and later ones to 1e-4, since Adam amplifies rounding."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x.keys() == y.keys()
        rtol = 1e-5 if x["step"] == 0 else 1e-4
        np.testing.assert_allclose(
            list(x.values()), list(y.values()), rtol=rtol, err_msg=f"step {x['step']}"
        )
        for name in ("loss", "grad_norm") if x["step"] == 1 else ():
            np.testing.assert_allclose(x[name], y[name], rtol=1e-5, err_msg=name)


@contextlib.contextmanager
def fate(at: int, strike: Callable[[Run], None]):
    """Calls strike(run) before step `at` of a run."""
    steps = Run.steps

    def fated(run, first, last, describe):
        for step in steps(run, first, last, describe):
            if step == at:
                strike(run)
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", fated)
        yield


def die(run: Run) -> None:
    run.wait()
    raise KeyboardInterrupt


def terminate(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
