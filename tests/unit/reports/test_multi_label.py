# SPDX-License-Identifier: Apache-2.0
"""The report on single classes against scikit-learn and resampling, and its way through files and renderings."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    hamming_loss,
    jaccard_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from adaptclip.errors import DataError
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.metrics import METRICS
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.several_labels import RATES
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report
from adaptclip.reports.measuring import align, coarsen, judged
from adaptclip.reports.multi_label import how_chosen, multi_label_report, summary
from adaptclip.reports.render import to_html, to_markdown
from adaptclip.training.thresholds import Thresholds

NAMES = ("ant", "bee", "cod", "doe")


def predictions(n: int = 240, seed: int = 0, **fields: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    logits = rng.normal(size=(n, 4)) - 1
    logits[np.arange(n), labels] += 2
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given: dict[str, Any] = {
        "ids": tuple(map(str, range(n))), "labels": labels, "probs": probs.astype(np.float32), "class_names": NAMES,
        "groups": {"site": tuple(np.where(rng.random(n) < 0.4, "north", "south").tolist())},
        "levels": {"kind": ("insect", "insect", "fish", "mammal")},
        "sigmoid": (1 / (1 + np.exp(-logits))).astype(np.float32),
    }  # fmt: skip
    return Predictions(**(given | fields))


def sigmoid_of(p: Predictions) -> np.ndarray:
    assert p.sigmoid is not None
    return p.sigmoid


def thresholds(values: tuple[float, ...] = (0.4, 0.5, 0.6, 0.3), **fields: Any) -> Thresholds:
    given: dict[str, Any] = {"rule": "f1", "num_images": 16, "positives": np.full(len(values), 4)}
    return Thresholds(values=np.array(values), **(given | fields))


def judged_with(p: Predictions, t: Thresholds) -> Judged:
    return judged(replace(p, thresholds=t.values))


def test_the_numbers_are_scikit_learns():
    p, t = predictions(), thresholds()
    report = multi_label_report(p, t, ["site"])
    assert p.sigmoid is not None
    positive, said = p.labels[:, None] == np.arange(4), p.sigmoid >= t.values
    for average, part in (("macro", report["macro"]), ("micro", report["micro"])):
        precision, recall, f1, _ = precision_recall_fscore_support(positive, said, average=average)
        expected = {"precision": precision, "sensitivity": recall, "f1": f1}
        assert {key: part[key]["value"] for key in expected} == pytest.approx(expected)
    assert report["micro"]["specificity"]["value"] == pytest.approx((~said[~positive]).mean())
    assert report["macro"]["auc"]["value"] == pytest.approx(roc_auc_score(positive, p.sigmoid, average="macro"))
    by_class: Any = precision_recall_fscore_support(positive, said, average=None)
    for c, row in enumerate(report["per_class"]):
        found = [row[key]["value"] for key in ("precision", "sensitivity", "f1")]
        assert found == pytest.approx([float(values[c]) for values in by_class[:3]])
        assert (row["class"], row["num_positive"], row["threshold"]) == (NAMES[c], positive[:, c].sum(), t.values[c])
        assert row["auc"]["value"] == pytest.approx(roc_auc_score(positive[:, c], p.sigmoid[:, c]))
        area = average_precision_score(positive[:, c], p.sigmoid[:, c])
        assert row["average_precision"]["value"] == pytest.approx(area)
        assert (row["sensitivity"]["n"], row["specificity"]["n"]) == (positive[:, c].sum(), (~positive[:, c]).sum())
        for key in ("auc", "average_precision", *RATES):
            assert row[key]["low"] < row[key]["value"] < row[key]["high"]
    assert report["exact"]["value"] == pytest.approx((positive == said).all(1).mean())
    assert report["unnamed"]["value"] == pytest.approx((~said.any(1)).mean())
    assert report["labels_per_image"] == pytest.approx(said.sum(1).mean())
    for row in report["groups"]["site"]:
        own = np.array(p.groups["site"]) == row["group"]
        _, recall, _, _ = precision_recall_fscore_support(positive[own], said[own], average="macro")
        assert row["sensitivity"]["value"] == pytest.approx(recall)
        of_others = [(~said[own & ~positive[:, c], c]).mean() for c in range(4)]
        assert row["specificity"]["value"] == pytest.approx(np.mean(of_others))
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_are_as_wide_as_resampling_says(clustered):
    p, t = predictions(400, seed=1), thresholds()
    unit = np.arange(400) // 5 if clustered else None
    images = replace(judged_with(p, t), sampling=Sampling.of(400, unit))
    blocks = np.arange(400).reshape(-1, 5 if clustered else 1)
    rng = np.random.default_rng(0)
    names = [f"labels_macro_{rate}" for rate in RATES]
    names += ["labels_micro_f1", "labels_macro_auc", "subset_accuracy", "hamming_loss", "example_f1", "example_jaccard"]
    plain = replace(images, sampling=Sampling.of(400))
    for name in names:
        metric: Any = METRICS[name]
        drawn = [
            metric.value(plain.take(blocks[rng.integers(0, len(blocks), len(blocks))].ravel())) for _ in range(400)
        ]
        low, high = metric.compare(images).model.interval(0.95)
        ratio = (high - low) / (2 * 1.96 * np.std(drawn))
        # A mean AUC is never surer than by Hanley and McNeil, as elsewhere in a report.
        assert 0.85 < ratio < (1.5 if name == "labels_macro_auc" else 1.17), name


def several(n: int = 300, seed: int = 0) -> Predictions:
    """Images with none to four classes, and a model that knows something of each."""
    rng = np.random.default_rng(seed)
    positive = rng.random((n, 4)) < [0.5, 0.3, 0.2, 0.1]
    sigmoid = np.clip(rng.beta(2, 3, (n, 4)) + 0.3 * positive, 0, 1).astype(np.float32)
    probs = np.full((n, 4), 0.25, np.float32)
    return Predictions(
        tuple(map(str, range(n))), positive.argmax(axis=1), probs, NAMES, sigmoid=sigmoid, positive=positive,
        thresholds=np.array([0.5, 0.6, 0.5, 0.55]),
    )  # fmt: skip


def test_sets_of_classes_are_measured_as_scikit_learn_does():
    p = several()
    assert p.positive is not None
    assert p.thresholds is not None
    said = sigmoid_of(p) >= p.thresholds
    assert (p.positive.sum(axis=1) == 0).any()
    found = {name: metric.value(judged(p)) for name, metric in METRICS.items() if metric.of_labels}
    precision, recall, f1, _ = precision_recall_fscore_support(p.positive, said, average="macro")
    one: Any = 1
    micro = precision_recall_fscore_support(p.positive, said, average="micro")
    expected = {
        "subset_accuracy": accuracy_score(p.positive, said),
        "hamming_loss": hamming_loss(p.positive, said),
        "example_jaccard": jaccard_score(p.positive, said, average="samples", zero_division=one),
        "example_f1": f1_score(p.positive, said, average="samples", zero_division=one),
        "labels_macro_precision": precision, "labels_macro_sensitivity": recall, "labels_macro_f1": f1,
        "labels_micro_precision": micro[0], "labels_micro_sensitivity": micro[1], "labels_micro_f1": micro[2],
        "labels_macro_auc": roc_auc_score(p.positive, sigmoid_of(p), average="macro"),
        "labels_macro_average_precision": average_precision_score(p.positive, sigmoid_of(p), average="macro"),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert len(found) == len(expected) + 2  # specificity, which scikit-learn has not


def test_metrics_of_one_class_an_image_are_silent_about_several(tmp_path):
    p = several()
    assert p.positive is not None
    assert p.thresholds is not None
    assert METRICS["accuracy"].value(judged(p)) is None
    note = METRICS["accuracy"].compare(judged(p)).model.note
    assert "several classes here, or none" in note
    assert (
        METRICS["subset_accuracy"].compare(judged(replace(p, sigmoid=None, positive=None, thresholds=None))).model.note
    )
    verdict = check_gates(p, None, [GateRule(metric="labels_macro_sensitivity", at_least=0.2)])[0]
    assert verdict.verdict in ("pass", "inconclusive")
    p.save(tmp_path / "p.parquet")
    again = Predictions.load(tmp_path / "p.parquet")
    assert again.positive is not None
    assert again.thresholds is not None
    assert np.array_equal(again.positive, p.positive)
    assert np.array_equal(again.thresholds, p.thresholds)
    with pytest.raises(DataError, match=r"sets of classes should be \(300, 4\)"):
        replace(p, positive=p.positive[:, :3])


def test_classes_without_images_or_names_are_left_out_of_the_means():
    p, t = predictions(), thresholds((0.4, 0.5, 1.0, 0.3))
    kept = np.flatnonzero(p.labels != 3)
    assert p.sigmoid is not None
    p = replace(
        p, ids=tuple(map(str, kept)), labels=p.labels[kept], probs=p.probs[kept], sigmoid=p.sigmoid[kept],
        groups={"site": tuple(np.array(p.groups["site"])[kept])},
    )  # fmt: skip
    report = multi_label_report(p, t)
    absent, silent = report["per_class"][3], report["per_class"][2]
    assert [absent[key]["value"] for key in ("auc", "average_precision", "sensitivity", "f1")] == [None] * 4
    assert absent["specificity"]["value"] is not None
    assert silent["precision"]["value"] is None
    assert (silent["sensitivity"]["value"], silent["f1"]["value"]) == (0.0, 0.0)
    rows = report["per_class"]
    expected = np.mean([row["sensitivity"]["value"] for row in rows[:3]])
    assert report["macro"]["sensitivity"]["value"] == pytest.approx(expected)
    expected = np.mean([row["precision"]["value"] for row in (rows[0], rows[1], rows[3])])
    assert report["macro"]["precision"]["value"] == pytest.approx(expected)


def test_few_clusters_give_no_interval():
    p = predictions(clusters=tuple(str(i % 3) for i in range(240)))
    report = multi_label_report(p, thresholds())
    assert report["macro"]["f1"]["low"] is None
    assert "3 clusters" in report["macro"]["f1"]["note"]


def test_the_section_is_in_every_rendering():
    p = predictions()
    report = full_report(p, thresholds=thresholds(fallbacks=("doe",)))
    for text in (to_markdown(report), to_html(report)):
        assert "Several labels at once" in text
        assert "By site" in text
        assert "stay at 0.5: doe" in text
    assert summary(report["multi_label"]) in to_markdown(report)
    assert "so few place a threshold roughly" in how_chosen(report["multi_label"]["thresholds"])
    assert how_chosen(thresholds(rule="0.5").to_dict()) == "Thresholds: 0.5 for every class, fixed."
    assert "sensitivity of at least 0.9 on 16" in how_chosen(thresholds(rule="sensitivity=0.9").to_dict())
    without = full_report(replace(p, sigmoid=None))
    assert without["multi_label"] is None
    assert "Several labels" not in to_markdown(without)
    assert full_report(p)["multi_label"]["thresholds"]["rule"] == "0.5"


def test_what_does_not_fit_is_refused():
    p = predictions()
    with pytest.raises(DataError, match="needs sigmoid probabilities"):
        multi_label_report(replace(p, sigmoid=None), thresholds())
    with pytest.raises(DataError, match="a threshold for each"):
        multi_label_report(p, thresholds((0.5,)))
    assert p.sigmoid is not None
    for wrong in (p.sigmoid[:, :2], p.sigmoid + 1, np.full_like(p.sigmoid, np.nan)):
        with pytest.raises(DataError, match="single classes should be"):
            replace(p, sigmoid=wrong)


def test_files_keep_the_probabilities_of_single_classes(tmp_path):
    p = predictions()
    p.save(tmp_path / "p.parquet")
    again = Predictions.load(tmp_path / "p.parquet")
    assert sigmoid_of(again).tolist() == sigmoid_of(p).tolist()
    assert again.groups == p.groups
    order = np.arange(len(p))[::-1]
    assert p.sigmoid is not None
    turned = replace(
        p, ids=p.ids[::-1], labels=p.labels[order], probs=p.probs[order], sigmoid=p.sigmoid[order], groups={}
    )
    assert sigmoid_of(align(p, turned)).tolist() == sigmoid_of(p).tolist()
    assert align(p, replace(turned, sigmoid=None)).sigmoid is None
    assert coarsen(p, "kind").sigmoid is None
    header = "id,label," + ",".join(f"{what}_{name}" for what in ("prob", "sigmoid") for name in ("a", "b"))
    (tmp_path / "p.csv").write_text(f"{header}\n1,a,0.9,0.1,0.8,0.7\n2,b,0.2,0.8,0.1,0.0\n")
    read = Predictions.load(tmp_path / "p.csv")
    np.testing.assert_allclose(sigmoid_of(read), [[0.8, 0.7], [0.1, 0.0]])
    assert read.groups == {}
    (tmp_path / "p.csv").write_text(f"{header.replace('sigmoid_b', 'sigmoid_c')}\n1,a,0.9,0.1,0.8,0.7\n")
    with pytest.raises(DataError, match="missing sigmoid_b; unknown sigmoid_c"):
        Predictions.load(tmp_path / "p.csv")
