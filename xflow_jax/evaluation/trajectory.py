"""Pictures: accuracy over budget as PNG, and the trajectory of one decode as a page of its own."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xflow_jax.errors import UserError


def standing_tokens(
    predicted: np.ndarray, progress: np.ndarray, reedited: np.ndarray
) -> np.ndarray:
    """What stands at each position after each step: the settled token, or else the step's prediction; int [T, N].

    predicted int, progress float (after the step), reedited bool: [T, N] each, as a trace has them for one sequence.
    """
    standing = predicted.copy()
    for step in range(1, len(predicted)):
        fixed = (progress[step - 1] >= 1) & ~reedited[step]
        standing[step] = np.where(fixed, standing[step - 1], predicted[step])
    return standing


def write_trajectory_page(
    path: str | Path,
    trace: Any,
    row: int,
    spell: Sequence[str],
    prompt: str,
    facts: dict[str, str],
) -> None:
    """Writes one self-contained page: tokens over steps, coloured by progress, with the answer at each step.

    trace: of `generate`, [T, B, N]; row: which sequence of it. spell: token id -> its text. facts: what to say
    of the decode (rule, steps, verdict). Steps that were skipped by early exit are left out. Raises UserError where the
    file cannot be written.
    """
    steps = np.flatnonzero(trace.confidence[:, row].max(axis=-1) > 0)
    pick = {
        name: np.asarray(getattr(trace, name))[steps, row]
        for name in (
            "tokens",
            "progress",
            "confidence",
            "step_fraction",
            "reedited",
            "top",
            "top_tokens",
        )
    }
    standing = standing_tokens(pick["tokens"], pick["progress"], pick["reedited"])
    likely = pick["top_tokens"]
    used = np.unique(np.concatenate([pick["tokens"].ravel(), standing.ravel(), likely.ravel()]))
    data = {
        "steps": (steps + 1).tolist(),
        "of": len(trace.tokens),
        "words": [spell[i] for i in used.tolist()],
        "predicted": np.searchsorted(used, pick["tokens"]).tolist(),
        "standing": np.searchsorted(used, standing).tolist(),
        "progress": np.round(pick["progress"], 3).tolist(),
        "confidence": np.round(pick["confidence"], 3).tolist(),
        "fraction": np.round(pick["step_fraction"], 3).tolist(),
        "reedited": pick["reedited"].astype(int).tolist(),
        "likely": np.searchsorted(used, likely).tolist(),
        "probability": np.round(pick["top"], 3).tolist(),
    }
    # No "<" in the script's data, or a token could end the script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    described = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()
    )
    page = (Path(__file__).parent / "trajectory.html").read_text()
    page = page.replace("<!--PROMPT-->", html.escape(prompt)).replace("<!--FACTS-->", described)
    page = page.replace("/*DATA*/", text)
    try:
        Path(path).write_text(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
