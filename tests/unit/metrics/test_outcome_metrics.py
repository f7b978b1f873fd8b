# SPDX-License-Identifier: Apache-2.0
"""Predictive values, net benefit, and differences of error rates between groups: values, influences, intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_score, roc_auc_score

from adaptclip.metrics import METRICS
from adaptclip.metrics.estimates import MIN_CLUSTERS, measured, share
from adaptclip.metrics.gaps import largest_difference
from adaptclip.metrics.intervals import wilson
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.ranking import macro_auc


def images(rng, n=400, prevalence=0.3, se=0.8, sp=0.9, threshold: float | None = 0.2, clusters=None, **fields):
    labels = (rng.random(n) < prevalence).astype(int)
    called = np.where(labels == 1, rng.random(n) < se, rng.random(n) > sp).astype(int)
    probs = np.stack([1 - called * 0.8, called * 0.8], axis=1).astype(np.float32)
    return Judged(labels, probs, Sampling.of(n, clusters), decided=called, threshold=threshold, **fields)


def bayes(judged, side, frequency):
    own, called = judged.labels == side, judged.answer == side
    good, bad = called[own].mean(), called[~own].mean()
    return frequency * good / (frequency * good + (1 - frequency) * bad)


def test_without_a_prevalence_they_are_plain_shares():
    judged = images(np.random.default_rng(0))
    assert METRICS["ppv"].value(judged) == pytest.approx(precision_score(judged.labels, judged.answer))
    assert METRICS["npv"].value(judged) == pytest.approx(precision_score(1 - judged.labels, 1 - judged.answer))
    true, false = (judged.answer * judged.labels).mean(), (judged.answer * (1 - judged.labels)).mean()
    assert METRICS["net_benefit"].value(judged) == pytest.approx(true - false * 0.2 / 0.8)  # Vickers & Elkin 2006
    part = METRICS["ppv"].compare(judged).model
    called = int(judged.answer.sum())
    assert part.n == called
    right = int((judged.labels * judged.answer).sum())
    assert part.interval(0.95) == pytest.approx(wilson(right, called), abs=0.005)
    assert "no prevalence declared" in part.note


def test_with_a_prevalence_they_are_bayes_and_the_note_says_so():
    judged = images(np.random.default_rng(0), prevalence=0.5, se=0.8, sp=0.9)
    judged = replace(judged, prevalence=0.02)
    assert METRICS["ppv"].value(judged) == pytest.approx(bayes(judged, 1, 0.02))
    assert METRICS["npv"].value(judged) == pytest.approx(bayes(judged, 0, 0.98))
    own, called = judged.labels == 1, judged.answer
    expected = 0.02 * called[own].mean() - 0.98 * called[~own].mean() * 0.2 / 0.8
    assert METRICS["net_benefit"].value(judged) == pytest.approx(expected)
    for name in ("ppv", "npv", "net_benefit"):
        assert "declared prevalence of 2 %" in METRICS[name].compare(judged).model.note
    declared = replace(judged, prevalence=float(judged.labels.mean()))
    for name in ("ppv", "npv", "net_benefit"):  # at the share among the images both ways are one
        assert METRICS[name].value(declared) == pytest.approx(METRICS[name].value(replace(judged, prevalence=None)))


@pytest.mark.parametrize("prevalence", [None, 0.1])
@pytest.mark.parametrize("name", ["ppv", "npv", "net_benefit"])
def test_influence_is_the_derivative_with_the_weight_of_an_image(name, prevalence):
    judged = replace(images(np.random.default_rng(1), n=200), prevalence=prevalence)
    estimate = METRICS[name].estimate(judged)
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)
    assert estimate.shares.sum() == pytest.approx(1)
    many = judged.take(np.tile(np.arange(200), 50))
    for i in range(12):
        more: Any = METRICS[name].value(many.take(np.append(np.arange(10_000), i)))
        assert (more - METRICS[name].value(many)) * 50 == pytest.approx(estimate.influence[i], rel=0.03, abs=1e-6)


@pytest.mark.parametrize(("se", "sp", "n"), [(0.8, 0.9, 300), (0.9, 0.99, 200), (0.6, 0.97, 150)])
@pytest.mark.parametrize("name", ["ppv", "npv", "net_benefit"])
def test_intervals_cover_also_where_hardly_a_false_alarm_was_seen(name, se, sp, n):
    rng, held, repeats, p = np.random.default_rng(0), 0, 250, 0.02
    truth = {
        "ppv": p * se / (p * se + (1 - p) * (1 - sp)),
        "npv": (1 - p) * sp / ((1 - p) * sp + p * (1 - se)),
        "net_benefit": p * se - (1 - p) * (1 - sp) * 0.2 / 0.8,
    }[name]
    for _ in range(repeats):
        low, high = METRICS[name].compare(replace(images(rng, n, 0.5, se, sp), prevalence=p)).model.interval(0.95) or (
            1,
            0,
        )
        held += low <= truth <= high
    assert held / repeats >= 0.915  # 0.95 less 2.5 standard errors


def test_no_false_alarm_among_a_hundred_is_no_certainty_at_a_low_prevalence():
    judged = images(np.random.default_rng(0), n=200, prevalence=0.5, se=0.9, sp=1.0)
    low, high = METRICS["ppv"].compare(replace(judged, prevalence=0.01)).model.interval(0.95) or (1, 1)
    assert METRICS["ppv"].value(replace(judged, prevalence=0.01)) == 1.0
    assert (low < 0.3, high) == (True, 1.0)


def test_clusters_of_both_sides_that_fail_together_widen_the_interval():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 10)
    hard = (rng.random(60) < 0.4)[patient]
    labels = np.tile([0, 1], 300)
    right = np.where(hard, rng.random(600) < 0.4, True)
    called = np.where(right, labels, 1 - labels)
    probs = np.stack([1.0 - called, called], axis=1).astype(np.float32)
    both = [Judged(labels, probs, Sampling.of(600, c), decided=called, prevalence=0.1) for c in (None, patient)]
    ends = [METRICS["ppv"].compare(one).model.interval(0.95) or (0.0, 0.0) for one in both]
    width = [high - low for low, high in ends]
    assert width[1] > 1.8 * width[0]


def test_what_cannot_be_told_says_why():
    judged = images(np.random.default_rng(0), threshold=None)
    silent = replace(judged, decided=np.zeros(400, int))
    assert METRICS["net_benefit"].compare(judged).model.note.endswith("here the most probable class decides")
    assert METRICS["ppv"].compare(silent).model.note == "no image is called positive"
    paired = METRICS["ppv"].compare(judged, silent)
    assert paired.model.interval(0.95) == METRICS["ppv"].compare(judged).model.interval(0.95)
    assert paired.change is not None
    assert paired.change.value is None
    few = images(np.random.default_rng(0), clusters=np.arange(400) % (MIN_CLUSTERS - 1))
    part = METRICS["ppv"].compare(replace(few, prevalence=0.1)).model
    assert part.value is not None
    assert "7 clusters" in part.note


@pytest.mark.parametrize("prevalence", [None, 0.05])
@pytest.mark.parametrize("name", ["ppv", "npv", "net_benefit"])
def test_a_model_changes_by_nothing_against_itself_and_by_what_it_gained(name, prevalence):
    rng = np.random.default_rng(0)
    judged = replace(images(rng), prevalence=prevalence)
    same = METRICS[name].compare(judged, judged).change
    assert same is not None
    low, high = same.interval(0.95) or (1, 0)
    assert same.value == 0.0
    assert low < 0 < high
    coin = replace(judged, decided=(rng.random(400) < 0.5).astype(int))
    better = METRICS[name].compare(judged, coin).change
    assert better is not None
    assert better.value == pytest.approx((METRICS[name].value(judged) or 0) - (METRICS[name].value(coin) or 0))
    assert (better.interval(0.95) or (0, 0))[0] > 0


@pytest.mark.parametrize(("groups", "rates"), [(2, (0.8, 0.8)), (2, (0.9, 0.7)), (6, (0.8, 0.8)), (6, (0.85, 0.7))])
def test_the_largest_difference_is_covered_however_many_groups(groups, rates):
    rng, held, repeats = np.random.default_rng(0), 0, 200
    truth = np.where(np.arange(groups) == 0, rates[1], rates[0])
    for _ in range(repeats):
        parts = [measured(share(rng.random(60) < r), Sampling.of(60)) for r in truth]
        found = largest_difference([parts, parts[::-1]])
        low, high = found.interval(0.95) or (1, 0)
        held += low <= np.ptp(truth) <= high
    assert held / repeats >= 0.915


def test_a_difference_needs_two_groups_with_intervals():
    one = measured(share(np.ones(40, bool)), Sampling.of(40))
    alone = measured(share(np.ones(1, bool)), Sampling.of(1))
    assert largest_difference([[one]]).value is None
    assert largest_difference([[one, alone]]).interval(0.95) is None


def test_an_area_of_two_classes_is_that_of_the_column_that_still_has_the_digits():
    """float32 knows 1e-20 and not 1 - 1e-20: the order of such answers is in one of the two columns alone."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    logits = 18 * (labels - 0.5) + 14 * rng.normal(size=60)
    sure = 1 / (1 + np.exp(-logits))
    probs = np.stack([1 / (1 + np.exp(logits)), sure], axis=1).astype(np.float32)
    expected = roc_auc_score(labels, logits)
    assert len(np.unique(probs[:, 0])) < 60 > len(np.unique(probs[:, 1]))
    for given, order in ((probs, labels), (probs[:, ::-1], 1 - labels)):
        found = macro_auc(given, order)
        assert found is not None
        assert found.value == pytest.approx(expected, abs=1e-12)
