# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from adaptclip.errors import DataError
from adaptclip.metrics import GENERAL_METRICS, METRICS
from adaptclip.metrics.intervals import tango_bound, wilson
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import align, group_rows, measure
from adaptclip.reports.measuring import judged as images_of


def judged(labels, right, num_classes=8, *, confidence=0.9, groups=None, clusters=None, prefix="i"):
    """Predictions that are right where asked, and otherwise say the next class, with one confidence."""
    labels, right = np.asarray(labels), np.asarray(right, bool)
    probs = np.full((len(labels), num_classes), (1 - confidence) / (num_classes - 1), np.float32)
    probs[np.arange(len(labels)), np.where(right, labels, (labels + 1) % num_classes)] = confidence
    ids = tuple(f"{prefix}{i}" for i in range(len(labels)))
    names = tuple(f"c{i}" for i in range(num_classes))
    return Predictions(ids, labels, probs, names, groups or {}, clusters)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 25)
    return judged(labels, rng.random(200) < 0.8), judged(labels, rng.random(200) < 0.6, confidence=0.7)


def test_values_are_those_of_the_metrics(pair):
    measured = measure(*pair)
    for metric in GENERAL_METRICS:
        model, base = (METRICS[metric].value(images_of(p)) or np.nan for p in pair)
        compared = measured[metric]
        assert compared.baseline is not None
        assert compared.change is not None
        assert (compared.model.value, compared.baseline.value) == (model, base)
        assert compared.change.value == pytest.approx(model - base)
        for part in (compared.model, compared.baseline, compared.change):
            assert part.value is not None
            low, high = part.interval(0.95) or (np.nan, np.nan)
            assert low <= part.value <= high
            assert part.n == 200


def test_independent_accuracy_is_wilsons_and_its_change_tangos(pair):
    compared = measure(*pair, metrics=("accuracy",))["accuracy"]
    now, before = ((p.pred == p.labels) for p in pair)
    assert compared.model.interval(0.9) == pytest.approx(wilson(int(now.sum()), 200, 0.9))
    gained, lost = float((now & ~before).mean()), float((before & ~now).mean())
    expected = tuple(tango_bound(gained, lost, 200, side, 0.05) for side in ("low", "high"))
    assert compared.change is not None
    assert compared.change.interval(0.9) == pytest.approx(expected)


def test_same_seed_same_interval_and_rows_select(pair):
    one, two = (measure(*pair, seed=5)["ece"].model.interval(0.95) for _ in range(2))
    assert one == two
    rows = np.flatnonzero(pair[0].labels < 2)
    part = measure(pair[0], rows=rows)["mean_per_class_accuracy"].model
    assert part.n == 50
    assert "6 of 8 classes have no images" in part.note


def test_mean_per_class_of_equal_classes_is_as_sure_as_the_accuracy(pair):
    measured = measure(pair[0])
    low, high = measured["mean_per_class_accuracy"].model.interval(0.95) or (0, 0)
    plain = measured["accuracy"].model.interval(0.95) or (0, 0)
    assert high - low == pytest.approx(plain[1] - plain[0], rel=0.1)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_all_right_and_all_wrong_give_honest_intervals(n, right):
    labels = np.arange(n) % 8
    model = judged(labels, np.full(n, right), confidence=0.999)
    for compared in measure(model, model).values():
        for part in (compared.model, compared.change):
            assert part is not None
            bounds = part.interval(0.95)
            if bounds is None:
                assert n == 1
                assert "single image" in part.note or "two classes" in part.note
            else:
                # 3/n: what n images without a surprise cannot exclude.
                assert np.isfinite(bounds).all()
                assert bounds[1] - bounds[0] > 2 / (n + 4)


def test_no_images_no_number():
    for compared in measure(judged([0], [True]), judged([0], [True]), rows=np.zeros(0, int)).values():
        assert compared.model.value is None
        assert compared.model.note == "no images"
        assert compared.change is not None
        assert compared.change.interval(0.95) is None


def test_few_clusters_give_no_interval_but_a_reason():
    labels = np.arange(40) % 8
    few = judged(labels, np.ones(40), clusters=tuple(f"p{i % 7}" for i in range(40)))
    for compared in measure(few, few).values():
        assert compared.model.value is not None
        assert compared.model.interval(0.95) is None
        assert "7 clusters, and at least 8 are needed" in compared.model.note
    one = judged(labels, np.ones(40), clusters=("p",) * 40)
    assert "1 cluster, and" in measure(one)["accuracy"].model.note


def test_clusters_widen_and_uniform_clusters_count_as_one_image_each():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 5)
    right = (rng.random(40) < 0.7)[patient]
    labels = patient % 8
    alone = measure(judged(labels, right))["accuracy"].model.interval(0.95) or (0, 0)
    whole = measure(judged(labels, right, clusters=tuple(map(str, patient))))["accuracy"].model.interval(0.95) or (0, 0)
    assert 1.8 < (whole[1] - whole[0]) / (alone[1] - alone[0]) < 2.9
    perfect = judged(labels, np.ones(200), clusters=tuple(map(str, patient)))
    assert measure(perfect)["accuracy"].model.interval(0.95) == pytest.approx(wilson(40, 40))


def test_thin_bins_leave_a_groups_calibration_out():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 60)
    one_bin = judged(labels, np.ones(60))
    assert measure(one_bin, full_bins=True)["ece"].model.value is not None
    short = measure(one_bin, rows=np.arange(49), full_bins=True)["ece"].model
    assert short.value is None
    assert "49 images for 1 confidence bins; 50 per bin" in short.note


def test_top5_of_five_classes_is_not_given():
    part = measure(judged([0, 1], [True, False], num_classes=5))["top5_accuracy"].model
    assert part.value is None
    assert "says nothing about 5 classes" in part.note


def test_unknown_metric_names_the_nearest():
    with pytest.raises(DataError, match=r'Did you mean "accuracy"\?'):
        measure(judged([0], [True]), metrics=("acuracy",))


def test_align_reorders_the_baseline():
    model = judged([0, 1, 2], [True, True, False])
    shuffled = judged([2, 0, 1], [True, False, True])
    other = Predictions(("i2", "i0", "i1"), shuffled.labels, shuffled.probs, shuffled.class_names)
    aligned = align(model, other)
    assert aligned.ids == model.ids
    assert (aligned.pred == aligned.labels).tolist() == [False, True, True]


def test_align_refuses_other_images_labels_or_classes():
    model = judged([0, 1], [True, True])
    with pytest.raises(DataError, match="same images: 2 of 2 are missing"):
        align(model, judged([0, 1], [True, True], prefix="j"))
    with pytest.raises(DataError, match="same images: 0 of 2 are missing from the baseline, which has 3"):
        align(model, judged([0, 1, 2], [True, True, True]))
    with pytest.raises(DataError, match="1 images have another label"):
        align(model, judged([0, 2], [True, True]))
    with pytest.raises(DataError, match="different class names"):
        align(model, judged([0, 1], [True, True], num_classes=9))


def test_group_rows_keep_unknown_as_a_group():
    model = judged([0, 1, 2], [1, 1, 1], groups={"sex": ("f", "unknown", "f")})
    assert {name: rows.tolist() for name, rows in group_rows(model, "sex").items()} == {"f": [0, 2], "unknown": [1]}
    with pytest.raises(DataError, match=r"no group attribute 'sxe'.*\"sex\""):
        group_rows(model, "sxe")
    with pytest.raises(DataError, match="no group columns at all"):
        group_rows(judged([0], [True]), "sex")


def test_mean_per_class_bound_misses_at_most_as_often_as_stated_with_two_images_a_class():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 2)
    truths = np.where(np.arange(20) < 10, 0.6, 0.9)
    missed = 0
    for seed in range(120):
        model = judged(labels, rng.random(40) < truths[labels], num_classes=20)
        part = measure(model, metrics=("mean_per_class_accuracy",), draws=1000, seed=seed)["mean_per_class_accuracy"]
        missed += (part.model.bound("low", 0.1) or 0) > truths.mean()
    assert missed <= binom.isf(0.001, 120, 0.1)


def test_crossed_groups_whose_names_hold_commas_stay_apart():
    groups = {"a": ("x, y", "x", "x, y", "x"), "b": ("z", "y, z", "z", "y, z")}
    found = group_rows(judged(np.zeros(4, int), np.ones(4), groups=groups), "a × b")
    assert {name: rows.tolist() for name, rows in found.items()} == {"x × y, z": [1, 3], "x, y × z": [0, 2]}
