# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, top_k_accuracy_score

from adaptclip.errors import DataError
from adaptclip.metrics import GENERAL_METRICS, METRICS, Metric, find_metric
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.rates import absent_classes, top_k, topk_correct


def value(metric, probs, labels):
    """The metric's value, of images that are independent."""
    found: Any = find_metric(metric).value(Judged(labels, probs, Sampling.of(len(labels))))
    return found


def softmax(scores: np.ndarray) -> np.ndarray:
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def judged():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 300)
    scores = rng.normal(size=(300, 8))
    scores[np.arange(300), labels] += 1.5
    return softmax(scores), labels


def slow_ece(probs, labels, bins=15):
    total = 0.0
    for b in range(bins):
        rows = [i for i in range(len(labels)) if b / bins < probs[i].max() <= (b + 1) / bins]
        if rows:
            right = np.mean([probs[i].argmax() == labels[i] for i in rows])
            total += len(rows) / len(labels) * abs(right - np.mean([probs[i].max() for i in rows]))
    return total


def test_every_metric_has_words_and_its_own_name():
    assert set(GENERAL_METRICS) < set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.words
        assert metric.short
        assert metric.better in ("higher", "lower", "neither")
        assert set(metric.info()) == {"words", "short", "per_cent", "better", "scale", "meaning", "hub"}
    assert {name for name, metric in METRICS.items() if metric.lower_is_better} == {
        "ece", "brier", "fpr", "fnr", "hamming_loss", "outcome_brier", "outcome_ece",
    }  # fmt: skip


def test_known_answers():
    probs = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]], np.float32)
    labels = np.array([0, 1, 1, 2])
    assert value("accuracy", probs, labels) == 0.75
    assert value("mean_per_class_accuracy", probs, labels) == pytest.approx((1 + 0.5 + 1) / 3)
    assert value(top_k(2), probs, labels) == 1.0
    # Each image has a bin of its own: |1-.9|, |0-.6|, |1-.8|, |1-.4|.
    assert value("ece", probs, labels) == pytest.approx((0.1 + 0.6 + 0.2 + 0.6) / 4, abs=1e-6)


def test_agrees_with_scikit_learn(judged):
    probs, labels = judged
    assert value("mean_per_class_accuracy", probs, labels) == pytest.approx(
        balanced_accuracy_score(labels, probs.argmax(1))
    )
    for k in (1, 3, 5):
        assert value(top_k(k), probs, labels) == top_k_accuracy_score(labels, probs, k=k, labels=range(8))


def test_ece_agrees_with_a_loop(judged):
    assert value("ece", *judged) == pytest.approx(slow_ece(*judged), abs=1e-7)


def test_classes_without_images_are_left_out_of_the_mean(recwarn):
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], np.float32)
    labels = np.array([0, 0])
    assert value("mean_per_class_accuracy", probs, labels) == 0.5
    assert absent_classes(labels, 3).tolist() == [1, 2]
    assert not recwarn.list


def test_top1_is_the_accuracy_even_with_ties():
    probs = np.full((4, 4), 0.25, np.float32)
    labels = np.array([0, 1, 2, 3])
    assert value(top_k(1), probs, labels) == value("accuracy", probs, labels) == 0.25
    assert topk_correct(probs, labels, 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("k", [0, 3, 4])
def test_topk_refuses_a_k_that_says_nothing(k):
    with pytest.raises(DataError, match=rf"top-{k} accuracy says nothing about 3 classes.*1\.\.2"):
        topk_correct(np.full((2, 3), 1 / 3), np.array([0, 1]), k)


@pytest.mark.parametrize("metric", GENERAL_METRICS)
def test_no_images_is_no_number(metric):
    assert value(metric, np.zeros((0, 8)), np.zeros(0, int)) is None


SMOOTH = [name for name, m in METRICS.items() if not m.of_outcome and not m.of_labels and m.measure_with is None]


@pytest.mark.parametrize("name", SMOOTH)
def test_influence_is_the_derivative_with_the_weight_of_an_image(name, judged):
    """Against copies of one image: a metric of n images with one of them m times, for small 1/n."""
    metric, (probs, labels) = METRICS[name], judged
    many_probs, many_labels = np.repeat(probs, 20, axis=0), np.repeat(labels, 20)
    estimate = metric.estimate(Judged(labels, probs, Sampling.of(len(labels))))
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-9)
    for i in (0, 7, 150):
        more = np.concatenate([many_probs, probs[[i]]]), np.concatenate([many_labels, labels[[i]]])
        moved = (value(metric, *more) - value(metric, many_probs, many_labels)) * 20
        assert estimate.influence[i] == pytest.approx(moved, rel=0.02, abs=2e-5)


def test_a_metric_of_your_own_is_any_function(judged):
    probs, labels = judged
    mine = Metric.of("kappa", lambda y, p: cohen_kappa_score(y, p.argmax(1)), scale=(-1, 1), per_cent=False)
    images = Judged(labels, probs, Sampling.of(300))
    compared = mine.compare(images)
    assert compared.model.value == pytest.approx(cohen_kappa_score(labels, probs.argmax(1)))
    low, high = compared.model.interval(0.95) or (1, -1)
    rng = np.random.default_rng(0)
    drawn = [cohen_kappa_score(labels[i], probs[i].argmax(1)) for i in rng.integers(0, 300, (400, 300))]
    assert high - low == pytest.approx(np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025), rel=0.15)
    copied = Metric.of("copy", lambda y, p: float((p.argmax(1) == y).mean()))
    assert copied.compare(images).model.interval(0.9) == pytest.approx(
        METRICS["accuracy"].compare(images).model.interval(0.9), abs=0.002
    )


def test_influence_of_left_out_groups_is_that_of_left_out_units(judged):
    """More units than groups: leaving out 200 groups gives nearly the variance of leaving out each image."""
    probs, labels = np.tile(judged[0], (4, 1)), np.tile(judged[1], 4)
    copied = Metric.of("copy", lambda y, p: float((p.argmax(1) == y).mean()))
    images = Judged(labels, probs, Sampling.of(1200))
    assert copied.compare(images).model.interval(0.95) == pytest.approx(
        METRICS["accuracy"].compare(images).model.interval(0.95), abs=0.012
    )
