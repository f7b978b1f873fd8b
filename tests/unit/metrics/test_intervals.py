# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, norm, t

from adaptclip.errors import DataError
from adaptclip.metrics.intervals import (
    CalibrationParts,
    CalibrationSpread,
    PairedSpread,
    RateSpread,
    exact_bound,
    normal_quantile,
    student_quantile,
    tango_bound,
    wilson,
    wilson_bound,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_and_exact_agree_with_scipy(counts, confidence):
    correct, n = counts
    test = binomtest(correct, n)
    assert wilson(correct, n, confidence) == pytest.approx(
        tuple(test.proportion_ci(confidence, method="wilson")), abs=1e-9
    )
    alpha = (1 - confidence) / 2
    exact = exact_bound(correct / n, n, "low", alpha), exact_bound(correct / n, n, "high", alpha)
    assert exact == pytest.approx(tuple(test.proportion_ci(confidence, method="exact")), abs=1e-9)


def test_quantiles_are_scipys():
    for alpha in (0.4, 0.05, 0.025, 1e-9):
        assert normal_quantile(alpha) == pytest.approx(norm.isf(alpha), rel=1e-12)
        for df in (0.5, 1.0, 3.3, 1e6):
            assert student_quantile(alpha, df) == pytest.approx(t.isf(alpha, df), rel=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(DataError, match="0 <= correct <= n"):
        wilson(correct, n)


def test_all_right_is_not_certainty():
    low, high = wilson(1, 1)
    assert low == pytest.approx(0.2065, abs=1e-4)
    assert high == 1.0
    assert wilson(0, 5)[0] == 0.0


def test_an_exact_lower_bound_misses_at_most_as_often_as_stated():
    n = 100
    for truth in (0.05, 0.5, 0.95):
        missed = sum(binom.pmf(k, n, truth) for k in range(n + 1) if exact_bound(k / n, n, "low", 0.05) > truth)
        assert missed <= 0.05


def likelihood_score(b, c, n, delta):
    """Tango's score statistic with its constrained likelihood maximised numerically."""
    low, high = max(0.0, -delta), (1 - delta) / 2

    def loss(q):
        p12, rest = q + delta, 1 - 2 * q - delta
        terms = ((b, p12), (c, q), (n - b - c, rest))
        return -sum(count * np.log(max(p, 1e-300)) for count, p in terms if count)

    found: Any = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    q = found.x
    return (b - c - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize(("b", "c", "n"), [(9, 4, 60), (1, 7, 44), (20, 20, 100), (3, 0, 50)])
def test_tango_agrees_with_a_numerical_constrained_likelihood(b, c, n):
    z, change = norm.isf(0.025), (b - c) / n
    low = brentq(lambda d: likelihood_score(b, c, n, d) - z, -0.9, change - 1e-6)
    high = brentq(lambda d: likelihood_score(b, c, n, d) + z, change + 1e-6, 0.9)
    assert tango_bound(b / n, c / n, n, "low", 0.025) == pytest.approx(low, abs=1e-4)
    assert tango_bound(b / n, c / n, n, "high", 0.025) == pytest.approx(high, abs=1e-4)


def test_tango_without_any_changed_image_stays_honest():
    z2 = norm.isf(0.025) ** 2
    for n in (1, 10, 400):
        assert tango_bound(0, 0, n, "low", 0.025) == pytest.approx(-z2 / (n + z2), abs=1e-6)
        assert tango_bound(0, 0, n, "high", 0.025) == pytest.approx(z2 / (n + z2), abs=1e-6)


def test_tango_at_the_ends():
    assert tango_bound(0, 1, 5, "low", 0.05) == -1.0
    assert tango_bound(1, 0, 5, "high", 0.05) == 1.0
    assert tango_bound(1, 0, 5, "low", 0.05) < 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 0.4))
def test_tango_bounds_hold_the_estimate_and_are_antisymmetric(n, u, v, alpha):
    gained, lost = u, (1 - u) * v
    low, high = (tango_bound(gained, lost, n, side, alpha) for side in ("low", "high"))
    assert -1 <= low <= gained - lost <= high <= 1
    assert tango_bound(lost, gained, n, "low", alpha) == -high


def test_tango_of_nearly_nothing_but_losses():
    gained, lost = 5.960464477539063e-08, (1 - 5.960464477539063e-08) * 0.9999999999999999
    assert tango_bound(gained, lost, 1, "low", 0.25) == -1.0
    assert tango_bound(lost, gained, 1, "high", 0.25) == 1.0


def test_tango_misses_a_true_loss_about_as_often_as_stated():
    rng = np.random.default_rng(0)
    counts, repeats = np.unique(rng.multinomial(150, [0.05, 0.07, 0.88], 4000)[:, :2], axis=0, return_counts=True)
    missed = [tango_bound(b / 150, c / 150, 150, "low", 0.05) > -0.02 for b, c in counts]
    assert np.average(missed, weights=repeats) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_spreads_shrink_the_effective_number_for_few_degrees_of_freedom_and_never_exceed_the_cap():
    wide = RateSpread(0.8, size=50, cap=200, df=5)
    assert wide.bound("low", 0.05) < wilson_bound(0.8, 50, "low", 0.05)
    capped = RateSpread(0.8, size=5000, cap=200, df=190)
    # The cap counts images; few degrees of freedom shrink it like any effective number.
    shrunk = 200 * float(norm.isf(0.05) / t.isf(0.05, 190)) ** 2
    assert capped.bound("low", 0.05) == wilson_bound(0.8, shrunk, "low", 0.05)
    assert RateSpread(0.8, 200, 200).bound("low", 0.05, exact=True) == exact_bound(0.8, 200, "low", 0.05)
    paired = PairedSpread(0.1, 0.05, size=5000, cap=200, df=190)
    assert paired.bound("high", 0.05) == tango_bound(0.1, 0.05, shrunk, "high", 0.05)
    assert "linearisation" in paired.method
    assert PairedSpread(0.1, 0.05, 200, 200).method == "tango"


def test_calibration_bounds_allow_for_the_bias_of_absolute_values():
    rng = np.random.default_rng(0)
    observed = rng.normal(0, 0.01, 15)
    drawn = observed + rng.normal(0, 0.01, (2000, 15))
    noise_only = CalibrationSpread(CalibrationParts(observed, drawn))
    assert noise_only.bound("low", 0.05) < 0.02 < np.abs(observed).sum() < noise_only.bound("high", 0.05)
    # Far from zero there is no bias, and the interval is that of a sum.
    shifted = CalibrationSpread(CalibrationParts(observed + 0.05, drawn + 0.05))
    half = norm.isf(0.05) * 0.01 * np.sqrt(15)
    value = np.abs(observed + 0.05).sum()
    assert value - shifted.bound("low", 0.05) == pytest.approx(half, rel=0.15)
    assert shifted.bound("high", 0.05) == pytest.approx(min(1.0, value + half), rel=0.15)


def test_calibration_change_of_equal_models_holds_zero_and_uniform_units_widen():
    rng = np.random.default_rng(1)
    parts = CalibrationParts(np.full(15, 0.01), 0.01 + rng.normal(0, 0.002, (1000, 15)))
    same = CalibrationSpread(parts, parts)
    assert same.bound("low", 0.05) <= 0 <= same.bound("high", 0.05)
    still = CalibrationParts(np.full(15, 0.0), np.zeros((1000, 15)))
    assert CalibrationSpread(still, None, 20).bound("high", 0.05) == pytest.approx(1 - wilson_bound(1, 20, "low", 0.05))
