"""HTML page with every step of one decode."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xflow_jax.checkpoints import write_atomic
from xflow_jax.decoding import Trace
from xflow_jax.types import LanguageModel

# Fields of the trace that the page needs.
_FIELDS = (
    "tokens",
    "progress",
    "confidence",
    "step_fraction",
    "reedited",
    "top",
    "top_tokens",
)


def current_tokens(predicted: np.ndarray, progress: np.ndarray, reedited: np.ndarray) -> np.ndarray:
    """Finds the token of each position after each step.

    It is the settled token, or else the prediction of the step.

    Args:
        predicted: int [T, N].
        progress: t after each step, float [T, N].
        reedited: bool [T, N].

    Returns:
        int [T, N].
    """
    current = predicted.copy()
    for step in range(1, len(predicted)):
        settled = (progress[step - 1] >= 1) & ~reedited[step]
        current[step] = np.where(settled, current[step - 1], predicted[step])
    return current


def token_texts(lm: LanguageModel) -> list[str]:
    """Returns the text of every token id.

    Rows of the head without a token get "<id>".
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    known = len(tokenizer)
    return [tokenizer.decode([i]) if i < known else f"<{i}>" for i in range(lm.config.vocab_rows)]


def write_trajectory_page(
    path: str | Path,
    trace: Trace,
    row: int,
    texts: Sequence[str],
    prompt: str,
    facts: Mapping[str, str],
) -> None:
    """Writes one self-contained page: tokens over steps, coloured by progress.

    Steps that early exit skipped are left out.

    Args:
        path: the HTML file.
        trace: trace of `generate`, arrays [T, B, N].
        row: index of the sequence.
        texts: text of every token id, from `token_texts`.
        prompt: the prompt, shown above the response.
        facts: name -> value, such as rule, steps and verdict.

    Raises:
        UserError: if the file cannot be written.
    """
    # No "<" may stand in the data of the script, or a token could end the script.
    data = json.dumps(_page_data(trace, row, texts), separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    described = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()
    )
    page = (Path(__file__).parent / "trajectory.html").read_text(encoding="utf-8")
    page = page.replace("<!--PROMPT-->", html.escape(prompt)).replace("<!--FACTS-->", described)
    page = page.replace("/*DATA*/", data)
    write_atomic(Path(path), page)


def _page_data(trace: Trace, row: int, texts: Sequence[str]) -> dict[str, object]:
    """Builds the data of the page's script. Tokens are indices into "texts"."""
    steps = np.flatnonzero(np.asarray(trace.confidence)[:, row].max(axis=-1) > 0)
    arrays = {name: np.asarray(getattr(trace, name))[steps, row] for name in _FIELDS}
    predicted, candidates = arrays["tokens"], arrays["top_tokens"]
    current = current_tokens(predicted, arrays["progress"], arrays["reedited"])
    used = np.unique(np.concatenate([x.ravel() for x in (predicted, current, candidates)]))
    return {
        "steps": (steps + 1).tolist(),
        "of": len(trace.tokens),
        "texts": [texts[i] for i in used.tolist()],
        "predicted": np.searchsorted(used, predicted).tolist(),
        "current": np.searchsorted(used, current).tolist(),
        "progress": np.round(arrays["progress"], 3).tolist(),
        "confidence": np.round(arrays["confidence"], 3).tolist(),
        "fraction": np.round(arrays["step_fraction"], 3).tolist(),
        "reedited": arrays["reedited"].astype(int).tolist(),
        "candidates": np.searchsorted(used, candidates).tolist(),
        "probability": np.round(arrays["top"], 3).tolist(),
    }
