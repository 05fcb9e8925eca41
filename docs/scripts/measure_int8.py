"""Measures the error of logits by dtype, in standard deviations of the float32 logits.

    python docs/scripts/measure_int8.py MODEL ...

Half of the tokens are masked. The last two rows compute in float32, so that only the rounding of
the matrices is left, without and with that of the head.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xflow_jax.evaluation.tables import markdown_table
from xflow_jax.lm import LM, load
from xflow_jax.models import SCALE, quantize

HEADER = ("model", "weights", "error", "largest", "same best token")
ROWS, LENGTH = 16, 64


def tokens_of(lm: LM) -> np.ndarray:
    """Draws tokens of which half are the mask."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, lm.config.vocab_size, (ROWS, LENGTH))
    mask_id = getattr(lm.config, "mask_token_id", None) or 0  # test models may have none
    return np.where(rng.random(ids.shape) < 0.5, mask_id, ids)


def rounded(lm: LM, int8: LM, head: bool) -> LM:
    """Rounds the matrices of a float32 model, and the head on request."""
    scales = {path for path in flatten_dict(int8.params, sep="/") if path.endswith(SCALE)}
    leaves = flatten_dict(lm.params, sep="/")
    for path, x in leaves.items():
        if path + SCALE in scales or (head and path == "ff_out/kernel"):
            q, scale = quantize(np.asarray(x))
            leaves[path] = q * scale[..., None, :]
    return dataclasses.replace(lm, params=unflatten_dict(leaves, sep="/"))


def main(models: list[str]) -> None:
    """Prints a table of each model."""
    for name in models:
        lines = []
        lm, int8 = load(name), load(name, "int8")
        tokens = tokens_of(lm)
        exact = np.asarray(lm.logits(tokens))
        others = {
            "bfloat16": load(name, "bfloat16"),
            "int8": int8,
            "rounded": rounded(lm, int8, False),
            "rounded, with the head": rounded(lm, int8, True),
        }
        for label, other in others.items():
            logits = np.asarray(other.logits(tokens))
            error, same = np.abs(logits - exact), logits.argmax(-1) == exact.argmax(-1)
            figures = (error**2).mean() ** 0.5 / exact.std(), error.max() / exact.std()
            cells = (*(f"{x:.3f}" for x in figures), f"{100 * same.mean():.1f} %")
            lines.append((Path(name).name, label, *cells))
        print(markdown_table(HEADER, lines, 2), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="a model")
    main(parser.parse_args().models)
