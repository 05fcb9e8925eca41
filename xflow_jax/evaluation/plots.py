"""Pictures: accuracy over budget as PNG, and the trajectory of one decode as a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Row

# Okabe and Ito's colours, told apart by the colour-blind; black and yellow are left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_accuracy(rows: Sequence[Row], path: str | Path, title: str = "") -> None:
    """Draws a line a rule: accuracy with its interval over the mean forward passes per response token, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rules = list(dict.fromkeys(row.rule for row in rows))
    figure = Figure(figsize=(8.4, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for number, rule in enumerate(rules):
        points = sorted(
            (row.passes_per_token, row.accuracy, row.low, row.high)
            for row in rows
            if row.rule == rule
        )
        x, y, low, high = np.array(points).T
        colour = COLOURS[number % len(COLOURS)]
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
        ends.append((y[-1], x[-1], rule, colour))
    axes.set_xscale("log", base=2)
    # Accuracies that are all high would crowd under the top; markers at the ends stay whole.
    worst = min(row.low for row in rows)
    lowest = 10 * np.floor(worst / 10) if worst > 50 else 0.0
    share = (100 - lowest) / 100
    axes.set_ylim(lowest - 2 * share, 100 + 2 * share)
    used = [row.passes_per_token for row in rows]
    low, high = int(np.floor(np.log2(min(used)) + 0.05)), int(np.ceil(np.log2(max(used)) - 0.05))
    high = max(high, low + 1)
    axes.set_xlim(2.0**low * 0.9, 2.0**high * 1.1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in range(low, high + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"1/{round(1 / x)}" if x < 1 else f"{x:g}")
    )
    axes.set_xlabel("forward passes per response token")
    axes.set_ylabel("problems solved (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Labels stand right of the plot at the height of their line's end, pushed apart where they would overlap.
    heights = _apart([y for y, *_ in ends], gap=5.0 * share, low=lowest, high=100.0)
    right = axes.get_xlim()[1]
    for (y, x, rule, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            rule if len(rule) <= 30 else f"{rule[:29]}…",
            xy=(x, y),
            xytext=(right * 1.04, height),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "linestyle": ":",
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights moved as little as a pass up and a pass down need to be `gap` apart and in [low, high]."""
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


def plot_alignment(metrics: Sequence[dict[str, float]], path: str | Path) -> None:
    """Draws an alignment on held-out responses, as the paper's Fig. 2, as PNG.

    Left: the embedding error at masked and at clean positions over the steps. Right: the cross-entropy at masked
    positions beside the frozen model's. metrics: lines of train.align's metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in metrics if "held_out_loss" in row]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, title, lines in (
        (
            left,
            "embedding error, summed over E",
            {"masked": "held_out_error_masked", "clean": "held_out_error_clean"},
        ),
        (
            right,
            "cross-entropy at masked positions",
            {"aligned": "held_out_masked_nll", "frozen": "frozen_masked_nll"},
        ),
    ):
        for number, (label, key) in enumerate(lines.items()):
            style = "--" if label == "frozen" else "-"
            axes.plot(
                steps,
                [row[key] for row in rows],
                style,
                color=COLOURS[number],
                linewidth=1.8,
                label=label,
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    left.set_yscale("log")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def plot_policy_steps(policy: Any, path: str | Path) -> None:
    """Draws a policy's expected step over confidence and progress, at the start, middle and end of a block, as PNG.

    What is left of 1 is given to the three next tokens in halves, since the policy sees four probabilities.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from xflow_jax.decoding import features

    # Confidence on a scale of its distance from 1, where all that matters happens.
    c = 1 - np.geomspace(0.75, 1e-3, 80)
    t = np.linspace(0, 1, 60)
    top = np.stack([c, (1 - c) / 2, (1 - c) / 4, (1 - c) / 8], axis=-1)
    top = -np.sort(-np.broadcast_to(top, (t.size, c.size, 4)), axis=-1).astype(np.float32)
    progress = np.broadcast_to(t[:, None], (t.size, c.size)).astype(np.float32)
    figure = Figure(figsize=(9.6, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, rho in zip(panels, (0.0, 0.5, 1.0), strict=True):
        a = np.asarray(policy.expected_step(features(top, progress, rho)))
        mesh = axes.pcolormesh(1 - c, t, a, cmap="viridis", vmin=0, vmax=1, shading="nearest")
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks([0.5, 0.1, 0.01, 0.001], ["0.5", "0.9", "0.99", "0.999"])
        axes.minorticks_off()
        axes.set_xlabel("confidence c")
        axes.set_title(f"position in the block's steps {rho:g}", loc="left", fontsize=10)
    panels[0].set_ylabel("progress t")
    figure.colorbar(mesh, ax=panels, label="expected step a")
    figure.savefig(path)
