"""What verdicts add up to: intervals, pass@k, exact tests, and the area under a curve of accuracy over parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(passed: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of `passed` out of `n`, as shares (95 % by default); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = passed / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that at least one of k answers drawn from n is among the `passed` ones: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al., arXiv:2107.03374). ValueError where fewer than k answers are there.
    """
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers to each problem, not {n}")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, float]:
    """(solved by the first alone, by the second alone, p) of McNemar's exact two-sided test on the same problems.

    p is the chance, if either were as likely to win a problem that only one solves, of a split at least as uneven.
    """
    first = sum(a and not b for a, b in pairs)
    second = sum(b and not a for a, b in pairs)
    n, few = first + second, min(first, second)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return first, second, min(1.0, 2 * tail / 2**n)


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, arXiv:2601.07568), of (tokens per forward pass, accuracy in percent) points.

    In ascending order of parallelism, the area under accuracy weighted by W(y) = min(exp(-3 (1 - y / best)), 1), the
    first point counting from 0 unweighted; points more than 5 below the first one's accuracy are left out. best: the
    highest accuracy of all methods that are compared.
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - 5]

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0) if best else 0.0

    area = kept[0][0] * kept[0][1]
    for (rho0, y0), (rho1, y1) in zip(kept, kept[1:], strict=False):
        area += (rho1 - rho0) * (weighted(y1) + weighted(y0)) / 2
    return area
