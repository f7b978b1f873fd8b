# SPDX-License-Identifier: Apache-2.0
"""Holm's correction, the exact sign test, differences and harmonic means against published and independent answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import holm
from adaptclip.reports.measuring import difference, harmonic, sign_test


def share(right, n):
    return mean_of(np.arange(n) < right)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_sign_test_is_mcnemars_exact():
    rng = np.random.default_rng(0)
    for _ in range(20):
        after, before = rng.random(50) < 0.6, rng.random(50) < 0.4
        up, down = int((after & ~before).sum()), int((before & ~after).sum())
        assert sign_test(after, before) == pytest.approx(binomtest(up, up + down).pvalue)
    same = np.ones(9, bool)
    assert sign_test(same, same) == 1


def test_clusters_count_once():
    after, before = np.ones(30, bool), np.zeros(30, bool)
    assert sign_test(after, before) == pytest.approx(2 * 0.5**30)
    assert sign_test(after, before, ["p", "q", "r"] * 10) == pytest.approx(2 * 0.5**3)


def test_difference_of_newcombes_example():
    """Newcombe (1998), table II, contrast (a), method 10: 56/70 - 48/80."""
    low, high = difference(share(56, 70), share(48, 80)).interval(0.95) or (1, 0)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_difference_of_extremes_stays_within_the_scale():
    low, high = difference(share(0, 20), share(20, 20)).interval(0.95) or (1, 0)
    assert -1 <= low < -0.7
    assert high > -1


def test_harmonic_mean_and_its_coverage():
    assert harmonic(share(8, 10), share(4, 10)).value == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert harmonic(share(0, 10), share(10, 10)).value == 0
    rng = np.random.default_rng(0)
    truth, missed = 2 * 0.8 * 0.5 / 1.3, 0
    for _ in range(500):
        low, high = harmonic(share(rng.binomial(150, 0.8), 150), share(rng.binomial(90, 0.5), 90)).interval(0.95) or (
            1,
            0,
        )
        missed += not low <= truth <= high
    assert 0.02 < missed / 500 < 0.09
