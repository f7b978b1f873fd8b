# SPDX-License-Identifier: Apache-2.0
"""Chances of a verdict with more images, against the formulas written out here."""

from __future__ import annotations

from math import asin, ceil, sqrt
from typing import Any

import pytest
from normal_spread import Normal
from scipy.optimize import brentq
from scipy.stats import beta, norm, t

from adaptclip.gates.sample_size import Claim, More, more_images, smallest_factor
from adaptclip.metrics.intervals import PairedSpread, RateSpread, ScaledSpread, ScoreSpread, exact_bound, tango_bound

Z = float(norm.isf(0.05))


def critical(n, limit, alpha, side) -> Any:
    """The rate of n images whose Clopper-Pearson bound is the limit."""
    if side == "low":
        return brentq(lambda p: beta.ppf(alpha, p * n, n - p * n + 1) - limit, limit, 1 - 1e-9)
    return brentq(lambda p: beta.isf(alpha, p * n + 1, n - p * n) - limit, 1e-9, limit)


def rate(value, n, limit, upwards=True, **more):
    return Claim(value, RateSpread(value, n, n), limit, upwards, 0.05, **more)


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize(("value", "limit", "n"), [(0.9, 0.8, 50), (0.7, 0.6, 120)])
def test_power_of_a_rate_is_that_of_the_arcsine_transform(value, limit, n, factor):
    ahead = asin(sqrt(value)) - asin(sqrt(critical(factor * n, limit, 0.05, "low")))
    expected = norm.cdf(2 * sqrt(factor * n) * ahead)
    assert rate(value, n, limit).power(factor) == pytest.approx(expected, abs=1e-3)
    assert rate(1 - value, n, 1 - limit, upwards=False).power(factor) == pytest.approx(expected, abs=1e-3)
    scaled = Claim(2 * value - 1, ScaledSpread(RateSpread(value, n, n), -1.0, 1.0), 2 * limit - 1, True, 0.05)
    assert scaled.power(factor) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", [1, 6])
def test_the_present_images_are_part_of_what_decides(family):
    """What is still to come has 1 - 1/factor of the present variance; failing is corrected for its family."""
    value, n, limit, factor = 0.82, 200, 0.8, 3.0
    left = 0.5 / sqrt(n) * sqrt(1 - 1 / factor)
    up = (asin(sqrt(value)) - asin(sqrt(critical(factor * n, limit, 0.05, "low")))) / left
    down = (asin(sqrt(critical(factor * n, limit, 0.05 / family, "high"))) - asin(sqrt(value))) / left
    expected = norm.cdf(up) + norm.cdf(down)
    assert rate(value, n, limit, family=family).decided(factor) == pytest.approx(expected, abs=1e-3)
    turned = rate(1 - value, n, 1 - limit, upwards=False, family=family)
    assert turned.decided(factor) == pytest.approx(expected, abs=1e-3)


def test_the_cap_limits_what_a_rate_is_worth():
    capped = Claim(0.9, RateSpread(0.9, 500, 100), 0.8, upwards=True, alpha=0.05)
    assert capped.power() == pytest.approx(rate(0.9, 100, 0.8).power(), abs=1e-3)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_power_of_a_score_has_the_root_of_the_images_and_students_t(factor):
    claim = Claim(0.01, ScoreSpread(0.01, 0.02, 1e9, 12, (-1, 1)), -0.04, upwards=True, alpha=0.05)
    ahead = 0.05 - t.isf(0.05, 12) * 0.02 / sqrt(factor)
    expected = norm.cdf(ahead / (t.isf(0.05, 12) * 0.02 / Z / sqrt(factor)))
    assert claim.power(factor) == pytest.approx(expected, abs=1e-6)
    turned = Claim(-0.01, ScoreSpread(-0.01, 0.02, 1e9, 12, (-1, 1)), 0.04, upwards=False, alpha=0.05)
    assert turned.power(factor) == pytest.approx(expected, abs=1e-6)


def test_power_of_a_paired_change_has_the_bound_of_so_many_pairs():
    claim = Claim(0.0, PairedSpread(0.05, 0.05, 100, 80, 20), -0.06, upwards=True, alpha=0.05)
    n = float(4 * 80 * (Z / t.isf(0.05, 4 * 20)) ** 2)
    half = max(-tango_bound(0.05, 0.05, n, "low", 0.05), Z * sqrt(0.1 / n))
    present = float(80 * (Z / t.isf(0.05, 20)) ** 2)
    error = -tango_bound(0.05, 0.05, present, "low", 0.05) / Z
    assert claim.power(4) == pytest.approx(norm.cdf((0.06 - half) / (error / 2)), abs=1e-6)


def test_other_uncertainties_are_taken_at_the_bound_that_holds_for_certain():
    claim = Claim(0.5, Normal(0.5, 0.04), 0.3, upwards=True, alpha=0.05)
    assert claim.power(4) == pytest.approx(norm.cdf((0.2 - 2 * Z * 0.02) / 0.02))
    assert claim.decided(4) == pytest.approx(norm.cdf((0.2 - 2 * Z * 0.02) / (0.04 * sqrt(0.75))), abs=1e-9)


def test_a_limit_that_only_the_best_rate_keeps():
    """Twenty right answers of twenty just show 0.861: a chance of one half if the truth is 1, and none below it."""
    least = exact_bound(1.0, 20, "low", 0.05)
    assert rate(1.0, 20, least).power() == pytest.approx(0.5)
    assert rate(0.9, 20, least).power() < 0.01
    assert rate(1.0, 20, least + 1e-9).power() == 0
    most = exact_bound(0.0, 20, "high", 0.05)
    assert rate(0.0, 20, most, upwards=False).power() == pytest.approx(0.5)
    assert rate(0.1, 20, most, upwards=False).power() < 0.01
    assert rate(0.0, 20, most - 1e-9, upwards=False).power() == 0


def test_where_nothing_is_still_to_come_the_verdict_stands():
    assert rate(0.95, 200, 0.8).decided(1.0) == 1
    assert rate(0.6, 200, 0.8).decided(1.0) == 1
    assert rate(0.82, 200, 0.8).decided(1.0) == 0
    at_limit = ScoreSpread(0.0, 0.02, 1e9, 1e9, (-1, 1))
    assert Claim(0.0, at_limit, at_limit.bound("low", 0.05), upwards=True, alpha=0.05).decided(1.0) == 1


def test_what_no_rate_reaches_has_no_chance():
    assert rate(1.0, 20, 0.99).power() == 0
    assert rate(0.0, 20, 0.01, upwards=False).power() == 0
    assert rate(0.0, 3, 0.0).power() == pytest.approx(0.5), "a limit of 0 is kept by a rate of 0"
    assert rate(1.0, 3, 1.0, upwards=False).power() == pytest.approx(0.5)


def test_the_smallest_factor_is_found_to_a_hundredth():
    def chance(factor):
        return min(factor / 5, 1.0)

    found = smallest_factor(chance, 0.8)
    assert found is not None
    assert chance(found) >= 0.8 > chance(found / 1.01)
    assert smallest_factor(chance, 0.2) == 1.0
    assert smallest_factor(lambda factor: factor >= 1.3, 0.5) == pytest.approx(1.3, rel=0.01)
    assert smallest_factor(chance, 1.0, most=5.0) == pytest.approx(5.0, rel=0.01)
    assert smallest_factor(chance, 0.81, most=4.0) is None
    assert smallest_factor(lambda factor: factor >= 10, 0.5) == 10.0


def test_further_images_are_those_of_an_even_chance_and_of_four_in_five():
    claim = rate(0.84, 200, 0.8)
    more = more_images(claim, 200, 200)
    factors = [smallest_factor(claim.decided, asked) or 0 for asked in (0.5, 0.8)]
    assert more == More(ceil(200 * (factors[0] - 1)), ceil(200 * (factors[1] - 1)), None)
    assert more is not None
    assert more.clusters is None
    assert more_images(claim, 200, 200, missing=100_000) == More(100_000, 100_000)
    assert more_images(rate(0.95, 200, 0.8), 200, 200) == More(1, 1)
    assert more_images(rate(0.8, 200, 0.8, family=50), 200, 200) == More(None, None)


def test_clusters_are_of_the_present_size():
    more = more_images(rate(0.83, 200, 0.8), 200, 80)
    assert more is not None
    assert more.images is not None
    assert (more.per_cluster, more.clusters) == (2.5, ceil(more.images / 2.5))
    assert more_images(None, 200, 80, 7) == More(7, 7, 2.5)
    assert more_images(None, 200, 80) is None
    assert more_images(None, 5, 0, 7) == More(7, 7, None)
    assert More(None, None, 2.5).clusters is None
    assert More(9, 9).clusters_for(9) == 9
