"""Statistics against SciPy, brute force and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from xflow_jax.evaluation.statistics import aup, mcnemar, pass_at_k, wilson


def test_wilson_is_scipys():
    for passed, n in ((0, 7), (3, 7), (512, 512), (230, 512)):
        wanted = binomtest(passed, n).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson(passed, n), (wanted.low, wanted.high), atol=1e-6)


def test_pass_at_k_is_the_mean_over_all_choices():
    for n, passed, k in ((5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 1, 6), (4, 3, 2)):
        answers = [i < passed for i in range(n)]
        choices = [any(chosen) for chosen in itertools.combinations(answers, k)]
        assert pass_at_k(n, passed, k) == pytest.approx(np.mean(choices))
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k(2, 1, 3)


def test_mcnemar_is_the_exact_binomial_test():
    pairs = [(True, False)] * 9 + [(False, True)] * 2 + [(True, True)] * 30 + [(False, False)] * 4
    first, second, p = mcnemar(pairs)
    assert (first, second) == (9, 2) and p == pytest.approx(binomtest(2, 11).pvalue)
    assert mcnemar(pairs[11:]) == (0, 0, 1.0)  # nothing tells them apart
    assert mcnemar([(True, False), (False, True)])[2] == 1.0
    assert mcnemar([(True, False)] * 1100)[2] == 0.0  # and no overflow


def test_aup_by_hand():
    # W(80) = 1, W(76) = e^(-0.15), W(60) left out: more than 5 below the first.
    w = math.exp(-3 * (1 - 76 / 80))
    wanted = 1 * 80 + (2 - 1) * (76 * w + 80) / 2
    assert aup([(2.0, 76.0), (1.0, 80.0), (8.0, 60.0)], best=80.0) == pytest.approx(wanted)
    w80, w76 = math.exp(-3 * (1 - 80 / 90)), math.exp(-3 * (1 - 76 / 90))
    assert aup([(1.0, 80.0), (2.0, 76.0)], best=90.0) == pytest.approx(
        80 + (76 * w76 + 80 * w80) / 2
    )
    assert aup([(4.0, 50.0)], best=50.0) == 200.0
    assert aup([(1.0, 0.0), (2.0, 0.0)], best=0.0) == 0.0
