"""Draws docs/trajectory.png: an answer of the bundled model after its first and last passes.

python docs/scripts/draw_trajectory.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

import xflow_jax as xf
from xflow_jax.serving import token_texts

PROMPT = (
    "Given a list of numbers, negate each number, multiply each number by 8 and finally return "
    "the range."
)
OUT = Path(__file__).parents[1] / "trajectory.png"
PANELS = 4
EDIT = "#d62728"


def layout(words: list[str]) -> list[tuple[int, int]]:
    """Returns the (line, column) of each token of the final text."""
    places, line, column = [], 0, 0
    for word in words:
        places.append((line, column))
        if "\n" in word:
            line, column = line + 1, len(word.rsplit("\n", 1)[1])
        else:
            column += len(word)
    return places


def main() -> None:
    """Decodes the prompt and draws the panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lm = xf.load("tiny")
    rule = xf.Flow(reedit="always", jump=0.5, early_exit=True)
    out = xf.generate(lm, [PROMPT], rule, gen_length=48, steps=12, block_length=48, trace=True)
    spell, trace = token_texts(lm), out.trace
    length = int(np.argmax(out.tokens[0] == lm.config.eos_id))
    final = [spell[i] for i in out.tokens[0, :length]]
    places = layout(final)
    width = max(c + len(w.strip("\n")) for (_, c), w in zip(places, final, strict=True))
    lines = max(line for line, _ in places) + 1
    passes = np.flatnonzero(trace.confidence[:, 0].max(axis=-1) > 0)
    chosen = [*passes[: PANELS - 1], passes[-1]]

    figure = Figure(figsize=(7.4, 3.6), dpi=170, layout="constrained")
    FigureCanvasAgg(figure)
    colours = matplotlib.colors.LinearSegmentedColormap.from_list(
        "progress", ["#eeeeee", "#fde4a3", "#f5a65b", "#3b7dd8", "#1f4e9c"]
    )
    panels = figure.subplots(PANELS // 2, 2)
    for axes, step in zip(panels.flat, chosen, strict=True):
        number = int(np.searchsorted(passes, step)) + 1
        axes.set_title(f"after pass {number} of {len(passes)}", loc="left", fontsize=9)
        axes.set(xlim=(-0.5, width + 1), ylim=(lines - 0.4, -0.6))
        axes.axis("off")
        for position, ((line, column), word) in enumerate(zip(places, final, strict=True)):
            t = float(trace.progress[step, 0, position])
            size = max(len(word.split("\n")[0]), 1)
            box = (column + 0.04, line - 0.44), size - 0.08, 0.88
            tokens = trace.tokens[:, 0, position]
            edited = trace.reedited[step, 0, position] and tokens[step] != tokens[step - 1]
            frame = {"edgecolor": EDIT, "linewidth": 1.6} if edited else {"linewidth": 0}
            axes.add_patch(matplotlib.patches.Rectangle(*box, facecolor=colours(t), **frame))
            guess = spell[int(trace.tokens[step, 0, position])] if t < 1 else word
            text = "" if t == 0 else guess.replace("\n", "↵").strip(" ")[:size]
            axes.text(
                column + (size + len(word) - len(word.lstrip(" "))) / 2
                if size > 1
                else column + 0.5,
                line,
                text,
                family="monospace",
                fontsize=8,
                ha="center",
                va="center",
                color="white" if t > 0.6 else "black",
            )
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colours)
    label = "progress t. Red frame: another token"
    figure.colorbar(scale, ax=panels, shrink=0.9, label=label, aspect=30)
    figure.savefig(OUT)
    print(f"{OUT}: {length} tokens in {len(passes)} forward passes")


if __name__ == "__main__":
    main()
