"""The plots."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from matplotlib import image

from xflow_jax.decoding.policy import init_policy
from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Row
from xflow_jax.evaluation.plots import (
    _spread_heights,
    plot_accuracy,
    plot_alignment,
    plot_policy_steps,
)


def row(rule: str, steps: int, accuracy: float) -> Row:
    low, high = max(accuracy - 5, 0), min(accuracy + 5, 100)
    return Row(rule, f"{steps}/8", steps, 100, accuracy, low, high, steps, steps / 8, 1, 1)


def test_the_curve_is_drawn(tmp_path):
    path = tmp_path / "curve.png"
    rules = ["mask", "flow:power=4", "threshold"]
    plot_accuracy(
        [row(rule, s, 10 * s + i) for i, rule in enumerate(rules) for s in (1, 2, 8)], path, "title"
    )
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 100
    plot_accuracy([row("mask", 8, 50.0)], path)  # a single point is enough
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        plot_accuracy([row("mask", 8, 50.0)], tmp_path / "nowhere" / "curve.png")


@pytest.fixture
def pngs(tmp_path):
    """Returns a function that checks a plot and its error for a missing folder."""

    def check(plot):
        plot(tmp_path / "plot.png")
        assert image.imread(tmp_path / "plot.png").shape[0] > 400
        with pytest.raises(UserError, match="cannot be written"):
            plot(tmp_path / "nowhere" / "plot.png")

    return check


def test_an_alignment_is_drawn(pngs):
    names = ("held_out_loss", "held_out_error_masked", "held_out_error_clean")
    names += ("held_out_masked_nll", "frozen_masked_nll")
    lines = [{"step": step, **dict.fromkeys(names, 2.0 / (1 + step))} for step in range(3)]
    pngs(lambda path: plot_alignment([*lines, {"step": 3, "loss": 1.0}], path))


@pytest.mark.slow
def test_the_steps_of_a_policy_are_drawn(pngs):
    pngs(lambda path: plot_policy_steps(init_policy(jax.random.key(0), 8), path))


def test_labels_are_pushed_spread_heights():
    assert _spread_heights([10, 50], 5, 0, 100) == [10, 50]
    assert sorted(_spread_heights([99, 99, 98], 5, 0, 100)) == [90, 95, 100]
    assert _spread_heights([1, 0], 5, 0, 100) == [5, 0]
