# SPDX-License-Identifier: Apache-2.0
"""Bounds of every kind of uncertainty, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from normal_spread import Normal
from scipy.stats import norm, t

from adaptclip.metrics.intervals import (
    CalibrationParts,
    CalibrationSpread,
    DifferenceSpread,
    PairedSpread,
    RateSpread,
    ScaledSpread,
    ScoreSpread,
    exact_bound,
    tango_bound,
    wilson,
    wilson_bound,
)
from adaptclip.metrics.worst_decile import ApartSpread, WorstSpread

Z = float(norm.isf(0.05))
ENDS: Any = [("low", -1), ("high", 1)]
both_ends = pytest.mark.parametrize(("side", "sign"), ENDS)


def test_rates_at_the_ends_and_numbers_that_are_not_whole():
    assert wilson_bound(0.0, 7.5, "low", 0.05) == 0.0
    assert wilson_bound(1.0, 7.5, "high", 0.05) == 1.0
    assert exact_bound(0.0, 7.5, "low", 0.05) == 0.0
    assert exact_bound(1.0, 7.5, "high", 0.05) == 1.0
    assert exact_bound(1.0, 7.5, "low", 0.05) == pytest.approx(0.05 ** (1 / 7.5))
    assert exact_bound(0.0, 7.5, "high", 0.05) == pytest.approx(1 - 0.05 ** (1 / 7.5))
    assert wilson_bound(1.0, 7.5, "low", 0.05) == pytest.approx(7.5 / (7.5 + Z**2))
    assert wilson_bound(0.0, 7.5, "high", 0.05) == pytest.approx(Z**2 / (7.5 + Z**2))
    assert wilson(1, 1, 0.9)[1] == 1.0
    assert wilson(0, 3)[0] == 0.0


@both_ends
def test_tango_of_one_image_and_beyond_the_scale(side, sign):
    assert tango_bound(0.5, 0.5, 1e9, side, 0.05) == pytest.approx(sign * Z / np.sqrt(1e9), abs=1e-6)
    assert tango_bound(0.6, 0.1, 1e20, side, 0.05) == pytest.approx(0.5)
    assert -1 <= tango_bound(0.5, 0.5, 0.01, side, 0.05) <= 1
    assert tango_bound(0.3, 0.1, 100, side, 0.05) == -tango_bound(0.1, 0.3, 100, ("low", "high")[side == "low"], 0.05)


@both_ends
def test_few_degrees_of_freedom_shrink_effective_numbers_by_korn_and_graubard(side, sign):
    factor = float((Z / t.isf(0.05, 6)) ** 2)
    assert RateSpread(0.7, 40, 100, 6).bound(side, 0.05) == pytest.approx(wilson_bound(0.7, 40 * factor, side, 0.05))
    assert RateSpread(0.7, 40, 30, 6).bound(side, 0.05, exact=True) == pytest.approx(
        exact_bound(0.7, 30 * factor, side, 0.05)
    )
    assert RateSpread(0.7, 40, 100).bound(side, 0.05) == wilson_bound(0.7, 40, side, 0.05)
    assert PairedSpread(0.2, 0.1, 40, 100, 6).bound(side, 0.05) == pytest.approx(
        tango_bound(0.2, 0.1, 40 * factor, side, 0.05)
    )
    assert RateSpread(0.7, 9, 9, 6).method == "wilson, effective n by linearisation"
    assert RateSpread(0.7, 9, 9).method == "wilson"
    assert PairedSpread(0.2, 0.1, 9, 9, 6).method == "tango, effective n by linearisation"


@both_ends
def test_exact_bounds_of_changes_are_no_nearer_than_the_normal_ones(side, sign):
    for gained, lost, n in ((0.2, 0.1, 60), (0.02, 0.0, 200), (0.5, 0.1, 20), (0.1, 0.5, 20), (0.0, 0.0, 30)):
        change = gained - lost
        half = Z * np.sqrt((gained + lost - change**2) / n)
        score = tango_bound(gained, lost, n, side, 0.05)
        expected = min(score, change - half) if side == "low" else max(score, change + half)
        found = PairedSpread(gained, lost, n, n)
        assert found.bound(side, 0.05, exact=True) == pytest.approx(np.clip(expected, -1, 1))
        assert found.bound(side, 0.05) == score
    skewed = PairedSpread(0.5, 0.1, 20, 20)
    assert skewed.bound("high", 0.05, exact=True) > skewed.bound("high", 0.05)
    certain = PairedSpread(0.5, 0.5, 0.5, 0.5)
    assert [certain.bound(end, 0.05, exact=True) for end, _ in ENDS] == [-1, 1]


@both_ends
def test_scores_have_students_t_within_their_limits(side, sign):
    spread = ScoreSpread(0.2, 0.05, 1e9, 7, (-1, 1))
    assert spread.bound(side, 0.05) == pytest.approx(0.2 + sign * t.isf(0.05, 7) * 0.05)
    assert spread.bound(side, 0.05, exact=True) == spread.bound(side, 0.05)
    assert ScoreSpread(0.2, 9.0, 1e9, 7, (-1, 2)).bound(side, 0.05) == (2 if side == "high" else -1)
    still = ScoreSpread(0.2, 0.0, 40, 7, (-1, 1))
    assert still.bound(side, 0.05) == pytest.approx(0.2 + sign * Z**2 / (40 + Z**2))
    assert still.method == "t on the linearised variance"


@both_ends
@pytest.mark.parametrize("exact", [False, True])
def test_numbers_on_a_scale_and_differences(side, sign, exact):
    half = Z * 0.1 * (2 if exact else 1)
    scaled = ScaledSpread(Normal(0.25, 0.1), -1.0, 3.0)
    assert scaled.bound(side, 0.05, exact=exact) == pytest.approx(0.0 + sign * 4 * half)
    assert scaled.method == "normal"
    difference = DifferenceSpread((0.7, Normal(0.7, 0.1)), (0.4, Normal(0.4, 0.05)))
    assert difference.bound(side, 0.05, exact=exact) == pytest.approx(0.3 + sign * np.hypot(half, half / 2))
    assert difference.method == "newcombe, square-and-add"
    apart = ApartSpread(Normal(0.7, 0.1), Normal(0.4, 0.05))
    z = norm.isf(0.025) * (2 if exact else 1)
    assert apart.bound(side, 0.05, exact=exact) == pytest.approx(0.3 + sign * z * 0.15)
    assert apart.method == "from the bounds of both"


def skew():
    """The lower end of a skew difference takes the lower end of the first and the upper one of the second."""
    return DifferenceSpread((0.9, RateSpread(0.9, 20, 20)), (0.2, RateSpread(0.2, 30, 30)))


@both_ends
def test_skew_bounds_are_taken_from_the_ends_that_matter(side, sign):
    other: Any = "high" if side == "low" else "low"
    first, second = 0.9 - wilson_bound(0.9, 20, side, 0.05), 0.2 - wilson_bound(0.2, 30, other, 0.05)
    assert skew().bound(side, 0.05) == pytest.approx(0.7 + sign * np.hypot(first, second))
    apart = ApartSpread(RateSpread(0.9, 20, 20), RateSpread(0.2, 30, 30))
    expected = wilson_bound(0.9, 20, side, 0.025) - wilson_bound(0.2, 30, other, 0.025)
    assert apart.bound(side, 0.05) == pytest.approx(expected)


def test_bounds_of_the_worst_tenth_hold_its_value():
    spread = WorstSpread(0.5, Normal(0.4, 0.1), Normal(0.55, 0.1))
    assert spread.bound("low", 0.05) == pytest.approx(0.4 - 0.1 * Z)
    assert spread.bound("high", 0.05) == pytest.approx(0.55 + 0.1 * Z)
    assert spread.bound("low", 0.05, exact=True) == pytest.approx(0.4 - 0.2 * Z)
    assert spread.bound("high", 0.05, exact=True) == pytest.approx(0.55 + 0.2 * Z)
    inside = WorstSpread(0.5, Normal(0.9, 0.1), Normal(0.1, 0.1))
    assert (inside.bound("low", 0.05), inside.bound("high", 0.05)) == (0.5, 0.5)
    assert "upper bound cross-fitted" in spread.method


OBSERVED = np.array([0.1, -0.2, 0.0, 0.01])
NOISE = np.random.default_rng(0).normal(0, 0.01, (201, 4))
PARTS = CalibrationParts(OBSERVED, OBSERVED + NOISE)


def biased(noise, observed):
    """By loops: parts within 2.5 standard errors of nothing are taken for nothing."""
    found = []
    for draw in noise:
        total = 0.0
        for k, part in enumerate(observed):
            truth = part if abs(part) > 2.5 * noise[:, k].std() else 0.0
            total += abs(truth + draw[k]) - abs(truth)
        found.append(total)
    return np.array(found)


def test_errors_of_a_calibration_error_with_and_without_bias():
    assert PARTS.errors(biased=True) == pytest.approx(biased(NOISE, OBSERVED))
    assert PARTS.errors(biased=False) == pytest.approx(NOISE @ [1, -1, 1, 1])
    assert PARTS.errors(biased=True).mean() > 0.01


def test_bounds_of_a_calibration_error():
    spread, value = CalibrationSpread(PARTS), 0.31
    assert spread.bound("low", 0.05) == pytest.approx(value - np.quantile(biased(NOISE, OBSERVED), 0.95))
    assert spread.bound("high", 0.05) == pytest.approx(value - np.quantile(NOISE @ [1, -1, 1, 1], 0.05))
    assert spread.bound("high", 0.05, exact=True) == spread.bound("high", 0.05)
    unseen = 1 - wilson_bound(1, 12, "low", 0.05)
    uniform = CalibrationSpread(PARTS, uniform_units=12)
    assert uniform.bound("high", 0.05) == pytest.approx(min(spread.bound("high", 0.05) + unseen, 1))
    assert uniform.bound("low", 0.05) == pytest.approx(max(spread.bound("low", 0.05) - unseen, 0))
    small = CalibrationParts(OBSERVED / 50, OBSERVED / 50 + NOISE)
    assert CalibrationSpread(small).bound("low", 0.05) == 0.0
    large = CalibrationParts(OBSERVED * 3.2, OBSERVED * 3.2 + NOISE)
    assert CalibrationSpread(large).bound("high", 0.05) == 1.0
    assert spread.method == "thresholded bootstrap"


def test_bounds_of_a_changed_calibration_error():
    other = np.random.default_rng(1).normal(0, 0.02, (201, 4))
    before = CalibrationParts(np.array([0.3, 0.0, -0.2, 0.0]), np.array([0.3, 0.0, -0.2, 0.0]) + other)
    spread, change = CalibrationSpread(PARTS, before), 0.31 - 0.5
    low = biased(NOISE, OBSERVED) - other @ [1, 1, -1, 1]
    high = NOISE @ [1, -1, 1, 1] - biased(other, before.observed)
    assert spread.bound("low", 0.05) == pytest.approx(change - np.quantile(low, 0.95))
    assert spread.bound("high", 0.05) == pytest.approx(change - np.quantile(high, 0.05))
    far = CalibrationParts(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]) + 30 * other)
    assert CalibrationSpread(PARTS, far).bound("low", 0.05) == -1.0
