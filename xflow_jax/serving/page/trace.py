"""Fills the page with the steps of recorded decodes."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from xflow_jax.checkpoints import write_atomic
from xflow_jax.decoding import Trace
from xflow_jax.input_files import to_path
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


@dataclass(frozen=True)
class TracedDecode:
    """A decode for the page.

    Attributes:
        label: its heading, the rule as on the command line.
        trace: trace of `generate`, arrays [T, B, N].
        row: index of the sequence.
        facts: name -> value, such as steps and verdict.
    """

    label: str
    trace: Trace
    row: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)


@cache
def live_page() -> str:
    """Returns the page without data.

    It reads the stream of the server that it came from.
    """
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


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
    decodes: Sequence[TracedDecode],
    texts: Sequence[str],
    messages: Sequence[Mapping[str, str]],
    title: str = "",
) -> None:
    """Writes one self-contained page: the tokens come into focus over the steps.

    Steps that early exit skipped are left out.

    Args:
        path: the HTML file.
        decodes: one decode, or two of the same prompt, side by side.
        texts: text of every token id, from `token_texts`.
        messages: the chat up to the response, shown above it.
        title: a text for the head of the page, such as the model's name.

    Raises:
        UserError: if the file cannot be written.
    """
    chat = [{"role": m["role"], "content": m["content"]} for m in messages]
    runs = [_run_data(decode, texts) for decode in decodes]
    # No "<" may stand in the data of the script, or a token could end the script.
    data = json.dumps({"title": title, "messages": chat, "runs": runs}, separators=(",", ":"))
    page = live_page().replace("/*DATA*/null", data.replace("<", "\\u003c"), 1)
    page = page.replace("<!--PLAIN-->", _plain(decodes, chat), 1)
    write_atomic(to_path(path), page)


def _plain(decodes: Sequence[TracedDecode], chat: Sequence[Mapping[str, str]]) -> str:
    """Returns the prompt and the facts for a browser without scripts."""
    lines = [f"<p>{html.escape(m['role'])}: {html.escape(m['content'])}</p>" for m in chat]
    for decode in decodes:
        facts = {"rule": decode.label, **decode.facts}
        lines += [f"<p>{html.escape(k)}: {html.escape(v)}</p>" for k, v in facts.items()]
    return "".join(lines)


def _run_data(decode: TracedDecode, texts: Sequence[str]) -> dict[str, object]:
    """Builds the data of one decode. Tokens are indices into "texts"."""
    trace, row = decode.trace, decode.row
    steps = np.flatnonzero(np.asarray(trace.confidence)[:, row].max(axis=-1) > 0)
    arrays = {name: np.asarray(getattr(trace, name))[steps, row] for name in _FIELDS}
    predicted, candidates = arrays["tokens"], arrays["top_tokens"]
    current = current_tokens(predicted, arrays["progress"], arrays["reedited"])
    used = np.unique(np.concatenate([x.ravel() for x in (predicted, current, candidates)]))
    return {
        "label": decode.label,
        "facts": dict(decode.facts),
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
