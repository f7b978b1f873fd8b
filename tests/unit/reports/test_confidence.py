# SPDX-License-Identifier: Apache-2.0
"""Scores against scikit-learn; temperature, coverage curve and sets against independent computations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import brier_score_loss, log_loss

from adaptclip.errors import DataError
from adaptclip.metrics.calibration import brier_values, log_loss_values
from adaptclip.predictions import Predictions
from adaptclip.reports.confidence import (
    conformal_sets,
    fewest_validation_images,
    fit_temperature,
    selective_curve,
    with_temperature,
)


def predictions(n=300, c=5, skill=1.5, sharpness=1.0, seed=0, **fields):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    logits = rng.normal(size=(n, c))
    logits[np.arange(n), labels] += skill
    odds = np.exp(logits * sharpness)
    probs = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    return Predictions(
        tuple(f"{seed}-{i}" for i in range(n)), labels, probs, tuple(f"c{k}" for k in range(c)), **fields
    )


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    p = predictions(seed=seed)
    sum_of_squares: Any = False
    brier = brier_score_loss(p.labels, p.probs, labels=np.arange(5), scale_by_half=sum_of_squares)
    assert brier_values(p.probs, p.labels).mean() == pytest.approx(brier, abs=1e-6)
    assert log_loss_values(p.probs, p.labels).mean() == pytest.approx(log_loss(p.labels, p.probs), abs=1e-5)


def test_scores_of_certain_answers():
    sure = np.eye(3, dtype=np.float32)
    assert brier_values(sure, np.arange(3)).tolist() == [0, 0, 0]
    assert brier_values(sure, np.array([1, 2, 0])).tolist() == [2, 2, 2]
    assert np.isfinite(log_loss_values(sure, np.array([1, 2, 0]))).all()


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_temperature_is_that_of_another_optimiser(sharpness):
    p = predictions(2000, sharpness=sharpness)
    found = fit_temperature(p)
    # What was multiplied into the logits comes out again; and another optimiser agrees.
    logits = np.log(p.probs.astype(np.float64))

    def loss(t):
        z = logits / t
        z -= z.max(1, keepdims=True)
        return -(z[np.arange(len(p)), p.labels] - np.log(np.exp(z).sum(1))).mean()

    other = minimize(lambda x: loss(float(x[0])), [1.0], method="Nelder-Mead", options={"xatol": 1e-7}).x[0]
    assert found == pytest.approx(other, rel=1e-3)
    scaled = with_temperature(p, found)
    assert (scaled.pred == p.pred).all()
    assert log_loss_values(scaled.probs, p.labels).mean() <= log_loss_values(p.probs, p.labels).mean() + 1e-9
    assert fit_temperature(scaled) == pytest.approx(1.0, abs=1e-2)


def test_temperature_of_all_right_or_all_wrong_is_finite():
    right = Predictions(("a", "b"), np.array([0, 1]), np.array([[0.9, 0.1], [0.1, 0.9]], np.float32), ("x", "y"))
    wrong = Predictions(("a", "b"), np.array([1, 0]), right.probs, ("x", "y"))
    assert 0 < fit_temperature(right) < 0.05
    assert fit_temperature(wrong) > 100
    with pytest.raises(DataError, match="above 0"):
        with_temperature(right, 0.0)


def brute_aurc(confidence, wrong):
    """Mean over all orders in which ties may come."""
    areas = []
    for order in itertools.permutations(range(len(wrong))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            risks = [np.mean([wrong[i] for i in order[: k + 1]]) for k in range(len(order))]
            areas.append(np.mean(risks))
    return np.mean(areas)


def test_coverage_curve_by_brute_force_with_ties():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        top = rng.choice([0.6, 0.7, 0.9], 6).astype(np.float32)
        labels = rng.integers(0, 2, 6)
        p = Predictions(tuple("abcdef"), labels, np.stack([top, 1 - top], 1), ("x", "y"))
        curve = selective_curve(p)
        assert curve.aurc.value == pytest.approx(brute_aurc(top, p.pred != labels))
        for coverage, accuracy, threshold in zip(curve.coverage, curve.accuracy, curve.threshold, strict=True):
            answered = top >= threshold
            assert coverage == pytest.approx(answered.mean())
            assert accuracy == pytest.approx((p.pred == labels)[answered].mean())


def test_the_area_has_the_influence_of_a_resampled_image():
    p = predictions(120)
    top, wrong = p.probs.max(1), p.pred != p.labels

    def area(weights):
        order = np.argsort(-top, kind="stable")
        w = weights[order]
        return float((w * np.cumsum(w * wrong[order]) / np.cumsum(w)).sum() / w.sum())

    curve = selective_curve(p)
    assert curve.aurc.value == pytest.approx(area(np.ones(120)))
    moved = []
    for i in range(120):
        weights = np.ones(120)
        weights[i] += 1e-5
        moved.append((area(weights) - area(np.ones(120))) / 1e-5)
    error = np.sqrt((np.array(moved) ** 2).sum())
    low, high = curve.aurc.interval(0.95) or (1, 0)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_all_right_has_no_risk():
    p = Predictions(tuple("abcd"), np.zeros(4, int), np.tile([0.8, 0.2], (4, 1)).astype(np.float32), ("x", "y"))
    curve = selective_curve(p)
    assert curve.aurc.value == 0
    assert curve.coverage.tolist() == [1]
    assert curve.accuracy.tolist() == [1]


def test_sets_by_the_textbook():
    p = predictions(59)
    sets = conformal_sets(p, 0.9)
    scores = np.sort(1 - p.probs[np.arange(59), p.labels])
    threshold = scores[int(np.ceil(60 * 0.9)) - 1]
    assert sets.least_probability == pytest.approx(1 - threshold, abs=1e-6)
    test = predictions(400, seed=1)
    expected = 1 - test.probs <= threshold + 1e-7
    assert (sets.members(test.probs) == expected).mean() > 0.999


def test_sets_cover_what_they_promise():
    """Over 300 validation sets of 40 images the mean coverage is 0.9, and its spread is the stated one."""
    coverages = []
    for seed in range(300):
        both = predictions(1040, seed=seed)
        validation = Predictions(both.ids[:40], both.labels[:40], both.probs[:40], both.class_names)
        sets = conformal_sets(validation, 0.9)
        coverages.append(sets.members(both.probs[40:])[np.arange(1000), both.labels[40:]].mean())
    assert 0.9 <= np.mean(coverages) + 0.005 < 0.93
    low, high = sets.expected
    assert 0.85 < np.mean((np.array(coverages) > low) & (np.array(coverages) < high)) < 0.95


def test_too_few_validation_images_for_a_level():
    assert fewest_validation_images(0.9) == 9
    assert fewest_validation_images(0.95) == 19
    assert conformal_sets(predictions(9), 0.9).num_validation == 9
    with pytest.raises(DataError, match="at least 9 validation images, got 8"):
        conformal_sets(predictions(8), 0.9)
    with pytest.raises(DataError, match="within 0 and 1"):
        conformal_sets(predictions(9), 90)
