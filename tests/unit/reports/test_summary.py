# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.metrics import GENERAL_METRICS
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report


def predictions(seed=0, *, n=240, num_classes=6, skill=2.0, **fields: Any):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, n)
    scores = np.random.default_rng(seed).normal(size=(n, num_classes))
    scores[np.arange(n), labels] += skill
    odds = np.exp(scores)
    probs = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    groups = {"sex": tuple(rng.choice(["f", "m", "unknown"], n)), "age": tuple(rng.choice(["0-40", "40+"], n))}
    names = tuple(f"c{i}" for i in range(num_classes))
    return Predictions(**({"ids": tuple(f"i{k}" for k in range(n)), "labels": labels, "probs": probs,
                           "class_names": names, "groups": groups} | fields))  # fmt: skip


def numbers(node, path=""):
    """Yields every number dict of a report."""
    if isinstance(node, dict):
        if "low" in node and "value" in node:
            yield path, node
        for key, value in node.items():
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from numbers(value, f"{path}/{i}")


def test_every_number_has_an_n_and_an_interval_or_a_reason():
    report = build_report(predictions(), predictions(1, skill=1.0))
    json.dumps(report, allow_nan=False)
    found = dict(numbers(report))
    assert len(found) > 50
    for path, number in found.items():
        assert number["n"] > 0, path
        if number["low"] is None:
            assert number["note"], path
        else:
            assert number["low"] <= number["value"] <= number["high"], path
            assert number["method"], path


def test_shape_of_the_report():
    report = build_report(predictions(), predictions(1, skill=1.0), confidence=0.9)
    assert tuple(report["overall"]) == GENERAL_METRICS
    assert set(report["overall"]["ece"]) == {"model", "zero_shot", "change"}
    assert [row["class"] for row in report["per_class"]] == [f"c{i}" for i in range(6)]
    assert sum(row["n"] for row in report["per_class"]) == report["num_images"] == 240
    assert list(report["groups"]) == ["sex", "age"]
    assert report["confidence"] == 0.9
    assert report["cautions"] == []


def test_per_class_accuracies_average_to_the_mean_per_class():
    report = build_report(predictions())
    mean = np.mean([row["accuracy"]["value"] for row in report["per_class"]])
    assert report["overall"]["mean_per_class_accuracy"]["model"]["value"] == pytest.approx(mean)
    assert report["overall"]["accuracy"]["zero_shot"] is None


def test_classes_with_few_or_no_images_are_marked():
    whole = predictions()
    keep = np.flatnonzero((whole.labels != 4) & ((whole.labels != 2) | (np.cumsum(whole.labels == 2) <= 9)))
    part = predictions(
        ids=tuple(whole.ids[i] for i in keep), labels=whole.labels[keep], probs=whole.probs[keep], groups={}
    )
    report = build_report(part)
    by_class = {row["class"]: row for row in report["per_class"]}
    assert (by_class["c2"]["n"], by_class["c2"]["sufficient"]) == (9, False)
    assert by_class["c1"]["sufficient"]
    assert by_class["c4"]["accuracy"]["value"] is None
    assert by_class["c4"]["accuracy"]["note"] == "no images"
    assert report["absent_classes"] == ["c4"]
    assert any("1 of 6 classes has no test images" in caution for caution in report["cautions"])
    assert any("without group columns" in caution for caution in report["cautions"])


def test_the_last_class_may_be_the_absent_one():
    whole = predictions()
    names = (*whole.class_names, "never")
    probs = np.pad(whole.probs, ((0, 0), (0, 1)))
    report = build_report(predictions(class_names=names, probs=probs))
    assert report["absent_classes"] == ["never"]
    assert [row["n"] for row in report["per_class"]][-1] == 0


def test_deterministic_and_the_baseline_may_come_in_any_order():
    model, base = predictions(), predictions(1, skill=1.0)
    turned = Predictions(base.ids[::-1], base.labels[::-1], base.probs[::-1], base.class_names)
    assert build_report(model, base) == build_report(model, turned)


def test_clusters_are_said_and_used():
    clusters = tuple(f"p{i // 4}" for i in range(240))
    report = build_report(predictions(clusters=clusters))
    assert report["num_clusters"] == 60
    assert "effective n" in report["overall"]["accuracy"]["model"]["method"]
    assert any("60 clusters" in caution for caution in report["cautions"])


def test_bad_input():
    model = predictions()
    with pytest.raises(DataError, match=r'unknown group attribute "?\'?sx.*Did you mean "sex"'):
        build_report(model, groups=["sx"])
    with pytest.raises(DataError, match="confidence must lie within"):
        build_report(model, confidence=95)
    empty = predictions(ids=(), labels=np.zeros(0, int), probs=np.zeros((0, 6), np.float32), groups={})
    with pytest.raises(DataError, match="no rows"):
        build_report(empty)
