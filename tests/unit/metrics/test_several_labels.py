# SPDX-License-Identifier: Apache-2.0
"""Yes or no for each class: values against scikit-learn, influences against its sample weights, what they rest on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    hamming_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from adaptclip.metrics import METRICS
from adaptclip.metrics.estimates import mean_of, variance
from adaptclip.metrics.intervals import wilson
from adaptclip.metrics.judged import Judged, Marks, Sampling
from adaptclip.metrics.metric import Support
from adaptclip.metrics.several_labels import (
    NO_MARKS,
    class_rates,
    mean_area,
    mean_of_classes,
    mean_precision,
    measure,
    pooled,
)

N, C = 60, 4


def marks(seed=0, n=N):
    rng = np.random.default_rng(seed)
    positive = rng.random((n, C)) < [0.5, 0.4, 0.3, 0.6]
    probs = np.round(np.clip(rng.beta(2, 3, (n, C)) + 0.3 * positive, 0, 1), 2)
    return Marks(probs, positive, probs >= 0.5)


def images(found, sampling=None):
    n = len(found.probs)
    return Judged(np.zeros(n, int), np.full((n, C), 0.25), sampling or Sampling.of(n), marks=found)


def expected(found, average, weights=None):
    """scikit-learn's rates; specificity is the sensitivity of "no"."""
    precision, sensitivity, f1, _ = precision_recall_fscore_support(
        found.positive, found.named, average=average, sample_weight=weights
    )
    _, specificity, _, _ = precision_recall_fscore_support(
        ~found.positive, ~found.named, average=average, sample_weight=weights
    )
    return {"sensitivity": sensitivity, "specificity": specificity, "precision": precision, "f1": f1}


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("rate", ["sensitivity", "specificity", "precision", "f1"])
def test_rates_and_their_influences_are_scikit_learns(average, rate):
    found = marks()
    estimate = (mean_of_classes if average == "macro" else pooled)(found, rate)
    value = expected(found, average)[rate]
    assert estimate is not None
    assert estimate.value == pytest.approx(value)
    assert estimate.value == METRICS[f"labels_{average}_{rate}"].value(images(found))
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)
    assert estimate.shares.sum() == pytest.approx(1)
    for i in range(6):
        weights = np.ones(N)
        weights[i] += 1e-6
        moved = (expected(found, average, weights)[rate] - value) / 1e-6
        assert estimate.influence[i] == pytest.approx(moved, abs=1e-5)


def test_an_estimate_rests_on_the_images_that_it_counts():
    """Sensitivity of one class: its positive images, and no others; over two classes each counts half."""
    found = marks()
    one = mean_of_classes(found.of_class(2), "sensitivity")
    own = found.positive[:, 2]
    assert one is not None
    assert one.shares == pytest.approx(own / own.sum())
    assert one.n == own.sum()
    f1 = mean_of_classes(found.of_class(2), "f1")
    total = own.astype(int) + found.named[:, 2]
    assert f1 is not None
    assert f1.shares == pytest.approx(total / total.sum())
    every = mean_of_classes(found, "sensitivity")
    shares = (found.positive / found.positive.sum(axis=0)).mean(axis=1)
    assert every is not None
    assert every.shares == pytest.approx(shares)
    assert every.n == round(1 / (shares**2).sum())


def test_images_count_as_whole_ones_and_at_least_as_one():
    alone = Marks(np.array([[0.9], [0.1]]), np.array([[True], [False]]), np.array([[True], [False]]))
    estimate = mean_of_classes(alone, "sensitivity")
    assert estimate is not None
    assert (estimate.value, estimate.n, estimate.least) == (1.0, 1, 0.0)


def test_classes_for_which_a_rate_is_not_defined_are_left_out_of_its_mean():
    found = marks()
    positive, named = found.positive.copy(), found.named.copy()
    positive[:, 0], named[:, 1], positive[:, 3] = False, False, True
    odd = Marks(found.probs, positive, named)
    nothing: Any = 0
    by_class: Any = precision_recall_fscore_support(positive, named, average=None, zero_division=nothing)
    values = {"precision": by_class[0], "sensitivity": by_class[1], "f1": by_class[2]}
    for rate, kept in (("sensitivity", [1, 2, 3]), ("precision", [0, 2, 3]), ("f1", [1, 2, 3])):
        estimate = mean_of_classes(odd, rate)
        assert estimate is not None
        assert estimate.value == pytest.approx(values[rate][kept].mean())
    specificity = mean_of_classes(odd, "specificity")
    assert specificity is not None
    assert specificity.value == pytest.approx(np.mean([(~named[~positive[:, c], c]).mean() for c in (0, 1, 2)]))


def test_what_no_class_defines_has_no_number():
    nothing = Marks(np.zeros((3, 2)), np.zeros((3, 2), bool), np.zeros((3, 2), bool))
    for rate in ("sensitivity", "precision", "f1"):
        assert mean_of_classes(nothing, rate) is None
        assert pooled(nothing, rate) is None
    assert mean_area(nothing) is None
    assert mean_precision(nothing) is None
    without = measure(None, Sampling.of(3))
    assert (without.value, without.n, without.note) == (None, 3, "no class for which it is defined")
    judged = Judged(np.zeros(3, int), np.full((3, 2), 0.5), Sampling.of(3), marks=nothing)
    assert METRICS["labels_macro_f1"].compare(judged).model.note == "no class for which it is defined"
    bare = Judged(np.zeros(3, int), np.full((3, 2), 0.5), Sampling.of(3))
    assert METRICS["labels_macro_f1"].compare(bare).model.note == NO_MARKS
    assert METRICS["labels_macro_f1"].support(bare) == (Support(0),)


def test_example_based_ones_are_scikit_learns_and_nothing_for_nothing_is_right():
    found = marks()
    found.named[:3], found.positive[:3] = False, False
    judged = images(found)
    _, _, f1, _ = precision_recall_fscore_support(found.positive, found.named, average="samples", zero_division=1.0)  # type: ignore[arg-type]
    both, either = (found.positive & found.named).sum(1), (found.positive | found.named).sum(1)
    jaccard = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    for name, value in (
        ("subset_accuracy", accuracy_score(found.positive, found.named)),
        ("hamming_loss", hamming_loss(found.positive, found.named)),
        ("example_f1", f1),
        ("example_jaccard", jaccard.mean()),
    ):
        assert METRICS[name].value(judged) == pytest.approx(value), name
        assert METRICS[name].supports(judged) == (Support(N),)
    hits = (found.positive == found.named).all(axis=1)
    assert METRICS["subset_accuracy"].compare(judged).model.interval(0.9) == wilson(int(hits.sum()), N, 0.9)
    assert METRICS["example_jaccard"].compare(judged).model.interval(0.9) == pytest.approx(
        mean_of(jaccard).interval(0.9)
    )


def test_the_mean_area_is_scikit_learns_over_classes_with_both_sides():
    found = marks()
    found.positive[:, 0], found.positive[:, 1] = True, False
    estimate = mean_area(found)
    areas = [roc_auc_score(found.positive[:, c], found.probs[:, c]) for c in (2, 3)]
    assert estimate is not None
    assert estimate.value == pytest.approx(np.mean(areas))
    counts = found.positive.sum(axis=0)
    assert estimate.shares == pytest.approx((found.positive[:, 2:] / counts[2:]).mean(axis=1))
    least = [hanley_mcneil(a, p, N - p) for a, p in zip(areas, counts[2:], strict=True)]
    assert estimate.least == pytest.approx(sum(least) / 4)
    assert variance(estimate, Sampling.of(N), 1.0).value >= estimate.least


def hanley_mcneil(area, positives, negatives):
    """Hanley & McNeil 1982, equation 1."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    return spread / (positives * negatives)


def test_rates_of_one_class_are_shares_of_its_images():
    found = marks()
    sampling = Sampling.of(N)
    rates = class_rates(found, sampling, 2)
    positive, named = found.positive[:, 2], found.named[:, 2]
    for name, hits in (
        ("sensitivity", named[positive]), ("specificity", ~named[~positive]), ("precision", positive[named]),
    ):  # fmt: skip
        assert rates[name].value == pytest.approx(hits.mean())
        assert rates[name].n == len(hits)
        assert rates[name].interval(0.95) == pytest.approx(wilson(int(hits.sum()), len(hits)))
    assert rates["f1"].value == pytest.approx(2 * (positive & named).sum() / (positive.sum() + named.sum()))
    assert rates["auc"].value == pytest.approx(roc_auc_score(positive, found.probs[:, 2]))
    assert rates["average_precision"].value == pytest.approx(average_precision_score(positive, found.probs[:, 2]))
    assert rates["average_precision"].n == positive.sum()
    found.positive[:, 2] = False
    empty = class_rates(found, sampling, 2)
    assert empty["auc"].note == "needs images of the class and others"
    assert empty["f1"].value is None


def test_average_precision_is_the_mean_of_the_classes_that_have_images():
    found = marks()
    found.positive[:, 1] = False
    expected_ = np.mean([average_precision_score(found.positive[:, c], found.probs[:, c]) for c in (0, 2, 3)])
    estimate = mean_precision(found)
    assert estimate is not None
    assert estimate.value == pytest.approx(expected_)


@pytest.mark.parametrize("flip", [False, True])
def test_a_mean_over_classes_rests_on_the_smaller_side_of_the_rarest(flip):
    found = marks()
    found.positive[:, 1] = np.arange(N) < 7
    found = Marks(found.probs, ~found.positive if flip else found.positive, found.named)
    everything, rarest = METRICS["labels_macro_f1"].supports(images(found))
    assert everything == Support(N, "images", 100)
    assert rarest == Support(7, "images on the smaller side of the rarest class", 30)
    assert METRICS["labels_micro_f1"].supports(images(found)) == (Support(N),)


def test_several_labels_are_refused_by_metrics_of_images_with_one():
    found = marks()
    note = METRICS["accuracy"].compare(images(found)).model.note
    assert note == (
        "images may have several classes here, or none, and accuracy is of images with one; the nearest that is: "
        "subset_accuracy"
    )
    one = Marks(found.probs, np.eye(C, dtype=bool)[np.arange(N) % C], found.named)
    assert METRICS["accuracy"].compare(images(one)).model.value is not None
    assert one.single
    assert not found.single
    alone = found.of_class(2)
    for whole, part in ((found.probs, alone.probs), (found.positive, alone.positive), (found.named, alone.named)):
        assert np.array_equal(part, whole[:, [2]])
    rows = np.array([3, 1])
    assert np.array_equal(found.take(rows).named, found.named[rows])
    assert np.array_equal(images(found).take(rows).marks.positive, found.positive[rows])  # type: ignore[union-attr]
