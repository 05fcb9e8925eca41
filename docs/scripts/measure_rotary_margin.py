"""Measures how well one attention head can see a column of a square, by its rotary embedding.

    python docs/scripts/measure_rotary_margin.py 10000 100 5

The rows of a square of size n are n + 1 tokens apart. A head's score of a token d tokens away is
the sum of a cos(f d) + b sin(f d) over its frequencies f, where query and key give a and b. The
margin is the largest difference between the lowest score of the column's other cells and the
highest score of anything else in the answer, with every a and b between -1 and 1. With 0 no head
can tell the column from the rest.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import linprog

SIZES = (4, 5, 6)


def margin(theta: float, size: int, head_dim: int) -> float:
    """Solves the linear program of the margin.

    Args:
        theta: base of the rotary embedding.
        size: n, digits of a row.
        head_dim: dimensions of a head, two for each frequency.
    """
    frequencies = theta ** (-np.arange(head_dim // 2) / (head_dim // 2))
    span = size * (size + 1)
    distances = np.array([d for d in range(-span, span + 1) if d])
    angles = np.outer(distances, frequencies)
    scores = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    column = (distances % (size + 1) == 0) & (abs(distances) < span)
    # Variables: a, b, the lowest score of the column, the highest one of the rest.
    lowest, highest = column.astype(float), -(~column).astype(float)
    signs = np.where(column, -1.0, 1.0)[:, None]
    bounds = [(-1.0, 1.0)] * head_dim + [(None, None)] * 2
    solution = linprog(
        [0.0] * head_dim + [-1.0, 1.0],
        A_ub=np.column_stack([signs * scores, lowest, highest]),
        b_ub=np.zeros(len(distances)),
        bounds=bounds,
    )
    return max(0.0, -float(solution.fun))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("thetas", nargs="+", type=float, help="bases of the rotary embedding")
    parser.add_argument("--head-dim", type=int, default=32, help="dimensions of a head")
    args = parser.parse_args()
    for theta in args.thetas:
        margins = [margin(theta, size, args.head_dim) for size in SIZES]
        print(
            f"{theta:<10g}"
            + "  ".join(f"size {n}: {m:.2f}" for n, m in zip(SIZES, margins, strict=True))
        )
