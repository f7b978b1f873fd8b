# SPDX-License-Identifier: Apache-2.0
"""Thresholds of single classes against every possible cut and against scikit-learn, ties and thin data included."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_curve

from adaptclip.errors import DataError
from adaptclip.predictions import Predictions
from adaptclip.training.thresholds import FALLBACK, ThresholdRule, Thresholds, best_thresholds, choose_thresholds

F1 = ThresholdRule()


def validation(sigmoid: np.ndarray, labels: np.ndarray, **fields: Any) -> Predictions:
    n, c = sigmoid.shape
    probs = np.full((n, c), 1 / c, np.float32)
    names = tuple(f"class {k}" for k in range(c))
    return Predictions(tuple(map(str, range(n))), labels, probs, names, sigmoid=sigmoid.astype(np.float32), **fields)


def drawn(seed: int, *, ties: bool, n: int = 60, c: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random((n, c)) < rng.uniform(0.05, 0.6, c)
    positive[0], positive[1] = True, False
    probs = 1 / (1 + np.exp(-(rng.normal(size=(n, c)) + 1.2 * positive - 1)))
    probs = np.round(probs, 1) if ties else probs
    return probs.astype(np.float32), positive


def cuts(column: np.ndarray) -> list[float]:
    """Every threshold half way between neighbours, highest first; the last names all."""
    values = [*sorted({float(v) for v in column}, reverse=True), 0.0]
    return [(a + b) / 2 for a, b in itertools.pairwise(values)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_f1_is_the_best_of_all_cuts(seed, ties):
    probs, positive = drawn(seed, ties=ties)
    found = best_thresholds(probs, positive, F1)
    assert found.dtype == np.float64
    for c in range(probs.shape[1]):
        tried = {t: f1_score(positive[:, c], probs[:, c] >= t) for t in cuts(probs[:, c])}
        best = max(tried.values())
        # Of equal ones the highest threshold.
        assert found[c] == pytest.approx(max(t for t, f1 in tried.items() if f1 > best - 1e-12))
        precision, recall, _ = precision_recall_curve(positive[:, c], probs[:, c])
        with np.errstate(invalid="ignore"):
            curve = np.nanmax(2 * precision * recall / (precision + recall))
        assert f1_score(positive[:, c], probs[:, c] >= found[c]) == pytest.approx(curve)


@pytest.mark.parametrize("wanted", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_sensitivity_is_reached_by_the_highest_threshold(wanted, ties):
    probs, positive = drawn(9, ties=ties)
    found = best_thresholds(probs, positive, ThresholdRule("sensitivity", wanted))
    for c in range(probs.shape[1]):
        own = probs[positive[:, c], c]
        reached = [t for t in cuts(probs[:, c]) if (own >= t).mean() >= wanted - 1e-9]
        assert found[c] == pytest.approx(max(reached))
        assert (own >= found[c]).mean() >= wanted - 1e-9


def test_edges_by_hand():
    probs = np.array([[0.9, 0.5, 0.0], [0.7, 0.5, 0.0], [0.3, 0.5, 0.0], [0.1, 0.5, 0.0]], np.float32)
    positive = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]], bool)
    # Parted: half way; all alike: all are named; all at 0: the threshold is 0, which 0 reaches.
    np.testing.assert_allclose(best_thresholds(probs, positive, F1), [0.5, 0.25, 0.0], atol=1e-7)
    neighbours = np.array([[0.25], [np.nextafter(np.float32(0.25), np.float32(1))]], np.float32)
    (between,) = best_thresholds(neighbours, np.array([[False], [True]]), F1)
    assert float(neighbours[0, 0]) < between < float(neighbours[1, 0])


def test_what_the_images_say_nothing_of_falls_back():
    rng = np.random.default_rng(0)
    judged = validation(rng.random((12, 4)), np.array([0, 1] * 6))
    found = choose_thresholds(judged, judged.class_names, F1)
    assert found.fallbacks == ("class 2", "class 3")
    assert found.values[2:].tolist() == [FALLBACK] * 2
    assert (found.num_images, found.positives.tolist()) == (12, [6, 6, 0, 0])
    assert judged.sigmoid is not None
    expected = best_thresholds(judged.sigmoid[:, :2], judged.labels[:, None] == np.arange(2), F1)
    assert found.values[:2].tolist() == expected.tolist()
    alone = validation(rng.random((3, 2)), np.zeros(3, np.int64))
    assert choose_thresholds(alone, alone.class_names, F1).fallbacks == alone.class_names
    nothing = choose_thresholds(None, ("a", "b"), ThresholdRule("sensitivity", 0.9))
    assert (nothing.rule, nothing.num_images, nothing.fallbacks) == ("sensitivity=0.9", 0, ("a", "b"))
    fixed = choose_thresholds(judged, judged.class_names, ThresholdRule("fixed", 0.25))
    assert (fixed.values.tolist(), fixed.fallbacks, fixed.rule) == ([0.25] * 4, (), "0.25")
    again = Thresholds.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    assert again.values.tolist() == found.values.tolist()


def test_thresholds_need_probabilities_of_these_classes():
    plain = validation(np.random.default_rng(0).random((4, 2)), np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match="not there"):
        choose_thresholds(plain, ("other", "names"), F1)
    with pytest.raises(DataError, match="not there"):
        choose_thresholds(Predictions(plain.ids, plain.labels, plain.probs, plain.class_names), plain.class_names, F1)
