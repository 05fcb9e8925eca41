"""Plots of evaluations, alignments and policies, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from xflow_jax.checkpoints import atomic_file
from xflow_jax.decoding import Policy, features
from xflow_jax.errors import disk_errors
from xflow_jax.evaluation.answers import Row
from xflow_jax.input_files import to_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
LABEL_LENGTH = 30  # characters of a rule in the plot


def plot_accuracy(rows: Sequence[Row], path: str | Path, title: str = "") -> None:
    """Plots accuracy over the mean forward passes per response token.

    There is a line for each rule.

    Args:
        rows: one row for each rule and budget. The bars are their 95 % intervals.
        path: the PNG file.
        title: title of the plot.

    Raises:
        UserError: if the file cannot be written.
    """
    figure = _new_figure(8.4, 5.0)
    axes = figure.add_subplot()
    ends = []
    for number, rule in enumerate(dict.fromkeys(row.rule for row in rows)):
        colour = COLOURS[number % len(COLOURS)]
        x, y = _draw_curve(axes, [row for row in rows if row.rule == rule], number, colour)
        ends.append((x, y, rule, colour))
    axes.set_xscale("log", base=2)
    # If all accuracies are high, the axis begins higher, so that they do not crowd at the top.
    # The margins keep the markers at both ends whole.
    worst = min(row.low for row in rows)
    lowest = 10 * float(np.floor(worst / 10)) if worst > 50 else 0.0
    share = (100 - lowest) / 100
    axes.set_ylim(lowest - 2 * share, 100 + 2 * share)
    right = _set_passes_axis(axes, [row.passes_per_token for row in rows])
    axes.set_ylabel("problems solved (%)")
    axes.set_title(title, loc="left", fontsize=11)
    _style_axes(axes)
    _label_curves(axes, ends, right * 1.04, gap=5.0 * share, low=lowest)
    _save(figure, path)


def _draw_curve(axes: Axes, rows: Sequence[Row], number: int, colour: str) -> tuple[float, float]:
    """Draws one rule and returns (x, y) of its rightmost point."""
    points = sorted((row.passes_per_token, row.accuracy, row.low, row.high) for row in rows)
    x, y, low, high = np.array(points).T
    axes.errorbar(
        x,
        y,
        yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5.5,
        linewidth=1.8,
        linestyle="-" if number < len(COLOURS) else "--",
        elinewidth=1,
        capsize=2.5,
    )
    return x[-1], y[-1]


def _set_passes_axis(axes: Axes, used: Sequence[float]) -> float:
    """Sets the x-axis to powers of two and returns its right limit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = int(np.floor(np.log2(min(used)) + 0.05)), int(np.ceil(np.log2(max(used)) - 0.05))
    high = max(high, low + 1)
    axes.set_xlim(2.0**low * 0.9, 2.0**high * 1.1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in range(low, high + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"1/{round(1 / x)}" if x < 1 else f"{x:g}")
    )
    axes.set_xlabel("forward passes per response token")
    return 2.0**high * 1.1


def _label_curves(
    axes: Axes,
    ends: Sequence[tuple[float, float, str, str]],
    x_label: float,
    gap: float,
    low: float,
) -> None:
    """Writes the labels of curves to the right of the plot.

    Args:
        axes: the axes.
        ends: (x, y, label, colour) of the right end of each curve.
        x_label: x of the labels.
        gap: least distance of two labels.
        low: lowest y of a label.
    """
    heights = _spread_heights([y for _, y, *_ in ends], gap, low, high=100.0)
    for (x, y, label, colour), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "linestyle": ":", "linewidth": 0.7, "color": colour}
        axes.annotate(
            label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…",
            xy=(x, y),
            xytext=(x_label, height),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={**line, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def _spread_heights(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves heights into [low, high], at least `gap` apart.

    One pass moves them up and one pass down.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [float(h) for h in heights]
    floor = low
    for i in order:
        moved[i] = max(moved[i], floor)
        floor = moved[i] + gap
    ceiling = high
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def plot_alignment(metrics: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Plots an alignment on held-out responses, as the paper's Fig. 2.

    The left panel has the embedding error at masked and at clean positions over the steps. The
    right panel has the cross-entropy at masked positions, beside that of the frozen model.

    Args:
        metrics: lines of metrics.jsonl, as train.align writes it.
        path: the PNG file.

    Raises:
        UserError: if the file cannot be written.
    """
    rows = [row for row in metrics if "held_out_loss" in row]
    figure = _new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    errors = {"masked": "held_out_error_masked", "clean": "held_out_error_clean"}
    losses = {"aligned": "held_out_masked_nll", "frozen": "frozen_masked_nll"}
    for axes, title, lines in (
        (left, "embedding error, summed over E", errors),
        (right, "cross-entropy at masked positions", losses),
    ):
        for number, (label, key) in enumerate(lines.items()):
            axes.plot(
                [row["step"] for row in rows],
                [row[key] for row in rows],
                "--" if label == "frozen" else "-",
                color=COLOURS[number],
                linewidth=1.8,
                label=label,
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        _style_axes(axes)
        axes.legend(frameon=False, fontsize=9)
    left.set_yscale("log")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    _save(figure, path)


def plot_policy_steps(policy: Policy, path: str | Path) -> None:
    """Plots the expected step of a policy over confidence and progress.

    The panels are the start, the middle and the end of a block's steps. A policy depends on four
    probabilities: of what the confidence leaves, the next three tokens get a half, a quarter and
    an eighth.

    Args:
        policy: the policy.
        path: the PNG file.

    Raises:
        UserError: if the file cannot be written.
    """
    # The scale of confidence is logarithmic in 1 - c, since steps change most close to c = 1.
    c = 1 - np.geomspace(0.75, 1e-3, 80)
    t = np.linspace(0, 1, 60)
    probabilities = np.stack([c, (1 - c) / 2, (1 - c) / 4, (1 - c) / 8], axis=-1)
    shape = (t.size, c.size, 4)
    top = jnp.asarray(-np.sort(-np.broadcast_to(probabilities, shape), axis=-1), jnp.float32)
    progress = jnp.asarray(np.broadcast_to(t[:, None], shape[:2]), jnp.float32)
    figure = _new_figure(9.6, 3.4)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {0.0: "first step of a block", 0.5: "middle step", 1.0: "last step"}
    for axes, (rho, title) in zip(panels, titles.items(), strict=True):
        a = np.asarray(policy.expected_step(features(top, progress, rho)))
        image = axes.pcolormesh(1 - c, t, a, cmap="viridis", vmin=0, vmax=1, shading="nearest")
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks([0.5, 0.1, 0.01, 0.001], ["0.5", "0.9", "0.99", "0.999"])
        axes.minorticks_off()
        axes.set_xlabel("confidence c")
        axes.set_title(f"{title}, rho = {rho:g}", loc="left", fontsize=10)
    panels[0].set_ylabel("progress t")
    figure.colorbar(image, ax=panels, label="expected step a")
    _save(figure, path)


def _new_figure(width: float, height: float) -> Figure:
    """Creates a figure of that size in inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _style_axes(axes: Axes) -> None:
    """Leaves horizontal grid lines and two spines."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    with disk_errors(path), atomic_file(to_path(path)) as temporary:
        figure.savefig(temporary, format="png")
