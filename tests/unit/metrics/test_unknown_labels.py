# SPDX-License-Identifier: Apache-2.0
"""Images of which it is not known whether they show a class: every number is scikit-learn's without those pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from adaptclip.metrics import LABELS_METRICS, METRICS
from adaptclip.metrics.judged import Judged, Marks, Sampling
from adaptclip.metrics.ranking import average_precision

N, C = 120, 4


def marks(seed: int = 0, *, unknown: float = 0.2, n: int = N) -> Marks:
    rng = np.random.default_rng(seed)
    shown = rng.random((n, C)) < [0.5, 0.4, 0.3, 0.2]
    probs = np.round(np.clip(rng.beta(2, 3, (n, C)) + 0.3 * shown, 0, 1), 2)
    known = rng.random((n, C)) >= unknown
    known[0] = False  # of one image nothing is known
    return Marks(probs, shown & known, probs >= 0.5, known, several=True)


def images(found: Marks) -> Judged:
    n = len(found.probs)
    return Judged(np.zeros(n, int), np.full((n, C), 1 / C), Sampling.of(n), marks=found)


def expected(found: Marks) -> dict[str, Any]:
    """Every number by hand and scikit-learn, a class or an image at a time, on what is known of it."""
    assert found.known is not None
    columns = [
        (found.positive[rows, c], found.named[rows, c], found.probs[rows, c])
        for c, rows in enumerate(found.known.T)
    ]  # fmt: skip
    rows = [(found.positive[i, own], found.named[i, own]) for i, own in enumerate(found.known) if own.any()]
    truth, said = found.positive[found.known], found.named[found.known]
    one: Any = 1.0
    return {
        "labels_macro_auc": np.mean([roc_auc_score(y, p) for y, _, p in columns]),
        "labels_macro_average_precision": np.mean([average_precision_score(y, p) for y, _, p in columns]),
        "labels_macro_sensitivity": np.mean([recall_score(y, s) for y, s, _ in columns]),
        "labels_macro_specificity": np.mean([recall_score(~y, ~s) for y, s, _ in columns]),
        "labels_macro_precision": np.mean([precision_score(y, s) for y, s, _ in columns]),
        "labels_macro_f1": np.mean([f1_score(y, s) for y, s, _ in columns]),
        "labels_micro_sensitivity": recall_score(truth, said),
        "labels_micro_specificity": recall_score(~truth, ~said),
        "labels_micro_precision": precision_score(truth, said),
        "labels_micro_f1": f1_score(truth, said),
        "subset_accuracy": np.mean([(y == s).all() for y, s in rows]),
        "example_f1": np.mean([f1_score(y, s, zero_division=one) for y, s in rows]),
        "example_jaccard": np.mean([jaccard_score(y, s, zero_division=one) for y, s in rows]),
        "hamming_loss": float((truth != said).mean()),
    }


def test_all_that_is_measured_is_listed():
    assert set(expected(marks())) == set(LABELS_METRICS)


@pytest.mark.parametrize("name", LABELS_METRICS)
def test_a_number_is_that_of_what_is_known(name):
    found = marks()
    assert METRICS[name].value(images(found)) == pytest.approx(expected(found)[name])
    measured = METRICS[name].compare(images(found)).model.interval(0.95)
    assert measured is not None
    assert measured[0] < expected(found)[name] < measured[1]


@pytest.mark.parametrize("name", LABELS_METRICS)
def test_an_image_moves_it_as_leaving_it_out_does(name):
    found = images(marks(seed=3))
    metric = METRICS[name]
    chosen = metric.chosen(found)
    estimate, n = metric.estimate(chosen), len(chosen)
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)
    left_out = [metric.value(chosen.take(np.delete(np.arange(n), i))) for i in range(n)]
    moved = estimate.value - np.array(left_out, float)
    assert np.corrcoef(moved, estimate.influence)[0, 1] > 0.995
    assert np.std(moved) == pytest.approx(np.std(estimate.influence), rel=0.06)


def test_what_nobody_knows_has_no_number():
    found = marks(unknown=1.0)
    for name in LABELS_METRICS:
        assert METRICS[name].value(images(found)) is None
    assert METRICS["labels_macro_f1"].supports(images(found))[1].count == 0


def test_the_average_precision_and_its_influence_are_scikit_learns():
    rng = np.random.default_rng(1)
    positive = rng.random(80) < 0.3
    scores = np.round(rng.random(80) + 0.4 * positive, 1)  # many ties
    found = average_precision(scores, positive)
    assert found.value == pytest.approx(average_precision_score(positive, scores))
    for i in range(0, 80, 7):
        weights = np.ones(80)
        weights[i] += 1e-6
        moved = (average_precision_score(positive, scores, sample_weight=weights) - found.value) / 1e-6
        assert found.influence[i] == pytest.approx(moved, abs=1e-5)


def test_yes_or_no_is_calibrated_as_scikit_learn_and_counting_say():
    rng = np.random.default_rng(2)
    labels, given = rng.integers(0, 2, 400), rng.random(400)
    judged = Judged(labels, np.stack([1 - given, given], axis=1), Sampling.of(400))
    assert METRICS["outcome_brier"].value(judged) == pytest.approx(brier_score_loss(labels, given))
    assert METRICS["brier"].value(judged) == pytest.approx(2 * brier_score_loss(labels, given))
    total = 0.0
    for b in range(15):
        own = (given > b / 15) & (given <= (b + 1) / 15)
        total += abs((labels[own] - given[own]).sum()) / 400
    assert METRICS["outcome_ece"].value(judged) == pytest.approx(total)
    measured = METRICS["outcome_ece"].compare(judged).model.interval(0.95)
    assert measured is not None
    assert 0 <= measured[0] < measured[1]
