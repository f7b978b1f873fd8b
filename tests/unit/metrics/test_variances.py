# SPDX-License-Identifier: Apache-2.0
"""Variances, degrees of freedom and effective numbers against leaving out, textbook formulas and hand calculation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import (
    MIN_CLUSTERS,
    Estimate,
    changed,
    linearised,
    mean,
    mean_of,
    measured,
    share,
    variance,
)
from adaptclip.metrics.intervals import PairedSpread, RateSpread, ScaledSpread, ScoreSpread, wilson
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.rates import mean_of_classes

approx: Any = pytest.approx


def answers(labels, right, sampling=None, classes=None):
    """Images of which some are right; a wrong answer is the next class."""
    labels, right = np.asarray(labels), np.asarray(right, bool)
    classes = classes or int(labels.max()) + 1
    probs = np.full((len(labels), classes), 0.1 / max(classes - 1, 1), np.float32)
    probs[np.arange(len(labels)), np.where(right, labels, (labels + 1) % classes)] = 0.9
    return Judged(labels, probs, sampling or Sampling.of(len(labels)))


def test_variance_of_a_mean_of_independent_images_is_the_textbooks():
    values = np.random.default_rng(0).random(17)
    found = variance(mean(values), Sampling.of(17), 1.0)
    assert found.value == approx(values.var(ddof=1) / 17)
    assert (found.df, found.trials, found.units) == approx((16, 17, 17))


def left_out(values, unit):
    """The jackknife's variance of a mean: each unit left out in turn."""
    units = unit.max() + 1
    without = np.array([values[unit != u].mean() for u in range(units)])
    return (units - 1) / units * ((without - without.mean()) ** 2).sum()


def doubted(plain, by_unit, most, units):
    """The variance mixed with that of images all alike, by 1.5 against the squared number of units it rests on."""
    rests_on = (by_unit**2).sum() ** 2 / (by_unit**4).sum()
    unknown = 1.5 / (rests_on**2 + 1.5)
    return (1 - unknown) * plain + unknown * max(plain, most / units)


@pytest.mark.parametrize("most", [0.2, 1e-6])
def test_variance_of_clusters_is_that_of_leaving_each_out_mixed_with_doubt(most):
    rng = np.random.default_rng(1)
    unit = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 14])
    values = rng.random(50)
    without = np.array([values[unit != u].mean() for u in range(9)])
    by_unit = (without - without.mean()) * np.sqrt(8 / 9)
    sizes = np.bincount(unit)
    units = 50**2 / (sizes**2).sum()
    found = variance(mean(values), Sampling.of(50, unit), most)
    assert found.value == approx(doubted(left_out(values, unit), by_unit, most, units))
    assert (found.df, found.trials, found.units) == approx((units - 1, 50, units))


def test_a_unit_of_more_than_half_the_images_counts_at_most_double():
    unit = np.repeat(np.arange(8), [50, 1, 1, 1, 1, 1, 1, 1])
    values = np.linspace(0, 1, 57)
    by_unit = np.bincount(unit, values - values.mean()) / 57
    by_unit /= np.where(np.bincount(unit) > 28, 0.5, 1 - 1 / 57)
    by_unit = (by_unit - by_unit.mean()) * np.sqrt(7 / 8)
    found = variance(mean(values), Sampling.of(57, unit), 1e-9)
    assert found.value == approx(doubted((by_unit**2).sum(), by_unit, 0, 1))
    assert found.df == 0.5, "as good as one unit has the fewest degrees of freedom that there are"


def test_where_nothing_varies_there_is_no_doubt_to_mix_in():
    unit = np.repeat(np.arange(10), 3)
    assert variance(share(np.ones(30, bool)), Sampling.of(30, unit), 0.25).value == 0


@pytest.mark.parametrize("fixed", [False, True])
def test_variance_of_a_mean_of_classes_is_that_of_the_classes_means(fixed):
    """At least ten images of each class: the stratified formula, and Satterthwaite's degrees of freedom."""
    rng = np.random.default_rng(2)
    sizes = np.array([10, 25, 40])
    labels = np.repeat([0, 1, 2], sizes)
    judged = answers(labels, rng.random(75) < np.array([0.5, 0.7, 0.9])[labels])
    sampling = Sampling.of(75, None, labels if fixed else None)
    found = variance(mean_of_classes(judged), sampling, 1.0)
    expected = sum(judged.right[labels == c].var(ddof=1) / sizes[c] for c in range(3)) / 9
    assert found.value == approx(expected)
    assert found.df == approx((1 / sizes).sum() ** 2 / (1 / sizes**2 / (sizes - 1)).sum())
    assert found.trials == approx(9 / (1 / sizes).sum())


def test_a_fixed_mix_takes_the_differences_between_classes_out_of_the_accuracy():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [30, 70])
    hits = rng.random(100) < np.where(labels == 0, 0.95, 0.4)
    within = sum((labels == c).mean() ** 2 * hits[labels == c].var(ddof=1) / (labels == c).sum() for c in (0, 1))
    assert variance(share(hits), Sampling.of(100, None, labels), 0.25).value == approx(within)
    random_mix = variance(share(hits), Sampling.of(100), 0.25).value
    assert random_mix == approx(hits.var(ddof=1) / 100)
    assert random_mix > 1.2 * within


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("images", "right"), [(5, 5), (9, 9), (9, 0), (10, 10), (3, 2)])
def test_a_class_of_a_handful_varies_no_less_than_laplace_says(images, right, fixed):
    labels = np.repeat([0, 1], [images, 40])
    hits = np.concatenate([np.arange(images) < right, np.arange(40) < 30])
    sampling = Sampling.of(len(labels), None, labels if fixed else None)
    found = variance(mean_of_classes(answers(labels, hits)), sampling, 0.25).value
    rate = (right + 1) / (images + 2)
    own = hits[:images].var(ddof=1) / images
    small = max(own, rate * (1 - rate) / images) if images < 10 else own
    assert found == approx((small + hits[images:].var(ddof=1) / 40) / 4)


def test_where_the_number_is_no_rate_a_handful_varies_as_an_image_at_its_value():
    labels = np.repeat([0, 1], [4, 40])
    values = np.concatenate([np.full(4, 0.5), np.random.default_rng(4).random(40)])
    weights = np.where(labels == 0, 1 / 8, 1 / 80)
    means = np.array([values[labels == c].mean() for c in (0, 1)])
    estimate = Estimate(float(means.mean()), weights * (values - means[labels]), weights, labels)
    found = variance(estimate, Sampling.of(44), 0.21).value
    assert found == approx((0.21 / 4 + values[4:].var(ddof=1) / 40) / 4)


def test_a_class_of_few_patients_counts_its_patients_and_not_its_images():
    """12 images of 3 patients: the class's mean rests on 3 units, and hides a third of how they vary."""
    labels = np.repeat([0, 1], [12, 60])
    unit = np.concatenate([np.repeat([0, 1, 2], 4), 3 + np.arange(60)])
    hits = np.concatenate([np.repeat([True, False, True], 4), np.arange(60) < 40])
    found = variance(mean_of_classes(answers(labels, hits)), Sampling.of(72, unit), 0.25)
    by_unit = np.bincount(unit, hits - np.where(labels == 0, 2 / 3, 2 / 3)) / np.where(np.arange(63) < 3, 24, 120)
    by_unit *= np.sqrt(np.where(np.arange(63) < 3, 3 / 2, 60 / 59))
    own = (by_unit[:3] ** 2).sum()
    usual = 9 / 14 * 5 / 14 / 3 / 4
    plain = (by_unit**2).sum() + max(usual - own, 0)
    units = 1 / (3 * (1 / 6) ** 2 + 60 * (1 / 120) ** 2)
    assert found.units == approx(units)
    assert found.value == approx(doubted(plain, by_unit, 0.25, units))


def test_the_least_variance_of_an_estimate_is_kept():
    values = np.linspace(0.4, 0.6, 20)
    plain = mean(values)
    floored = Estimate(plain.value, plain.influence, least=0.04)
    assert variance(floored, Sampling.of(20), 1.0).value == 0.04
    assert variance(plain, Sampling.of(20), 1.0).value < 0.04


def test_a_share_of_independent_images_has_wilsons_own_interval_and_no_degrees_of_freedom():
    hits = np.arange(50) < 40
    assert measured(share(hits), Sampling.of(50)).spread == RateSpread(0.8, 50.0, 50.0)
    fixed = measured(share(hits), Sampling.of(50, None, np.arange(50) % 2)).spread
    assert isinstance(fixed, RateSpread)
    assert fixed.df is not None


def test_an_effective_number_is_the_variance_of_one_image_by_that_of_the_mean():
    rng = np.random.default_rng(5)
    unit, hits = np.repeat(np.arange(20), 5), rng.random(100) < 0.7
    hits = np.where(np.repeat(rng.random(20) < 0.5, 5), hits[unit * 5], hits)
    sampling, rate = Sampling.of(100, unit), hits.mean()
    found = variance(share(hits), sampling, rate * (1 - rate))
    spread = measured(share(hits), sampling).spread
    size = rate * (1 - rate) / found.value
    assert size < 100
    assert spread == RateSpread(rate, approx(size), approx(100), found.df)


def test_patients_that_differ_less_than_chance_are_worth_no_more_than_their_images():
    unit, hits = np.repeat(np.arange(20), 2), np.tile([True, False], 20)
    hits[1:8:2], hits[8:16:2] = True, False
    spread = measured(share(hits), Sampling.of(40, unit)).spread
    assert isinstance(spread, RateSpread)
    assert spread.size == spread.cap == approx(40)


def test_means_on_a_scale_have_effective_numbers_on_it():
    values = np.random.default_rng(6).uniform(1, 3, 30)
    spread = mean_of(values, low=1.0, high=3.0).spread
    assert isinstance(spread, ScaledSpread)
    assert (spread.low, spread.high) == (1.0, 3.0)
    inner = spread.spread
    assert isinstance(inner, RateSpread)
    rate = (values.mean() - 1) / 2
    assert inner.rate == approx(rate)
    assert inner.size == approx(rate * (1 - rate) / (values.var(ddof=1) / 30 / 4))
    assert inner.cap == np.inf
    assert inner.df == approx(29)
    assert isinstance(mean_of(values - 1, low=0.0, high=2.0).spread, ScaledSpread)
    assert isinstance(mean_of(values / 3).spread, RateSpread)


def test_numbers_that_do_not_vary_count_each_unit_once():
    unit = np.repeat(np.arange(12), 3)
    assert mean_of(np.full(36, 0.25), unit).spread == RateSpread(0.25, approx(12), approx(12))
    labels = np.repeat([0, 1], [4, 20])
    perfect = measured(mean_of_classes(answers(labels, np.ones(24))), Sampling.of(24)).spread
    units = 1 / (1 / 16 + 1 / 80)
    assert isinstance(perfect, RateSpread)
    assert (perfect.rate, perfect.size, perfect.cap) == approx((1.0, units, units))
    assert perfect.df is not None


@pytest.mark.parametrize("units", [MIN_CLUSTERS - 1, MIN_CLUSTERS])
def test_eight_clusters_are_the_fewest(units):
    values, unit = np.linspace(0, 1, 40), np.arange(40) % units
    for found in (mean_of(values, unit), changed(mean(values), mean(values / 2), Sampling.of(40, unit))):
        assert (found.spread is None) == (units == 7)
        assert found.note == ("no interval: 7 clusters, and at least 8 are needed" if units == 7 else "")
    alone = changed(mean(np.array([0.5])), mean(np.array([0.25])), Sampling.of(1))
    assert (alone.value, alone.spread, alone.note) == (0.25, None, "no interval: a single image says nothing of others")
    assert mean_of(np.array([True, False])).spread == RateSpread(0.5, 2.0, 2.0)


def test_a_number_off_its_scale_is_refused_and_rounding_is_none():
    for value, low, high in ((-0.1, 0, 1), (1.1, 0, 1), (0.5, 1, 1), (0.5, 1, 0)):
        with pytest.raises(DataError, match="a number on the scale"):
            linearised(value, np.array([0.1, -0.1]), low=low, high=high)
    for value in (1 + 1e-12, -1e-12, 0.0, 1.0):
        bounds = linearised(value, np.array([0.1, -0.1])).interval(0.9)
        assert bounds is not None
        assert 0 <= bounds[0] <= bounds[1] <= 1


def test_doubt_about_clusters_is_on_the_scale_of_the_number():
    """A number on 0 to 2 has twice the error of the same number on 0 to 1."""
    unit, values = np.repeat(np.arange(10), 3), np.random.default_rng(11).random(30)
    plain, doubled = mean_of(values, unit).interval(0.9), mean_of(2 * values, unit, high=2.0).interval(0.9)
    assert doubled == approx(2 * np.array(plain))


def test_means_of_single_precision_are_of_double(recwarn):
    values = np.random.default_rng(12).random(100_001).astype(np.float32)
    assert mean(values).value == approx(values.astype(np.float64).mean(), abs=1e-13)
    labels = np.repeat([0, 2], 20)
    assert variance(share(np.arange(40) % 3 > 0), Sampling.of(40, None, labels), 0.2).value > 0
    assert not recwarn.list


def test_notes_and_numbers_of_images_go_with_the_number():
    estimate = Estimate(0.5, np.array([0.1, -0.1, 0.2, -0.2]), n=3, note="own")
    found = measured(estimate, Sampling.of(4), note="given")
    assert (found.n, found.note) == (3, "own; given")
    paired = changed(estimate, Estimate(0.4, np.zeros(4), n=9), Sampling.of(4), note="given")
    assert (paired.n, paired.note, paired.value) == (3, "own; given", approx(0.1))
    plain = Estimate(0.5, np.array([0.1, -0.1]))
    assert measured(plain, Sampling.of(2)).n == changed(plain, plain, Sampling.of(2)).n == 2
    assert mean_of(np.zeros(0)).note == "no images"
    assert linearised(0.5, np.array([0.3, 0.1]), n=7, note="x").n == 7
    assert linearised(0.5, np.array([0.3, 0.1]), note="x").note == "x"


def test_influences_are_centred():
    influence = np.random.default_rng(7).normal(0, 0.01, 30)
    centred, moved = (linearised(0.5, part).interval(0.95) for part in (influence, influence + 0.3))
    assert centred == approx(moved)


def test_a_change_of_a_share_counts_gains_and_losses_of_independent_images():
    now, before = np.arange(60) < 45, (np.arange(60) >= 10) & (np.arange(60) < 40)
    found = changed(share(now), share(before), Sampling.of(60))
    assert found.value == approx(0.25)
    assert found.spread == PairedSpread(approx(15 / 60), approx(0.0), 60.0, 60.0)


def test_a_change_of_a_share_of_clusters_has_an_effective_number():
    rng = np.random.default_rng(8)
    unit = np.repeat(np.arange(15), 4)
    now, before = rng.random(60) < 0.8, (rng.random(15) < 0.5)[unit]
    sampling = Sampling.of(60, unit)
    difference = now.astype(float) - before
    one = difference.var()
    found = variance(Estimate(difference.mean(), (difference - difference.mean()) / 60), sampling, one)
    spread = changed(share(now), share(before), sampling).spread
    assert isinstance(spread, PairedSpread)
    assert (spread.gained, spread.lost) == approx(((now & ~before).mean(), (before & ~now).mean()))
    assert (spread.size, spread.cap, spread.df) == approx((one / found.value, 60, found.df))
    fixed = Sampling.of(60, None, np.arange(60) % 2)
    of_fixed = changed(share(now), share(before), fixed).spread
    assert isinstance(of_fixed, PairedSpread)
    assert of_fixed.cap == np.inf
    assert of_fixed.df is not None


def test_a_change_of_a_mean_of_classes_weighs_gains_by_class():
    labels = np.repeat([0, 1], [10, 40])
    now, before = np.arange(50) % 10 < 9, np.arange(50) % 5 < 3
    after_, before_ = (mean_of_classes(answers(labels, hits)) for hits in (now, before))
    spread = changed(after_, before_, Sampling.of(50)).spread
    weights = np.where(labels == 0, 1 / 20, 1 / 80)
    assert isinstance(spread, PairedSpread)
    assert spread.gained == approx(weights[now & ~before].sum())
    assert spread.lost == approx(weights[before & ~now].sum())
    difference = now.astype(float) - before
    within = sum(difference[labels == c].var(ddof=1) / (labels == c).sum() for c in (0, 1)) / 4
    one = spread.gained + spread.lost - (spread.gained - spread.lost) ** 2
    assert (spread.size, spread.cap) == (approx(one / within), np.inf)


def test_no_change_at_all_leaves_the_units_to_say_how_sure_that_is():
    hits, unit = np.arange(48) % 3 > 0, np.repeat(np.arange(12), 4)
    same = changed(share(hits), share(hits), Sampling.of(48, unit)).spread
    assert same == PairedSpread(0.0, 0.0, approx(12), approx(12))
    labels = np.repeat([0, 1], [8, 40])
    of_classes = mean_of_classes(answers(labels, hits))
    still = changed(of_classes, of_classes, Sampling.of(48)).spread
    assert isinstance(still, PairedSpread)
    assert still.size == approx(1 / (1 / 32 + 1 / 160))
    assert still.df is not None


def test_a_change_of_a_mean_is_the_paired_t_interval():
    rng = np.random.default_rng(9)
    now, before = rng.random(25), rng.random(25)
    found = changed(mean(now), mean(before), Sampling.of(25), scale=(0.0, 2.0))
    error = (now - before).std(ddof=1) / 5
    assert found.spread == ScoreSpread(
        approx((now - before).mean()), approx(error), approx(25), approx(24), (-2.0, 2.0)
    )
    half = t.isf(0.025, 24) * error
    value = (now - before).mean()
    assert found.interval(0.95) == approx((value - half, value + half))


def test_no_change_of_a_mean_is_as_uncertain_as_tango_has_it():
    values = np.linspace(0, 1, 25)
    nothing = norm.isf(0.05) ** 2
    low, high = changed(mean(values), mean(values), Sampling.of(25)).interval(0.9) or (0, 0)
    assert (low, high) == approx((-nothing / (25 + nothing), nothing / (25 + nothing)))


def test_a_clustered_change_of_a_mean_is_doubted_on_the_width_of_its_scale():
    unit = np.repeat(np.arange(10), 3)
    now, before = np.random.default_rng(10).random((2, 30))
    difference = now - before
    without = np.array([difference[unit != u].mean() for u in range(10)])
    by_unit = (without - without.mean()) * np.sqrt(9 / 10)
    expected = doubted(left_out(difference, unit), by_unit, 9.0, 10)
    spread = changed(mean(now), mean(before), Sampling.of(30, unit), scale=(-1.0, 2.0)).spread
    assert isinstance(spread, ScoreSpread)
    assert spread.error == approx(np.sqrt(expected))


def test_two_sided_intervals_put_half_of_alpha_on_each_side():
    found = mean_of(np.arange(40) < 31)
    assert found.interval(0.9) == approx(wilson(31, 40, 0.9))
    assert found.bound("low", 0.05) == approx(wilson(31, 40, 0.9)[0])
