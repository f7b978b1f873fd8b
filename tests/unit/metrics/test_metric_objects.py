# SPDX-License-Identifier: Apache-2.0
"""What a metric is made of: words, supports, comparisons, calibration and proper scores, the worst tenth, samplings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom
from sklearn.metrics import roc_auc_score

from adaptclip.errors import DataError
from adaptclip.metrics import (
    GENERAL_METRICS,
    GROUP_METRICS,
    METRICS,
    OUTCOME_GROUP_METRICS,
    OUTCOME_METRICS,
    Metric,
    find_metric,
)
from adaptclip.metrics.calibration import bootstrap_sums, brier_values, confidence_bins, ece, log_loss_values
from adaptclip.metrics.estimates import Measurement, measured, variance
from adaptclip.metrics.intervals import CalibrationSpread, ScaledSpread, wilson_bound
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Drawing, Support
from adaptclip.metrics.ranking import macro_auc, mean_auc
from adaptclip.metrics.rates import (
    absent_words,
    ancestor_heights,
    classes_support,
    least_severe,
    mean_of_classes,
    top_k,
    topk_correct,
)
from adaptclip.metrics.worst_decile import ApartSpread, WorstSpread, pick_worst


def images(labels, right, sampling=None, classes=None, sure=0.9, **fields):
    """Images of which some are right; a wrong answer is the next class."""
    labels, right = np.asarray(labels, int), np.asarray(right, bool)
    classes = classes or int(labels.max()) + 1
    probs = np.full((len(labels), classes), (1 - sure) / max(classes - 1, 1), np.float32)
    probs[np.arange(len(labels)), np.where(right, labels, (labels + 1) % classes)] = sure
    return Judged(labels, probs, sampling or Sampling.of(len(labels)), **fields)


# --- what there is


def test_what_reports_show():
    assert GENERAL_METRICS == (
        "accuracy", "mean_per_class_accuracy", "top5_accuracy", "ece", "brier", "macro_auc",
    )  # fmt: skip
    assert GROUP_METRICS == ("accuracy", "mean_per_class_accuracy", "ece", "brier", "macro_auc")
    assert OUTCOME_METRICS == ("sensitivity", "specificity", "selection_rate", "auc", "ppv", "npv", "net_benefit")
    assert OUTCOME_GROUP_METRICS == ("sensitivity", "specificity", "selection_rate", "auc")
    assert find_metric("ece") is METRICS["ece"]
    assert find_metric(METRICS["ece"]) is METRICS["ece"]
    with pytest.raises(DataError, match=r"unknown metric 'ecee'. Did you mean \"ece\""):
        find_metric("ecee")


def test_facts_of_the_metrics():
    """Which way is better, on which scale, of how many classes, and of which sides."""
    assert {n for n, m in METRICS.items() if m.better == "neither"} == {"selection_rate"}
    assert {n for n, m in METRICS.items() if not m.per_cent} == {
        "brier", "macro_auc", "auc", "net_benefit", "average_precision", "outcome_brier", "labels_macro_auc",
        "labels_macro_average_precision",
    }  # fmt: skip
    scales = {n: m.scale for n, m in METRICS.items() if m.scale != (0.0, 1.0)}
    assert scales == {"brier": (0.0, 2.0), "net_benefit": (-1.0, 1.0)}
    assert {n: m.least_classes for n, m in METRICS.items() if m.least_classes > 1} == {
        "top5_accuracy": 6, "worst_decile": 2,
    }  # fmt: skip
    assert {n for n, m in METRICS.items() if m.over_classes} == {
        "mean_per_class_accuracy", "macro_f1", "macro_auc", "worst_decile",
    }  # fmt: skip
    of_outcome = {n: m.sides for n, m in METRICS.items() if m.of_outcome}
    assert of_outcome == {
        "sensitivity": (1,), "tpr": (1,), "fnr": (1,), "specificity": (0,), "fpr": (0,), "selection_rate": (),
        "auc": (1, 0), "ppv": (1, 0), "npv": (1, 0), "net_benefit": (1, 0), "average_precision": (1, 0),
        "outcome_brier": (), "outcome_ece": (),
    }  # fmt: skip
    undecided = {n for n, m in METRICS.items() if not m.decides}
    of_outcomes = {"auc", "average_precision", "outcome_brier", "outcome_ece"}
    assert undecided == {"top5_accuracy", "ece", "brier", "macro_auc", *of_outcomes}
    hubs = {n: m.hub for n, m in METRICS.items() if m.hub}
    assert hubs == {
        "accuracy": "accuracy", "mean_per_class_accuracy": "accuracy", "top5_accuracy": "accuracy", "ece": "ece",
        "brier": "brier", "macro_f1": "f1", "labels_macro_auc": "roc_auc", "labels_macro_f1": "f1",
        "subset_accuracy": "accuracy",
    }  # fmt: skip
    assert {n for n, m in METRICS.items() if m.meaning} == {
        "ppv", "npv", "net_benefit", "average_precision", "outcome_brier", "outcome_ece",
        "labels_macro_average_precision",
    }  # fmt: skip
    assert METRICS["brier"].info() == {
        "words": "Brier score", "short": "Brier", "per_cent": False, "better": "lower", "scale": [0.0, 2.0],
        "meaning": "", "hub": "brier",
    }  # fmt: skip


def test_rates_of_outcomes_count_the_images_of_their_side():
    judged = images([1] * 20 + [0] * 30, [1] * 15 + [0] * 5 + [1] * 24 + [0] * 6)
    for name, side, value in (
        ("sensitivity", 1, 0.75), ("tpr", 1, 0.75), ("fnr", 1, 0.25), ("specificity", 0, 0.8), ("fpr", 0, 0.2),
        ("selection_rate", None, 21 / 50),
    ):  # fmt: skip
        metric: Any = METRICS[name]
        number = {1: 20, 0: 30, None: 50}[side]
        about = {1: "positive ", 0: "negative ", None: ""}[side]
        assert metric.value(judged) == pytest.approx(value)
        assert metric.supports(judged) == (Support(number, f"{about}images", 30),)
        assert metric.about == about
        assert metric.values(metric.chosen(judged)).mean() == pytest.approx(value)
        assert metric.values(metric.chosen(judged)).dtype == np.float64
    accuracy: Any = METRICS["accuracy"]
    assert accuracy.values(judged).mean() == pytest.approx(39 / 50)
    assert accuracy.supports(judged) == (Support(50, "images", 100),)
    assert Support(3).least(None) == 100
    assert Support(3).least(7) == 7


def test_a_metric_of_a_function_takes_its_words_from_its_name():
    mine = Metric.of("my_own", lambda y, p: 1.5, scale=(1, 2), better="lower", per_cent=False)
    assert (mine.words, mine.short, mine.better, mine.scale, mine.per_cent) == (
        "my own",
        "my own",
        "lower",
        (1, 2),
        False,
    )
    plain = Metric.of("x", lambda y, p: 0.5, words="said")
    assert (plain.words, plain.better, plain.scale, plain.per_cent) == ("said", "higher", (0.0, 1.0), True)
    assert not plain.lower_is_better
    assert mine.lower_is_better


def test_influences_of_a_function_are_the_jackknifes():
    """Three values: leaving an image out of n moves a mean by -(x - mean) / (n - 1)."""
    rng = np.random.default_rng(0)
    labels, right = rng.integers(0, 3, 30), rng.random(30) < 0.6
    judged = images(labels, right)
    mine = Metric.of("mine", lambda y, p: float((p.argmax(1) == y).mean()))
    assert mine.estimate(judged).influence == pytest.approx((right - right.mean()) / 30)
    unit = np.repeat(np.arange(10), 3)
    clustered = images(labels, right, Sampling.of(30, unit))
    by_unit = np.bincount(unit, mine.estimate(clustered).influence)
    assert by_unit == pytest.approx(np.bincount(unit, right - right.mean()) / 30)
    found = variance(mine.estimate(clustered), clustered.sampling, 0.24)
    plain = variance(METRICS["accuracy"].estimate(clustered), clustered.sampling, 0.24)
    assert found.value == pytest.approx(plain.value)


def test_groups_of_units_are_left_out_together_and_their_squares_add_up():
    labels = np.arange(410) % 2
    right = np.random.default_rng(1).random(410) < 0.7
    calls = []

    def function(y, p):
        calls.append(len(y))
        return float((p.argmax(1) == y).mean())

    influence = Metric.of("mine", function).estimate(images(labels, right)).influence
    assert len(calls) == 201
    assert set(calls[1:]) == {407, 408}
    group = np.random.default_rng(0).permutation(410) % 200
    sums = np.bincount(group, right - right.mean()) / 410
    held = influence[np.abs(influence - influence[influence != 0].min()) >= 0]
    assert len(held) == 410
    assert (influence**2).sum() == pytest.approx((sums**2).sum(), rel=0.01)
    alone = Metric.of("mine", function).estimate(images([0], [True], classes=2))
    assert alone.influence.tolist() == [0.0]


# --- comparisons


def test_a_comparison_says_of_which_model_there_is_no_number():
    judged = images(np.arange(40) % 2, np.arange(40) % 4 > 0, sure=0.8)
    unsure = replace(judged, confident=False)
    note = "the predictions hold no probabilities"
    for metric in ("ece", "brier"):
        reason = note if metric == "ece" else "the predictions do not hold the probabilities of all classes"
        first = METRICS[metric].compare(unsure, judged)
        assert first.baseline is not None
        assert first.change is not None
        assert (first.model.value, first.model.note, first.model.n) == (None, reason, 40)
        assert first.baseline.value == METRICS[metric].value(judged)
        assert (first.change.value, first.change.note, first.change.n) == (None, reason, 40)
        second = METRICS[metric].compare(judged, unsure)
        assert second.baseline is not None
        assert second.change is not None
        assert second.model.value == METRICS[metric].value(judged)
        assert isinstance(second.model.spread, CalibrationSpread if metric == "ece" else ScaledSpread)
        assert isinstance(first.baseline.spread, CalibrationSpread if metric == "ece" else ScaledSpread)
        assert (second.baseline.value, second.baseline.note) == (None, reason)
        assert (second.change.value, second.change.note) == (None, reason)
        neither = METRICS[metric].compare(unsure, unsure)
        assert neither.change is not None
        assert (neither.model.note, neither.change.note) == (reason, reason)
        alone = METRICS[metric].compare(judged)
        assert (alone.baseline, alone.change) == (None, None)
        assert METRICS[metric].value(unsure) is None
    ranked = replace(judged, ranked=3)
    assert METRICS["brier"].value(ranked) is METRICS["macro_auc"].value(ranked) is None
    assert METRICS["ece"].value(ranked) is not None
    assert METRICS["macro_auc"].value(replace(judged, confident=False)) is None


def test_a_change_on_a_scale_of_its_own_lies_within_twice_that():
    judged = images(np.arange(4) % 2, np.ones(4), sure=0.9)
    change = METRICS["brier"].compare(judged, images(np.arange(4) % 2, np.zeros(4), sure=0.99)).change
    assert change is not None
    assert change.spread is not None
    assert change.spread.limits == (-2.0, 2.0)  # type: ignore[attr-defined]


def test_an_undecided_outcome_has_no_rate():
    judged = replace(images([0, 1, 1], [1, 1, 0]), undecided="not chosen")
    assert METRICS["sensitivity"].compare(judged).model.note == "not chosen"
    assert METRICS["auc"].value(judged) is not None


# --- calibration and proper scores


def test_a_bin_that_is_exactly_right_has_no_sign():
    judged = images(np.zeros(4, int), [1, 1, 1, 0], classes=2, sure=0.75)
    estimate = ece(judged)
    assert estimate.value == 0
    assert estimate.influence.tolist() == [0.0] * 4
    assert METRICS["brier"].missing(judged) == METRICS["ece"].missing(judged) == ""


def test_resamples_of_a_calibration_error_depend_on_draws_and_seed():
    judged = images(np.arange(40) % 2, np.arange(40) % 4 > 0, sure=0.8)
    drawn = [METRICS["ece"].compare(judged, None, Drawing(n, seed)).model.spread for n, seed in ((1000, 0), (1000, 1))]
    parts: Any = [spread.model.drawn for spread in drawn]  # type: ignore[union-attr]
    assert parts[0].shape == (1000, 15)
    assert not np.array_equal(*parts)


def test_bins_hold_their_upper_end():
    edges = np.linspace(0, 1, 16)
    assert confidence_bins(edges[1:]).tolist() == list(range(15))
    assert confidence_bins(edges[1:-1] + 1e-9).tolist() == list(range(1, 15))
    assert confidence_bins(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 4).tolist() == [0, 0, 1, 2, 3]


def test_influence_of_a_calibration_error_keeps_the_signs_of_the_bins():
    sure = np.repeat([0.55, 0.95], 20)
    right = np.concatenate([np.arange(20) < 17, np.arange(20) < 10])
    judged = images(np.zeros(40, int), right, classes=2)
    probs = np.where(right[:, None] == [True, False], sure[:, None], 1 - sure[:, None]).astype(np.float32)
    estimate = ece(replace(judged, probs=probs))
    assert estimate.value == pytest.approx((0.3 + 0.45) / 2)
    surplus = (right - sure) * np.repeat([1, -1], 20)
    assert estimate.influence == pytest.approx((surplus - surplus.mean()) / 40, abs=1e-6)


def test_a_calibration_error_of_a_group_needs_fifty_images_a_bin():
    judged = images(np.arange(99) % 2, np.arange(99) % 5 > 0, sure=0.9)
    full = Drawing(1000, 0, full_bins=True)
    assert METRICS["ece"].compare(judged, None, full).model.value is not None
    mixed = replace(judged, probs=np.where(np.arange(99)[:, None] < 50, judged.probs, 0.5).astype(np.float32))
    note = "99 images for 2 confidence bins; 50 per bin are needed"
    found = METRICS["ece"].compare(judged, mixed, full)
    assert found.baseline is not None
    assert found.change is not None
    assert found.model.spread is not None
    assert (found.baseline.value, found.baseline.note, found.change.note) == (None, note, note)
    assert METRICS["ece"].compare(mixed, judged, full).change.note == note  # type: ignore[union-attr]
    assert METRICS["ece"].compare(mixed, judged).change.value is not None  # type: ignore[union-attr]
    hundred = judged.take(np.arange(100) % 99)
    two_bins = replace(hundred, probs=np.where(np.arange(100)[:, None] < 50, hundred.probs, 0.5).astype(np.float32))
    assert METRICS["ece"].compare(two_bins, None, full).model.value is not None


def test_a_calibration_error_of_few_clusters_or_only_wrong_answers():
    judged = images(np.arange(40) % 2, np.zeros(40), sure=0.8)
    spread = METRICS["ece"].compare(judged, None, Drawing(1000)).model.spread
    assert isinstance(spread, CalibrationSpread)
    assert spread.uniform_units == 40
    some = images(np.arange(40) % 2, np.arange(40) > 0, sure=0.8)
    paired = METRICS["ece"].compare(some, judged, Drawing(1000))
    assert paired.model.spread.uniform_units == 0  # type: ignore[union-attr]
    assert paired.change.spread.uniform_units == 40  # type: ignore[union-attr]
    assert paired.change.value == pytest.approx(0.175 - 0.8, abs=1e-6)  # type: ignore[union-attr]
    few = replace(judged, sampling=Sampling.of(40, np.arange(40) % 7))
    part = METRICS["ece"].compare(few).model
    assert (part.value, part.spread) == (pytest.approx(0.8), None)
    assert part.note == "no interval: 7 clusters, and at least 8 are needed"
    alone = images([0, 1, 2], [1, 0, 1], sampling=Sampling.of(3, None, np.arange(3)))
    assert METRICS["ece"].compare(alone, None, Drawing(1000)).model.spread is not None
    # Two classes of one image each are one stratum of two units; a single image has no interval.
    assert METRICS["ece"].compare(images([0], [1], classes=2)).model.spread is None


def test_proper_scores_of_certain_and_impossible_answers():
    probs = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.25, 0.25]], np.float32)
    assert brier_values(probs, np.zeros(3, int)) == pytest.approx([0, 2, 0.375])
    assert log_loss_values(probs, np.zeros(3, int)) == pytest.approx([0, -np.log(np.finfo(np.float32).tiny), np.log(2)])


# --- ranking


def test_a_mean_area_leaves_out_classes_without_either_side():
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(4), 40).round(1), rng.integers(0, 3, 40)
    found = macro_auc(probs, labels)
    assert found is not None
    assert found.value == pytest.approx(np.mean([roc_auc_score(labels == c, probs[:, c]) for c in range(3)]))
    marked = rng.random((40, 4)) < 0.5
    marked[:, 0], marked[:, 1] = True, False
    some = mean_auc(probs, marked)
    assert some is not None
    assert some.value == pytest.approx(np.mean([roc_auc_score(marked[:, c], probs[:, c]) for c in (2, 3)]))
    assert mean_auc(probs[:, :2], marked[:, :2]) is None


def test_one_positive_image_leaves_an_area_uncertain():
    labels = np.array([1] + [0] * 20)
    score = np.linspace(1, 0, 21)
    judged = Judged(labels, np.stack([1 - score, score], axis=1), Sampling.of(21))
    estimate = METRICS["auc"].estimate(judged)
    assert (estimate.value, estimate.least) == (1.0, 0.0)
    middling = Judged(labels[::-1].copy(), judged.probs, judged.sampling)
    assert METRICS["auc"].estimate(middling).value == 0.0
    tied = Judged(labels, np.full((21, 2), 0.5), Sampling.of(21))
    half = METRICS["auc"].estimate(tied)
    q = 0.5 / 1.5 - 0.25
    assert (half.value, half.least) == pytest.approx((0.5, 2 * (0.25 + 19 * q) / 20 / 2**2))
    assert half.note == ""
    three = images([0, 0, 1, 1], [1, 1, 0, 1], classes=3)
    assert METRICS["macro_auc"].compare(three).model.note.startswith("1 of 3 classes has no images here")
    assert METRICS["macro_auc"].supports(three) == classes_support(three)
    assert METRICS["auc"].compare(images([0, 0], [1, 0], classes=2)).model.note == "AUC needs images of two classes"


# --- classes


def test_what_means_over_classes_rest_on():
    judged = images(np.repeat([0, 1, 2], [4, 12, 24]), np.ones(40), classes=4)
    worth = int(9 / (1 / 4 + 1 / 12 + 1 / 24))
    for name in ("mean_per_class_accuracy", "macro_f1", "macro_auc", "worst_decile"):
        assert METRICS[name].supports(judged) == (
            Support(worth, "evenly spread images", 100), Support(0, "images of the smallest class", 10),
        )  # fmt: skip
    everywhere = images(np.repeat([0, 1, 2], [4, 12, 24]), np.ones(40))
    assert classes_support(everywhere)[1].count == 4
    assert absent_words(everywhere) == ""
    assert absent_words(judged) == "1 of 4 classes has no images here and is left out of the mean"
    nothing = everywhere.take(np.zeros(0, int))
    assert [support.count for support in classes_support(nothing)] == [0, 0]
    no_classes = Judged(np.zeros(0, int), np.zeros((0, 0)), Sampling.of(0))
    assert [support.count for support in classes_support(no_classes)] == [0, 0]
    assert mean_of_classes(judged).shares == pytest.approx(np.repeat([1 / 12, 1 / 36, 1 / 72], [4, 12, 24]))


def test_top_k_needs_more_than_k_classes_and_ranks_as_deep():
    judged = images(np.arange(12) % 3, np.ones(12))
    assert top_k(2).value(judged) == 1
    assert top_k(2).missing(judged) == ""
    assert top_k(3).compare(judged).model.note == "top-3 accuracy says nothing about 3 classes"
    assert top_k(2).value(replace(judged, ranked=2)) == 1
    assert top_k(2).compare(replace(judged, ranked=1)).model.note == "the predictions rank only 1 of the classes"
    assert (top_k(2).name, top_k(2).words, top_k(2).least_classes) == ("top2_accuracy", "top-2 accuracy", 3)
    probs = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]])
    assert topk_correct(probs, np.array([1, 2, 1]), 1).tolist() == [False, False, False]
    assert topk_correct(probs, np.array([1, 2, 1]), 2).tolist() == [True, True, False]


# --- the worst tenth


def test_the_worst_tenth_is_picked_among_classes_of_ten_images():
    sizes, rights = [10, 9, 20, 20, 20], [9, 0, 10, 12, 20]
    labels = np.repeat(np.arange(5), sizes)
    judged = images(labels, np.concatenate([np.arange(n) < k for n, k in zip(sizes, rights, strict=True)]))
    found = pick_worst(judged)
    assert (found.of.tolist(), found.classes.tolist(), found.accuracy) == ([0, 2, 3, 4], [2], 0.5)
    many = images(np.repeat(np.arange(25), 10), np.concatenate([np.arange(10) < c % 10 for c in range(25)]))
    assert pick_worst(many).classes.tolist() == [0, 10]
    assert METRICS["worst_decile"].compare(images(np.repeat([0, 1], [10, 9]), np.ones(19))).model.note == (
        "fewer than two classes have at least 10 images"
    )
    one = pick_worst(images(np.repeat([0, 1], [10, 9]), np.ones(19)))
    assert (one.of.tolist(), one.classes.tolist(), one.accuracy) == ([0], [], None)


def test_the_worst_tenth_is_judged_on_the_other_half():
    """Two classes, one all wrong and one all right: whichever half picks, it is the wrong one."""
    labels = np.repeat([0, 1], 20)
    judged = images(labels, labels == 1)
    part = METRICS["worst_decile"].compare(judged).model
    assert (part.value, part.n) == (0.0, 20)
    assert part.note == "picked on one random half and judged on the other; mean of 100 halvings"
    assert isinstance(part.spread, WorstSpread)
    assert part.bound("low", 0.05) == 0.0
    assert part.bound("high", 0.05) == pytest.approx(wilson_bound(0.0, 10, "high", 0.05), rel=0.2)
    equal = images(np.repeat([0, 1], 20), np.tile(np.arange(20) < 10, 2))
    value = METRICS["worst_decile"].value(equal)
    # Each half has h right of 10 (hypergeometric); the class with fewer is picked and has 10 - h right in the other.
    h = np.arange(11)
    chance = np.outer(*(hypergeom.pmf(h, 20, 10, 10),) * 2)
    fewer = np.minimum.outer(h, h)
    assert value == pytest.approx(float((chance * (10 - fewer)).sum()) / 10, abs=0.04)
    clustered = replace(equal, sampling=Sampling.of(40, np.repeat(np.arange(20), 2)))
    again = METRICS["worst_decile"].value(clustered)
    assert again is not None
    assert 0.4 < again < 0.7


def test_a_worst_tenth_of_few_patients_has_a_value_and_no_interval():
    """One patient a class: no half holds images of either class beside the other half, so all of them are taken."""
    labels = np.repeat([0, 1], 12)
    right = np.concatenate([np.arange(12) < 9, np.arange(12) < 2])
    judged = images(labels, right, Sampling.of(24, labels))
    part = METRICS["worst_decile"].compare(judged).model
    assert part.value == pytest.approx(11 / 24)
    assert part.spread is None
    assert part.note.endswith("halvings; no interval: 1 cluster, and at least 8 are needed")
    whole = images(labels, right)
    for paired in (METRICS["worst_decile"].compare(whole, judged), METRICS["worst_decile"].compare(judged, whole)):
        assert paired.change is not None
        assert paired.change.spread is None
    last_all_wrong = images(np.repeat([0, 1], 20), np.arange(40) < 20)
    assert METRICS["worst_decile"].value(last_all_wrong) == 0
    assert METRICS["worst_decile"].missing(last_all_wrong) == ""
    patients = replace(last_all_wrong, sampling=Sampling.of(40, np.arange(40) % 10))
    assert METRICS["worst_decile"].value(patients) == 0


def test_the_upper_bound_of_the_worst_tenth_has_the_images_of_one_half():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    judged = images(labels, rng.random(120) < np.array([0.5, 0.8, 0.9, 0.9])[labels])
    part = METRICS["worst_decile"].compare(judged).model
    assert isinstance(part.spread, WorstSpread)
    low: Any = part.spread.low
    high: Any = part.spread.high
    picked = judged.take(np.flatnonzero(labels == 0))
    assert low == measured(mean_of_classes(picked), Sampling.of(30)).spread
    assert (high.rate, high.cap) == (part.value, 15.0)
    assert (high.size, high.df) == pytest.approx((min(low.size, 30) / 2, max(low.df / 2, 0.5)))
    influence = METRICS["worst_decile"].estimate(judged).influence
    assert influence == pytest.approx(np.where(labels == 0, (judged.right - judged.right[labels == 0].mean()) / 30, 0))
    paired = METRICS["worst_decile"].compare(judged, judged).change
    assert paired is not None
    assert (paired.value, paired.note, paired.n) == (0.0, "each model has a worst tenth of its own", 30)
    assert isinstance(paired.spread, ApartSpread)


# --- samplings


def test_samplings_of_no_images_and_of_slices():
    nothing = Sampling.of(0)
    assert (nothing.num_units, nothing.clustered, len(nothing.strata)) == (0, False, 0)
    clustered = Sampling.of(5, ["b", "a", "b", "c", "c"], np.array([0, 1, 0, 1, 1]))
    assert clustered.unit.tolist() == [1, 0, 1, 2, 2]
    assert (clustered.num_units, clustered.clustered) == (3, True)
    assert clustered.take(slice(None)) is clustered
    part = clustered.take(slice(2, 5))
    assert (part.unit.tolist(), part.stratum.tolist()) == ([0, 1, 1], [0, 1, 1])  # type: ignore[union-attr]
    assert Sampling.of(3).take(np.array([2, 0])).unit.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "strata"),
    [([0, 0, 1], [0, 0, 0]), ([0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]), ([0, 1], [0, 0]), ([0], [0]),
     ([0, 0, 1, 2], [0, 0, 1, 1]), ([3, 3, 5, 5], [0, 0, 1, 1])],
)  # fmt: skip
def test_classes_of_a_single_unit_join_others(labels, strata):
    assert Sampling.of(len(labels), None, np.array(labels)).strata.tolist() == strata


def test_sums_drawn_from_the_normal_distribution_have_the_strata_s_covariance(monkeypatch):
    rng = np.random.default_rng(0)
    labels, values = np.repeat([0, 1], [6, 9]), rng.normal(size=15) + 1
    cell = np.arange(15) % 2
    sampling = Sampling.of(15, None, labels)
    monkeypatch.setattr("adaptclip.metrics.calibration.NORMAL_UNITS", 14)
    [drawn] = bootstrap_sums([(values, cell, 2)], sampling, draws=20_000)
    expected = np.zeros((2, 2))
    for c in (0, 1):
        table = np.stack([np.where(cell == k, values, 0)[labels == c] for k in (0, 1)])
        expected += np.cov(table) * table.shape[1]
    assert np.cov(drawn.T) == pytest.approx(expected / 15**2, rel=0.04, abs=2e-4)
    assert drawn.mean(axis=0) == pytest.approx([values[cell == k].sum() / 15 for k in (0, 1)], abs=0.01)
    monkeypatch.setattr("adaptclip.metrics.calibration.NORMAL_UNITS", 15)
    [plain] = bootstrap_sums([(values, cell, 2)], sampling, draws=4000)
    assert np.cov(plain.T) == pytest.approx(expected / 15**2, rel=0.1, abs=2e-3)
    assert len(np.unique(drawn[:, 0])) == 20_000


def test_random_sizes_of_clusters_divide_the_sums():
    """A share of images: its denominator is drawn with the patients."""
    unit = np.repeat(np.arange(30), np.arange(1, 31))
    hits = unit % 2 == 0
    parts = (hits.astype(float), np.zeros(len(unit), int), 1)
    [drawn] = bootstrap_sums([parts], Sampling.of(len(unit), unit), draws=3000)
    without = np.array([hits[unit != u].mean() for u in range(30)])
    jackknife = 29 / 30 * ((without - without.mean()) ** 2).sum()
    assert drawn.var() == pytest.approx(jackknife, rel=0.15)


# --- taxonomies


def test_heights_of_ancestors():
    levels = {"coarse": ["x", "x", "x", "y"], "fine": ["a", "a", "b", "a"]}
    assert ancestor_heights(levels, 4).tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 2, 0, 3], [3, 3, 3, 0]]
    assert ancestor_heights({}, 2).tolist() == [[0, 1], [1, 0]]
    heights = ancestor_heights(levels, 4)
    assert least_severe(np.array([[0.3, 0.0, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0]]), heights).tolist() == [0, 3]
    assert least_severe(np.array([[0.5, 0.5, 0.0, 0.0]]), heights).tolist() == [0]


def test_measurements_without_an_interval_have_no_bounds():
    silent = Measurement(0.5, 3)
    assert (silent.interval(0.95), silent.bound("low", 0.05), silent.note) == (None, None, "")
