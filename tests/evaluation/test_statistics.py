"""Statistics against SciPy, enumeration and results computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from xflow_jax.evaluation.statistics import aup, mcnemar, pass_at_k, wilson_interval


def test_wilson_interval_by_hand():
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.84146
    assert np.allclose(wilson_interval(8, 10), (0.490162, 0.943318), atol=1e-6)
    assert np.allclose(wilson_interval(0, 64), (0.0, 0.056624), atol=1e-6)
    assert wilson_interval(64, 64)[1] == 1.0 and wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(7.5, 10)  # a mean over samples is a fraction
    assert wilson_interval(7, 10)[0] < low < wilson_interval(8, 10)[0] < 0.75 < high


def test_wilson_interval_equals_scipy():
    for n in (1, 7, 164, 512):
        for passed in {0, 1, n // 3, n // 2, n - 1, n}:
            wanted = binomtest(passed, n).proportion_ci(method="wilson")
            found = wilson_interval(passed, n)
            np.testing.assert_allclose(found, (wanted.low, wanted.high), atol=1e-7)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, passed, k in ((5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 1, 6), (4, 3, 2)):
        answers = [i < passed for i in range(n)]
        subsets = [any(chosen) for chosen in itertools.combinations(answers, k)]
        assert pass_at_k(n, passed, k) == pytest.approx(np.mean(subsets))
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k(2, 1, 3)


def test_mcnemar_is_the_exact_binomial_test():
    pairs = [(True, False)] * 9 + [(False, True)] * 2 + [(True, True)] * 30 + [(False, False)] * 4
    first, second, p = mcnemar(pairs)
    assert (first, second) == (9, 2) and p == pytest.approx(binomtest(2, 11).pvalue)
    for n in (1, 2, 9, 40, 500):
        for wins in {0, 1, n // 3, n // 2, n}:
            split = [(True, False)] * wins + [(False, True)] * (n - wins)
            assert mcnemar(split)[2] == pytest.approx(binomtest(wins, n).pvalue, rel=1e-9)
    assert mcnemar(pairs[11:]) == (0, 0, 1.0)  # SciPy refuses n = 0
    assert mcnemar([(True, False), (False, True)])[2] == 1.0
    assert mcnemar([(True, False)] * 1100)[2] == 0.0  # no overflow


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
