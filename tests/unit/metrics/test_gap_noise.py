# SPDX-License-Identifier: Apache-2.0
"""Gap tests against textbook distributions, and bounds of largest differences by hand."""

from __future__ import annotations

from typing import Any

import normal_spread
import numpy as np
import pytest
from scipy.stats import chi2_contingency, f_oneway, hypergeom, norm, t

from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.gaps import gap_test, holm, largest_difference, pair_bounds
from adaptclip.metrics.judged import Sampling


def number(value: float, error: float) -> Any:
    return normal_spread.number(value, error, 100)


def few_patients(alike_in=0):
    """Two groups: one of 8 patients of 10 images that are all alike, one of 4,000 independent images."""
    unit = np.concatenate([np.repeat(np.arange(8), 10), 8 + np.arange(4000)])
    code = np.where(np.arange(4080) < 80, alike_in, 1 - alike_in)
    values = np.concatenate([np.repeat([1, 1, 1, 1, 1, 1, 0, 0], 10), np.arange(4000) % 4 > 0]).astype(float)
    return values, code, Sampling.of(4080, unit)


@pytest.mark.parametrize("alike_in", [0, 1])
def test_a_group_of_eight_patients_has_students_t_with_seven_degrees_of_freedom(alike_in):
    """0.25 ± t(7) · its standard error: the normal distribution would have 17 % less."""
    values, code, sampling = few_patients(alike_in)
    found = gap_test(values, code, sampling, draws=20_000)
    by_patient = np.array([1, 1, 1, 1, 1, 1, 0, 0.0])
    # The variance of patients' means, mixed with that of images all alike (tests of variances), which is nearly it.
    error = by_patient.std(ddof=1) / np.sqrt(8)
    assert found.null_quantile == pytest.approx(t.isf(0.025, 7) * error, rel=0.04)
    assert "4,008 clusters, 20,000 draws" in found.method
    assert found.value == pytest.approx(0)
    assert found.p_value == 1


def test_groups_in_which_nothing_varies_have_the_noise_of_one_image_a_patient():
    """20 patients all right against 4,000 images at 0.75: the group's own images show no noise."""
    unit = np.concatenate([np.repeat(np.arange(20), 3), 20 + np.arange(4000)])
    values = np.concatenate([np.ones(60), np.arange(4000) % 4 > 0]).astype(float)
    code = np.repeat([0, 1], [60, 4000])
    found = gap_test(values, code, Sampling.of(4060, unit), draws=20_000)
    overall = values.mean()
    expected = t.isf(0.025, 19) * np.sqrt(overall * (1 - overall) / 20)
    assert found.null_quantile == pytest.approx(expected, rel=0.04)


def test_scores_of_clusters_have_their_own_variance():
    rng = np.random.default_rng(0)
    unit = np.concatenate([np.repeat(np.arange(8), 10), 8 + np.arange(4000)])
    level = rng.normal(5, 2, 8)
    values = np.concatenate([np.repeat(level, 10), rng.normal(5, 0.1, 4000)])
    values[80:84] = 1, 1, 0, 0  # some are whole, which makes them no yes or no
    found = gap_test(values, np.repeat([0, 1], [80, 4000]), Sampling.of(4080, unit), draws=20_000)
    assert found.null_quantile == pytest.approx(t.isf(0.025, 7) * level.std(ddof=1) / np.sqrt(8), rel=0.1)


def test_patients_in_every_group_make_the_groups_vary_together():
    """40 patients with an image in each of two groups: the noise is that of the patients' differences."""
    rng = np.random.default_rng(1)
    level = rng.normal(0, 1, 40)
    own = rng.normal(0, 0.2, (40, 2))
    values, code = (level[:, None] + own).ravel(), np.tile([0, 1], 40)
    found = gap_test(values, code, Sampling.of(80, np.repeat(np.arange(40), 2)), draws=20_000)
    paired = t.isf(0.025, 39) * (own[:, 1] - own[:, 0]).std(ddof=1) / np.sqrt(40)
    assert paired < found.null_quantile < 1.3 * paired
    apart = gap_test(values, code, draws=5000)
    assert apart.null_quantile > 4 * found.null_quantile


def test_independent_shares_have_the_p_value_of_the_exact_test():
    """Two groups: the largest gap is the difference, whose permutation test is Fisher's (two-sided, by size)."""
    right = np.concatenate([np.arange(60) < 50, np.arange(40) < 26])
    code = np.repeat([0, 1], [60, 40])
    found = gap_test(right, code, draws=40_000)
    k = np.arange(36, 61)
    gaps = np.abs(k / 60 - (76 - k) / 40)
    chances = hypergeom.pmf(k, 100, 76, 60)
    assert found.p_value == pytest.approx(chances[gaps >= found.value - 1e-9].sum(), abs=0.006)
    assert found.method == "permutation of 100 images, 40,000 draws"
    assert (found.best, found.worst, found.value) == (0, 1, pytest.approx(50 / 60 - 26 / 40))
    order = np.argsort(gaps)
    quantile = gaps[order][np.searchsorted(np.cumsum(chances[order]), 0.95)]
    assert found.null_quantile == pytest.approx(quantile, abs=0.03)
    assert found.null_quantile > gap_test(right, code, draws=40_000, confidence=0.5).null_quantile


def test_each_group_against_the_rest_has_a_p_value_of_its_own():
    rng = np.random.default_rng(2)
    code = np.repeat(np.arange(3), [100, 150, 50])
    right = rng.random(300) < np.array([0.8, 0.8, 0.6])[code]
    found = gap_test(right, code, draws=20_000)
    for g in range(3):
        assert found.rest[g] == pytest.approx(right[code == g].mean() - right[code != g].mean())
        hits, own = int((right & (code == g)).sum()), int((code == g).sum())
        assert found.below_p[g] == pytest.approx(hypergeom.cdf(hits, 300, right.sum(), own), abs=0.015)
        table = [[(right & (code == g)).sum(), (~right & (code == g)).sum()],
                 [(right & (code != g)).sum(), (~right & (code != g)).sum()]]  # fmt: skip
        assert found.rest_p[g] == pytest.approx(chi2_contingency(table)[1], abs=0.035)


def test_independent_scores_are_dealt_out():
    values = np.random.default_rng(3).normal(size=60) + np.repeat([0, 0.6], 30)
    code = np.repeat([0, 1], 30)
    found = gap_test(values, code, draws=5000)
    assert found.p_value == pytest.approx(f_oneway(values[:30], values[30:]).pvalue, abs=0.01)
    assert found.null_quantile == pytest.approx(1.98 * values.std() * np.sqrt(2 / 30), rel=0.08)
    assert gap_test(values, code, draws=1000, seed=1).null_quantile != gap_test(values, code, draws=1000).null_quantile


def test_no_draw_reaches_what_is_certain_and_the_smallest_p_value_is_one_in_draws_and_one():
    right, code = np.repeat([True, False], 100), np.repeat([0, 1], 100)
    found = gap_test(right, code, draws=999)
    assert found.p_value == 0.001
    assert found.rest_p == pytest.approx([0.001, 0.001])
    same = gap_test(np.ones(40), np.repeat([0, 1], 20), draws=999)
    assert (same.p_value, same.null_quantile) == (1.0, 0.0)
    assert same.rest_p == pytest.approx([1, 1])


def test_holm_never_leaves_one_and_never_falls():
    assert holm([0.6, 0.9, 0.01]).tolist() == pytest.approx([1.0, 1.0, 0.03])
    assert holm([0.01, 0.012]).tolist() == pytest.approx([0.02, 0.02])


ONES = [number(0.9, 0.01), number(0.8, 0.02), number(0.85, 0.03)]


@pytest.mark.parametrize(("side", "sign"), [("low", -1), ("high", 1)])
@pytest.mark.parametrize("exact", [False, True])
def test_bounds_of_pairs_are_squares_added(side, sign, exact):
    values, spreads = [m.value for m in ONES], [m.spread for m in ONES]
    found = pair_bounds(values, spreads, side, 0.025, exact=exact)
    for i, first in enumerate(ONES):
        for j, second in enumerate(ONES):
            half = norm.isf(0.025) * np.hypot(first.spread.error, second.spread.error) * (2 if exact else 1)
            expected = 0 if i == j else first.value - second.value + sign * half
            assert found[i, j] == pytest.approx(expected)


def test_the_largest_difference_has_a_corrected_lower_and_an_uncorrected_upper_end():
    """Two numbers in three groups: 12 ordered pairs share the chance that a lower bound is wrong."""
    others = [number(0.5, 0.01), number(0.5, 0.01), number(0.52, 0.01)]
    found = largest_difference([ONES, others])
    assert (found.value, found.n, found.note) == (pytest.approx(0.1), 600, "")
    pairs = [(a, b) for a in ONES for b in ONES if a is not b]
    ends: Any = (("low", norm.isf(0.025 / 12), -1), ("high", norm.isf(0.025), 1))
    for side, z, sign in ends:
        expected = max(a.value - b.value + sign * z * np.hypot(a.spread.error, b.spread.error) for a, b in pairs)
        assert found.bound(side, 0.025) == pytest.approx(max(expected, 0))
        exact = max(a.value - b.value + sign * 2 * z * np.hypot(a.spread.error, b.spread.error) for a, b in pairs)
        assert found.bound(side, 0.025, exact=True) == pytest.approx(max(exact, 0))
    assert largest_difference([[number(0.0, 0.4), number(0.9, 0.4)]]).bound("high", 0.01) == 1
    assert found.spread is not None
    assert found.spread.method == "simultaneous bounds of all pairs of groups"


def test_a_largest_difference_needs_a_value_in_each_of_two_groups_and_intervals():
    silent = Measurement(None, 0)
    assert largest_difference([[ONES[0]]]).note == "two groups with a value are needed"
    assert largest_difference([ONES, [ONES[0], ONES[1], silent]]).value is None
    blunt = largest_difference([ONES, [ONES[0], Measurement(0.2, 9), ONES[2]]])
    assert (blunt.value, blunt.spread, blunt.n) == (pytest.approx(0.7), None, 509)
    assert blunt.note == "no interval: a group of them has none"
    assert largest_difference([ONES[:2]]).value == pytest.approx(0.1)
