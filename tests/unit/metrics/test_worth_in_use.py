# SPDX-License-Identifier: Apache-2.0
"""Predictive values and net benefit: bounds by hand from those of two rates, and what they rest on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from normal_spread import Normal
from scipy.optimize import brentq
from scipy.stats import norm

from adaptclip.metrics import METRICS
from adaptclip.metrics.estimates import measured, share
from adaptclip.metrics.intervals import DifferenceSpread
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Support
from adaptclip.metrics.outcome_metrics import BenefitSpread, PredictiveSpread, TwoRates

Z = norm.isf(0.05)


def two(correlation=0.0):
    return TwoRates((0.8, Normal(0.8, 0.03)), (0.1, Normal(0.1, 0.02)), correlation)


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.5, 1.0])
@pytest.mark.parametrize("exact", [False, True])
def test_a_contrast_of_two_normal_rates_has_the_textbooks_variance(correlation, exact):
    error = np.sqrt((0.3 * 0.03) ** 2 + (0.7 * 0.02) ** 2 - 2 * correlation * 0.3 * 0.03 * 0.7 * 0.02)
    half = Z * error * (2 if exact else 1)
    rates = two(correlation)
    assert rates.bound(0.3, 0.7, "low", 0.05, exact=exact) == pytest.approx(0.3 * 0.8 - 0.7 * 0.1 - half)
    assert rates.bound(0.3, 0.7, "high", 0.05, exact=exact) == pytest.approx(0.3 * 0.8 - 0.7 * 0.1 + half)
    benefit = BenefitSpread(rates, 0.3, 0.7)
    assert benefit.bound("low", 0.05, exact=exact) == rates.bound(0.3, 0.7, "low", 0.05, exact=exact)
    assert benefit.bound("low", 0.05) == rates.bound(0.3, 0.7, "low", 0.05, exact=False)


@pytest.mark.parametrize(("side", "sign"), [("low", -1), ("high", 1)])
def test_a_predictive_value_is_bounded_where_its_contrast_is_nothing(side, sign):
    p = 0.2

    def contrast(v):
        error = np.hypot((1 - v) * p * 0.03, v * (1 - p) * 0.02)
        return (1 - v) * p * 0.8 - v * (1 - p) * 0.1 + sign * Z * error

    spread = PredictiveSpread(two(), p)
    assert spread.bound(side, 0.05) == pytest.approx(brentq(contrast, 0, 1))
    assert (spread.bound(side, 0.05, exact=True) - 2 / 3) * sign > (spread.bound(side, 0.05) - 2 / 3) * sign


def test_predictive_values_stay_within_nothing_and_one():
    nothing = TwoRates((0.0, Normal(0.0, 0.0)), (0.1, Normal(0.1, 0.02)))
    assert PredictiveSpread(nothing, 0.2).bound("low", 0.05) == 0.0
    unsure = TwoRates((0.1, Normal(0.1, 0.2)), (0.1, Normal(0.1, 0.02)))
    assert PredictiveSpread(unsure, 0.2).bound("low", 0.05) == 0.0
    assert PredictiveSpread(unsure, 0.2).method == "bayes, from the intervals of both rates"
    assert BenefitSpread(unsure, 0.2, 0.1).method == "linear, from the intervals of both rates"
    certain = TwoRates((0.8, Normal(0.8, 0.03)), (0.0, Normal(0.0, 0.0)))
    assert PredictiveSpread(certain, 0.2).bound("high", 0.05) == 1.0


def images(sampling=None, **fields):
    """20 of 25 positive and 10 of 100 negative images are called positive."""
    labels = np.repeat([1, 0], [25, 100])
    called = np.concatenate([np.arange(25) < 20, np.arange(100) < 10]).astype(int)
    probs = np.stack([1 - called * 0.8, called * 0.8], axis=1).astype(np.float32)
    return Judged(labels, probs, sampling or Sampling.of(125), decided=called, **fields)


def test_with_a_prevalence_the_bounds_are_those_of_both_rates():
    judged = images(prevalence=0.1, threshold=0.2)
    good = measured(share(np.arange(25) < 20), Sampling.of(25)).spread
    bad = measured(share(np.arange(100) < 10), Sampling.of(100)).spread
    assert good is not None
    assert bad is not None
    rates = TwoRates((0.8, good), (0.1, bad))
    assert METRICS["ppv"].compare(judged).model.spread == PredictiveSpread(rates, 0.1)
    assert METRICS["net_benefit"].compare(judged).model.spread == BenefitSpread(rates, 0.1, 0.9 * 0.2 / 0.8)
    spreads: Any = [
        measured(share(hits), Sampling.of(len(hits))).spread for hits in (np.arange(100) >= 10, np.arange(25) >= 20)
    ]
    of_negatives = TwoRates((0.9, spreads[0]), (0.2, spreads[1]))
    found = METRICS["npv"].compare(judged).model.spread
    assert isinstance(found, PredictiveSpread)
    assert found.frequency == 0.9
    assert found.rates.good[0] == pytest.approx(0.9)
    assert found.rates.bad[0] == pytest.approx(0.2)
    assert found.bound("low", 0.05) == pytest.approx(PredictiveSpread(of_negatives, 0.9).bound("low", 0.05))


def test_rates_of_the_same_patients_are_correlated_as_their_errors_are():
    unit = np.concatenate([np.arange(25) % 10, np.arange(100) % 10])
    judged = images(Sampling.of(125, unit), prevalence=0.1)
    found = METRICS["ppv"].compare(judged).model.spread
    called = judged.answer == 1
    sides = [np.bincount(unit[judged.labels == s], called[judged.labels == s] - called[judged.labels == s].mean(),
                         minlength=10) for s in (1, 0)]  # fmt: skip
    assert isinstance(found, PredictiveSpread)
    assert found.rates.correlation == pytest.approx(
        sides[0] @ sides[1] / np.sqrt((sides[0] ** 2).sum() * (sides[1] ** 2).sum())
    )
    perfect = replace(judged, decided=judged.labels)
    certain = METRICS["ppv"].compare(perfect).model.spread
    assert isinstance(certain, PredictiveSpread)
    assert certain.rates.correlation == 0


def test_the_change_of_two_models_is_of_independent_bounds():
    after, before = images(prevalence=0.1), replace(images(prevalence=0.1), decided=np.arange(125) % 2)
    compared = METRICS["ppv"].compare(after, before)
    assert compared.baseline is not None
    assert compared.change is not None
    parts = [compared.model, compared.baseline]
    assert compared.baseline == METRICS["ppv"].compare(before).model
    assert compared.change.spread == DifferenceSpread(*((p.value, p.spread) for p in parts))  # type: ignore[arg-type]
    assert compared.change.value == pytest.approx((parts[0].value or 0) - (parts[1].value or 0))
    assert (compared.change.n, compared.change.note) == (125, parts[0].note)


def test_notes_say_at_which_prevalence_and_what_a_miss_is_worth():
    at = METRICS["ppv"].compare(images()).model
    assert at.note == "at the 20 % of positive images here; no prevalence declared"
    assert at.n == 30
    benefit = METRICS["net_benefit"].compare(images(threshold=0.2)).model
    assert benefit.note == (
        "at the share of positive images here, as no prevalence was declared; a missed image counts as 4 false alarms; "
        "calling all positive: 0.000"
    )
    assert benefit.value == pytest.approx(20 / 125 - 10 / 125 / 4)
    declared = METRICS["net_benefit"].compare(images(threshold=0.2, prevalence=0.5)).model
    assert declared.note.startswith("at the declared prevalence of 50 %; a missed")
    assert declared.note.endswith("calling all positive: 0.375")
    assert METRICS["ppv"].compare(images(prevalence=0.025)).model.note == "at the declared prevalence of 2.5 %"


def test_bounds_without_a_prevalence_lie_within_the_scale_of_the_threshold():
    """With the threshold at t every image is worth at most 1 and costs at most t / (1 - t)."""
    judged = images(threshold=0.5)
    alarms = replace(judged, decided=np.ones(125, int))
    low, high = METRICS["net_benefit"].compare(alarms).model.interval(0.95) or (0, 0)
    assert -1 <= low < METRICS["net_benefit"].value(alarms) < high <= 1  # type: ignore[operator]
    values = np.where(judged.labels == 1, 1.0, -1.0)
    assert METRICS["net_benefit"].value(alarms) == pytest.approx(values.mean())
    half = 1.97 * values.std() / np.sqrt(125)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    paired = METRICS["net_benefit"].compare(judged, alarms)
    assert paired.baseline is not None
    assert paired.change is not None
    assert paired.change.spread is not None
    assert paired.baseline.value == pytest.approx(values.mean())
    assert paired.change.spread.method.startswith("t on")


def test_what_they_rest_on():
    judged = images()
    assert METRICS["ppv"].supports(judged) == (Support(30, "images called positive", 30),)
    assert METRICS["npv"].supports(judged) == (Support(95, "images called negative", 30),)
    smaller = (Support(25, "images on the smaller side", 30),)
    assert METRICS["net_benefit"].supports(judged) == smaller
    assert METRICS["ppv"].supports(replace(judged, prevalence=0.1)) == smaller
    assert METRICS["auc"].supports(judged) == smaller
    assert METRICS["macro_auc"].supports(judged) == smaller


def test_why_there_is_no_number():
    judged = images(prevalence=0.1, threshold=0.2)
    positive = judged.take(np.arange(25))
    for name in ("ppv", "npv", "net_benefit"):
        assert METRICS[name].compare(positive).model.note == "images of both sides are needed"
    silent = replace(judged, decided=np.zeros(125, int))
    assert METRICS["ppv"].compare(silent).model.note == "no image is called positive"
    assert (
        METRICS["npv"].compare(replace(judged, decided=np.ones(125, int))).model.note == "no image is called negative"
    )
    assert METRICS["npv"].compare(silent).model.value is not None
    alone = Judged(np.array([0, 1, 1]), np.eye(2, dtype=np.float32)[[0, 1, 1]], Sampling.of(3), prevalence=0.1)
    part = METRICS["ppv"].compare(alone).model
    assert part.value == 1
    assert part.spread is None
    assert part.note == "at the declared prevalence of 10 %; no interval: a single image says nothing of others"
    paired = METRICS["ppv"].compare(alone, alone).change
    assert paired is not None
    assert (paired.value, paired.spread) == (0, None)


def test_influences_weigh_both_sides_alike_where_a_prevalence_was_declared():
    judged = images(prevalence=0.1, threshold=0.2)
    for name in ("ppv", "npv", "net_benefit"):
        estimate = METRICS[name].estimate(judged)
        assert estimate.shares == pytest.approx(np.repeat([0.5 / 25, 0.5 / 100], [25, 100]))
        assert estimate.cell is not None
    plain = METRICS["npv"].estimate(images())
    assert plain.shares == pytest.approx((images().answer == 0) / 95)
    assert plain.n == 95
