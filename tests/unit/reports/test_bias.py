# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from adaptclip.errors import DataError
from adaptclip.predictions import Predictions
from adaptclip.reports.bias import group_table


def judged(right_by_group, *, labels=None, num_classes=4):
    """Predictions with given numbers of (right, all) images per group of the attribute "site"."""
    sites = [site for site, (_, n) in right_by_group.items() for _ in range(n)]
    right = np.array([i < k for k, n in right_by_group.values() for i in range(n)])
    labels = np.arange(len(sites)) % num_classes if labels is None else np.asarray(labels)
    probs = np.full((len(sites), num_classes), 0.1 / (num_classes - 1), np.float32)
    probs[np.arange(len(sites)), np.where(right, labels, (labels + 1) % num_classes)] = 0.9
    ids = tuple(map(str, range(len(sites))))
    return Predictions(ids, labels, probs, tuple(f"c{i}" for i in range(num_classes)), {"site": tuple(sites)})


def test_rows_hold_counts_accuracies_and_intervals():
    table = group_table(judged({"b": (90, 120), "a": (100, 200), "unknown": (3, 3)}), None, "site")
    assert [(row["group"], row["n"]) for row in table["rows"]] == [("a", 200), ("b", 120), ("unknown", 3)]
    for row, right in zip(table["rows"], (100, 90, 3), strict=True):
        cell = row["accuracy"]["model"]
        assert cell["value"] == right / row["n"]
        expected = binomtest(right, row["n"]).proportion_ci(0.95, method="wilson")
        assert (cell["low"], cell["high"]) == pytest.approx((expected.low, expected.high))
        assert row["accuracy"]["zero_shot"] is row["accuracy"]["change"] is None
    json.dumps(table, allow_nan=False)


def test_worst_group_and_gap_are_named_with_cautions():
    table = group_table(judged({"b": (90, 120), "a": (100, 200), "c": (30, 40), "unknown": (3, 3)}), None, "site")
    assert table["worst_group"]["group"] == "a"
    gap = table["gap"]
    assert gap["value"] == pytest.approx(0.25)
    assert (gap["best_group"], gap["worst_group"], gap["left_out"]) == ("b", "a", ["unknown"])
    assert gap["n"] == 360
    assert "max-min" in gap["definition"]
    assert "noise alone" in gap["note"]
    assert table["cautions"] == [
        "groups of fewer than 30 images take no part in gaps and tests, and no gate can decide on them: unknown (3)",
        "groups of fewer than 100 images say little: c (40)",
    ]


def test_change_is_paired_within_the_group():
    model, base = judged({"a": (80, 100), "b": (50, 100)}), judged({"a": (60, 100), "b": (50, 100)})
    rows = {row["group"]: row["accuracy"]["change"] for row in group_table(model, base, "site")["rows"]}
    assert rows["a"]["value"] == pytest.approx(0.2)
    assert rows["a"]["low"] > 0
    assert rows["b"]["value"] == 0
    assert rows["b"]["low"] < 0 < rows["b"]["high"]


def test_mean_per_class_is_over_the_classes_present():
    labels = [0, 0, 0, 1, 2, 2]
    table = group_table(judged({"a": (2, 4), "b": (2, 2)}, labels=labels), None, "site")
    first, second = table["rows"]
    assert first["classes_present"] == 2
    assert first["mean_per_class_accuracy"]["model"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert second["classes_present"] == 1
    assert "3 of 4 classes" in second["mean_per_class_accuracy"]["model"]["note"]


def test_calibration_of_small_groups_is_left_out_with_the_reason():
    few, many = group_table(judged({"a": (20, 30), "b": (50, 60)}), None, "site")["rows"]
    assert few["ece"]["model"]["value"] is None
    assert "50 per bin" in few["ece"]["model"]["note"]
    assert many["ece"]["model"]["value"] == pytest.approx(abs(50 / 60 - 0.9), abs=1e-6)


def test_a_single_group_leaves_nothing_to_compare():
    table = group_table(judged({"a": (20, 30)}), None, "site")
    assert table["cautions"] == ["site has 1 group(s): there is nothing to compare"]
    assert table["gap"] is None


def test_unknown_attribute():
    with pytest.raises(DataError, match=r'Did you mean "site"'):
        group_table(judged({"a": (1, 2)}), None, "sites")
