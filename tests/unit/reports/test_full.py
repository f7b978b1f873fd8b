# SPDX-License-Identifier: Apache-2.0
"""The fine-grained, calibration, shift and name reports against scikit-learn and by hand, on odd inputs too."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score

from adaptclip.errors import DataError
from adaptclip.metrics.rates import ancestor_heights
from adaptclip.predictions import Predictions
from adaptclip.reports.calibration import calibration_report
from adaptclip.reports.fine_grained import MAX_CONFUSIONS, example_names, fine_grained_report
from adaptclip.reports.full import full_report
from adaptclip.reports.names import name_audit
from adaptclip.reports.shift import base_new, class_changes, domain_shift

NAMES = ("ant", "bee", "cod", "doe", "elk", "fox", "gnu", "hen")
LEVELS = {"kind": ("insect", "insect", "fish", "mammal", "mammal", "mammal", "mammal", "bird")}


def predictions(seed=0, *, n=400, skill=1.5, prefix="i", **fields: Any):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 8
    logits = rng.normal(size=(n, 8))
    logits[np.arange(n), labels] += skill
    odds = np.exp(logits)
    given = {
        "ids": tuple(f"{prefix}{k}" for k in range(n)), "labels": labels, "class_names": NAMES, "levels": LEVELS,
        "probs": (odds / odds.sum(1, keepdims=True)).astype(np.float32), "groups": {"sex": ("f", "m") * (n // 2)},
    }  # fmt: skip
    return Predictions(**(given | fields))


def test_top_k_macro_f1_and_confusions_are_scikit_learns():
    p = predictions()
    fine = fine_grained_report(p)
    assert list(fine["overall"]) == ["accuracy", "top3_accuracy", "top5_accuracy", "macro_f1", "worst_decile"]
    for k, name in zip((1, 3, 5), fine["overall"], strict=False):
        expected = top_k_accuracy_score(p.labels, p.probs, k=k, labels=np.arange(8))
        assert fine["overall"][name]["model"]["value"] == pytest.approx(expected)
    assert fine["overall"]["macro_f1"]["model"]["value"] == pytest.approx(f1_score(p.labels, p.pred, average="macro"))
    matrix = confusion_matrix(p.labels, p.pred)
    assert fine["matrix"] == matrix.tolist()
    off = matrix - np.diag(np.diag(matrix))
    assert len(fine["confusions"]) == MAX_CONFUSIONS
    assert [c["count"] for c in fine["confusions"]] == sorted(off.ravel().tolist(), reverse=True)[:MAX_CONFUSIONS]
    for c in fine["confusions"]:
        i, j = NAMES.index(c["true"]), NAMES.index(c["predicted"])
        assert (c["count"], c["back"]) == (off[i, j], off[j, i])
        assert c["rate"]["value"] == pytest.approx(off[i, j] / matrix[i].sum())
        rows = [p.ids.index(example["id"]) for example in c["examples"]]
        assert all((p.labels[r], p.pred[r]) == (i, j) for r in rows)
        sure = [example["confidence"] for example in c["examples"]]
        assert sure == sorted(sure, reverse=True)
    assert len(example_names(fine)) >= MAX_CONFUSIONS


def test_severity_levels_and_hard_pairs_by_loop():
    p, base = predictions(), predictions(1, skill=0.8)
    fine = fine_grained_report(p, base, hard_pairs=[("ant", "bee")])
    heights = ancestor_heights(LEVELS, 8)
    reached = [int(heights[a, b]) for a, b in zip(p.labels, p.pred, strict=True) if a != b]
    severity = fine["severity"]
    assert severity["mistakes"]["model"]["value"] == pytest.approx(np.mean(reached))
    assert severity["mistakes"]["model"]["n"] == len(reached)
    assert [d["count"] for d in severity["distribution"]] == [reached.count(1), reached.count(2)]
    assert severity["least_severe"]["height_of_all"]["value"] <= severity["height_of_all"]["value"] + 0.05
    kinds = np.array(LEVELS["kind"])
    order = sorted(set(kinds))
    summed = np.stack([p.probs[:, kinds == kind].sum(1) for kind in order], 1)
    right = np.array(order)[summed.argmax(1)] == kinds[p.labels]
    assert fine["levels"][0]["accuracy"]["model"]["value"] == pytest.approx(right.mean())
    pair = fine["hard_pairs"][0]
    rows = np.flatnonzero(p.labels < 2)
    per_class = [np.mean(p.probs[r := rows[p.labels[rows] == c], c] > p.probs[r, 1 - c]) for c in (0, 1)]
    assert pair["accuracy"]["model"]["value"] == pytest.approx(np.mean(per_class))
    assert pair["n"] == [50, 50]
    with pytest.raises(DataError, match=r"no class 'be'\. Did you mean .bee"):
        fine_grained_report(p, hard_pairs=[("ant", "be")])
    with pytest.raises(DataError, match="one class twice"):
        fine_grained_report(p, hard_pairs=[("ant", "ant")])


def test_the_worst_classes_are_not_judged_on_the_images_that_chose_them():
    """20 classes that are all right in 70 %: the worst two as chosen look far worse, cross-fitted they do not."""
    rng = np.random.default_rng(0)
    honest, chosen = [], []
    for _ in range(20):
        labels = np.repeat(np.arange(20), 20)
        wrong = rng.random(400) > 0.7
        probs = np.eye(20, dtype=np.float32)[np.where(wrong, (labels + 1) % 20, labels)]
        p = Predictions(tuple(map(str, range(400))), labels, probs, tuple(f"c{i}" for i in range(20)))
        fine = fine_grained_report(p)
        assert len(fine["worst_classes"]["classes"]) == 2
        worst = fine["overall"]["worst_decile"]["model"]
        assert worst["low"] <= worst["value"] <= worst["high"]
        honest.append(worst["value"])
        chosen.append(fine["worst_classes"]["as_chosen"])
    assert np.mean(honest) == pytest.approx(0.7, abs=0.05)
    assert np.mean(chosen) < 0.55


def test_calibration_report_by_hand():
    p, validation = predictions(), predictions(5, n=80, prefix="v")
    report = calibration_report(p, validation, validation_used_for="the learning rate")
    top, right = p.probs.max(1).astype(float), p.pred == p.labels
    assert sum(row["n"] for row in report["bins"]) == 400
    from_bins = sum(row["n"] * abs(row["confidence"] - row["accuracy"]["value"]) for row in report["bins"]) / 400
    assert report["scores"]["ece"]["value"] == pytest.approx(from_bins)
    assert report["scores"]["surplus"]["value"] == pytest.approx((top - right).mean())
    assert report["temperature"]["n"] == 80
    for point in report["selective"]["points"]:
        answered = top >= point["threshold"] - 1e-9
        assert point["coverage"] >= point["asked"]
        assert point["accuracy"]["value"] == pytest.approx(right[answered].mean())
    sets = report["sets"]
    members = p.probs >= sets["value"]
    assert sets["coverage"]["value"] == pytest.approx(members[np.arange(400), p.labels].mean())
    assert sets["size"]["value"] == pytest.approx(members.sum(1).mean())
    assert [row["group"] for row in report["groups"]["sex"]] == ["f", "m"]
    assert any("the learning rate" in caution for caution in report["cautions"])
    assert "80 validation images" in sets["note"]


def test_without_or_with_few_validation_images_it_says_so():
    p = predictions()
    report = calibration_report(p)
    assert report["temperature"]["value"] is None
    assert "test images are never used" in report["temperature"]["note"]
    assert report["sets"]["value"] is None
    few = calibration_report(p, predictions(5, n=8, prefix="v"))
    assert "8 validation images are too few for 90 %: 9 are needed" in few["sets"]["note"]
    with pytest.raises(DataError, match="400 images are in both"):
        calibration_report(p, predictions(3))
    other = predictions(5, n=80, prefix="v", class_names=NAMES[::-1])
    with pytest.raises(DataError, match="different class names"):
        calibration_report(p, other)


def test_a_class_that_got_worse_is_found_and_luck_is_not():
    base = predictions(1)
    probs = base.probs.copy()
    ants = np.flatnonzero(base.labels == 0)
    probs[ants] = np.eye(8, dtype=np.float32)[1]
    probs[3] = np.eye(8, dtype=np.float32)[4]  # one doe more or less proves nothing
    found = class_changes(predictions(1, probs=probs), base)
    assert found["worse"] == ["ant"]
    assert found["tested"] == 8
    by_class = {row["class"]: row for row in found["classes"]}
    assert by_class["ant"]["change"]["value"] == pytest.approx(-np.mean(base.pred[ants] == 0))
    assert by_class["doe"]["direction"] == ""
    assert by_class["hen"]["change"]["value"] == 0


def test_base_and_new_and_domains():
    one, two = predictions(0), predictions(1, class_names=tuple("abcdefgh"), levels={})
    found = base_new((one, predictions(2, skill=0.5)), (two, predictions(3, class_names=tuple("abcdefgh"), levels={})))
    a, b = ((p.pred == p.labels).mean() for p in (one, two))
    assert found["harmonic_mean"]["model"]["value"] == pytest.approx(2 / (1 / a + 1 / b))
    with pytest.raises(DataError, match="share 8 classes"):
        base_new((one, one), (one, one))
    source = predictions(4, skill=3.0, prefix="s")
    moved = domain_shift(one, source)["accuracy"]
    assert moved["change"]["value"] == pytest.approx(a - (source.pred == source.labels).mean())
    assert moved["change"]["high"] < 0
    with pytest.raises(DataError, match="in both domains"):
        domain_shift(one, one)


def test_name_audit_compares_and_does_not_choose():
    good, poor = predictions(0, skill=2.5), predictions(1, skill=0.3)
    audit = name_audit({"Latin": poor, "common": good, "Latin again": poor})
    assert audit["reference"] == "Latin"
    assert [v["variant"] for v in audit["variants"]] == ["common", "Latin", "Latin again"]
    by_name = {v["variant"]: v for v in audit["variants"]}
    assert by_name["common"]["p_holm"] < 0.001
    assert by_name["Latin again"]["p_holm"] == 1
    assert by_name["Latin"]["change"] is None
    assert {row["variant"] for row in audit["classes"]} == {"common"}
    with pytest.raises(DataError, match="at least two"):
        name_audit({"one": good})


def one_class():
    return Predictions(tuple("abcdef"), np.zeros(6, int), np.ones((6, 1), np.float32), ("only",))


def all_right():
    p = predictions()
    return Predictions(p.ids, p.labels, np.eye(8, dtype=np.float32)[p.labels], NAMES, p.groups, None, LEVELS)


def all_tied():
    return predictions(probs=np.full((400, 8), 0.125, np.float32))


def empty_class():
    p = predictions()
    return predictions(labels=np.where(p.labels == 7, 6, p.labels))


def few_clusters():
    return predictions(clusters=("p", "q", "r", "s") * 100)


def one_image():
    return Predictions(("a",), np.zeros(1, int), np.array([[0.6, 0.4]], np.float32), ("x", "y"))


@pytest.mark.parametrize("make", [one_class, all_right, all_tied, empty_class, few_clusters, one_image])
def test_degenerate_predictions_get_a_report_in_every_form(make):
    from adaptclip.reports.render import to_html, to_markdown

    p = make()
    report = full_report(p, p)
    json.dumps(report, allow_nan=False)
    assert report["shift"]["worse"] == []
    assert "nan" not in to_markdown(report, []).lower().split()
    assert "<h2" in to_html(report, [])


def test_the_whole_report_is_deterministic():
    p, base, validation = predictions(), predictions(1), predictions(5, n=80, prefix="v")
    reports = [full_report(p, base, validation=validation, hard_pairs=[("ant", "bee")]) for _ in range(2)]
    assert reports[0] == reports[1]


def test_decisions_without_probabilities_have_no_calibration():
    p = all_right()
    bare = Predictions(p.ids, p.labels, p.probs, NAMES, p.groups, ranked=1, confident=False)
    report = full_report(bare)
    assert report["calibration"] is None
    assert list(report["fine_grained"]["overall"]) == ["accuracy", "macro_f1", "worst_decile"]
