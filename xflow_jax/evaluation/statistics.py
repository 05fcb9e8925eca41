"""Wilson interval, pass@k, McNemar's exact test, and accuracy under parallelism (AUP)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(passed: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Computes the Wilson score interval of a share.

    SciPy's binomtest gives the same numbers, but it takes neither fractions nor n = 0.

    Args:
        passed: number of successes, 0 ... n. It may be a fraction, as a mean over samples is.
        n: number of trials.
        z: quantile of the normal distribution. The default gives 95 %.

    Returns:
        (low, high) in [0, 1], and (0, 1) if n is 0.
    """
    if n == 0:
        return 0.0, 1.0
    p = passed / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Estimates the probability that one of k answers passes.

    The estimate 1 - C(n - c, k) / C(n, k) is unbiased (Chen et al., arXiv:2107.03374).

    Args:
        n: number of answers to the problem.
        passed: c, how many of them pass.
        k: number of answers drawn.

    Raises:
        ValueError: if there are fewer than k answers.
    """
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers to each problem, not {n}")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, float]:
    """Runs McNemar's exact two-sided test on the verdicts of two methods.

    The p-value is that of a binomial test with probability 1/2 on the problems that only one
    method solves.

    Args:
        pairs: (first passed, second passed) of each problem.

    Returns:
        Problems that only the first solves, problems that only the second solves, and p.
    """
    first = sum(a and not b for a, b in pairs)
    second = sum(b and not a for a, b in pairs)
    n, few = first + second, min(first, second)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return first, second, min(1.0, 2 * tail / 2**n)


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Computes accuracy under parallelism (d3LLM, arXiv:2601.07568).

    It is the area under accuracy y over parallelism, with the weight
    W(y) = min(exp(-3 (1 - y / best)), 1). The first point counts from 0, unweighted. Points more
    than 5 below the accuracy of the first one are left out.

    Args:
        points: (tokens per forward pass, accuracy in percent), in any order.
        best: highest accuracy of all compared methods, in percent.
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - 5]

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0) if best else 0.0

    area = kept[0][0] * kept[0][1]
    for (rho0, y0), (rho1, y1) in zip(kept, kept[1:], strict=False):
        area += (rho1 - rho0) * (weighted(y1) + weighted(y0)) / 2
    return area
