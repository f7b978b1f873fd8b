from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from adaptclip.errors import DataError
from adaptclip.evaluation.metrics import (
    LINEARISED,
    LOWER_IS_BETTER,
    METRIC_FUNCTIONS,
    METRIC_SHORT,
    METRIC_WORDS,
    absent_classes,
    accuracy,
    ece,
    mean_per_class_accuracy,
    metric_cells,
    topk_accuracy,
    topk_correct,
)
from adaptclip.gate_rules import GENERAL_METRICS, METRICS


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


def test_every_declared_metric_has_a_function_and_words():
    assert tuple(METRIC_FUNCTIONS) == GENERAL_METRICS
    assert METRICS == tuple(METRIC_WORDS) == tuple(METRIC_SHORT)
    assert set(METRICS) > LOWER_IS_BETTER


def test_known_answers():
    probs = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]], np.float32)
    labels = np.array([0, 1, 1, 2])
    assert accuracy(probs, labels) == 0.75
    assert mean_per_class_accuracy(probs, labels) == pytest.approx((1 + 0.5 + 1) / 3)
    assert topk_accuracy(probs, labels, 2) == 1.0
    # Each image has a bin of its own: |1-.9|, |0-.6|, |1-.8|, |1-.4|.
    assert ece(probs, labels) == pytest.approx((0.1 + 0.6 + 0.2 + 0.6) / 4, abs=1e-6)


def test_agrees_with_scikit_learn(judged):
    probs, labels = judged
    assert mean_per_class_accuracy(probs, labels) == pytest.approx(balanced_accuracy_score(labels, probs.argmax(1)))
    for k in (1, 3, 5):
        assert topk_accuracy(probs, labels, k) == top_k_accuracy_score(labels, probs, k=k, labels=range(8))


def test_ece_agrees_with_a_loop(judged):
    assert ece(*judged) == pytest.approx(slow_ece(*judged), abs=1e-7)


def test_classes_without_images_are_left_out_of_the_mean(recwarn):
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], np.float32)
    labels = np.array([0, 0])
    assert mean_per_class_accuracy(probs, labels) == 0.5
    assert absent_classes(labels, 3).tolist() == [1, 2]
    assert not recwarn.list


def test_top1_is_the_accuracy_even_with_ties():
    probs = np.full((4, 4), 0.25, np.float32)
    labels = np.array([0, 1, 2, 3])
    assert topk_accuracy(probs, labels, 1) == accuracy(probs, labels) == 0.25
    assert topk_correct(probs, labels, 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("k", [0, 3, 4])
def test_topk_refuses_a_k_that_says_nothing(k):
    with pytest.raises(DataError, match=rf"top-{k} accuracy says nothing about 3 classes.*1\.\.2"):
        topk_accuracy(np.full((2, 3), 1 / 3), np.array([0, 1]), k)


@pytest.mark.parametrize("metric", GENERAL_METRICS)
def test_no_images_is_an_error(metric):
    with pytest.raises(DataError, match="at least one image"):
        METRIC_FUNCTIONS[metric](np.zeros((0, 8)), np.zeros(0, int))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_cells_with_equal_weights_give_the_metric_and_repeated_images_count_repeatedly(data):
    n = data.draw(st.integers(1, 30))
    scores = data.draw(arrays(np.float64, (n, 7), elements=st.floats(-5, 5)))
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, 6)))
    repeats = data.draw(arrays(np.int64, n, elements=st.integers(1, 3)))
    probs = softmax(scores)
    for metric in sorted(set(GENERAL_METRICS) - LINEARISED):
        cells = metric_cells(metric, probs, labels)
        for weights in (np.ones(n), repeats.astype(float)):
            onehot = np.eye(cells.num_cells)[cells.cell]
            combined = cells.combine((weights * cells.values)[None] @ onehot, weights[None] @ onehot)
            value = np.abs(combined).sum() if metric == "ece" else combined[0]
            times = weights.astype(int)
            expected = METRIC_FUNCTIONS[metric](np.repeat(probs, times, axis=0), np.repeat(labels, times))
            assert value == pytest.approx(expected, abs=1e-9)
