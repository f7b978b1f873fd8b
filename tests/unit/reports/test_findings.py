# SPDX-License-Identifier: Apache-2.0
"""Images that may show several classes: each finding as a two-sided question, reports, comparisons and renderings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, precision_score, recall_score, roc_auc_score

from adaptclip.errors import DataError
from adaptclip.gate_rules import Outcome
from adaptclip.metrics.intervals import wilson
from adaptclip.prediction_files import shares
from adaptclip.predictions import Predictions
from adaptclip.reports.compare import compare_groups, levelling_markdown
from adaptclip.reports.full import full_report
from adaptclip.reports.headline import three_numbers, worries
from adaptclip.reports.measuring import align, coarsen, measure_outcome, two_sided, with_thresholds
from adaptclip.reports.render import to_html, to_markdown
from adaptclip.training.thresholds import ThresholdRule, best_thresholds, choose_thresholds

NAMES = ("effusion", "edema", "nodule", "fracture")
N = 600


def predictions(seed: int = 0, *, unknown: float = 0.15, skill: float = 0.35, **fields: Any) -> Predictions:
    """Edema is said where there is an effusion; effusions of men are missed; fractures are rare."""
    rng = np.random.default_rng(seed)
    shown = rng.random((N, 4)) < [0.4, 0.3, 0.2, 0.02]
    known = rng.random((N, 4)) >= unknown
    sex = np.where(rng.random(N) < 0.5, "f", "m")
    given = rng.beta(2, 4, (N, 4)) + skill * shown
    given[:, 0] -= 0.4 * (shown[:, 0] & (sex == "m"))
    given[:, 1] += 0.3 * shown[:, 0]
    given = np.clip(given, 0.001, 0.999).astype(np.float32)
    made: dict[str, Any] = {
        "ids": tuple(map(str, range(N))), "labels": (shown & known).argmax(axis=1), "probs": shares(given),
        "class_names": NAMES, "sigmoid": given, "positive": shown & known, "known": known,
        "groups": {"sex": tuple(sex.tolist())}, "thresholds": np.array([0.5, 0.45, 0.5, 0.4]),
        "levels": {"place": ("lung", "lung", "lung", "bone")},
    }  # fmt: skip
    return Predictions(**(made | fields))


def of(p: Predictions, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the images of which it is known: which show the class, its probability, and whether it is named."""
    assert p.known is not None
    assert p.positive is not None
    assert p.sigmoid is not None
    assert p.thresholds is not None
    rows = p.known[:, c]
    return p.positive[rows, c], p.sigmoid[rows, c], p.sigmoid[rows, c] >= p.thresholds[c]


@cache
def report(paired: bool = True) -> dict[str, Any]:
    p = predictions()
    base = replace(p, sigmoid=predictions(skill=0.1).sigmoid) if paired else None
    thresholds = choose_thresholds(predictions(5), NAMES, ThresholdRule("f1"))
    return full_report(p, base, thresholds=thresholds)


def test_a_finding_is_a_question_to_the_images_of_which_it_is_known():
    p = predictions(clusters=tuple(str(i // 3) for i in range(N)))
    asked = two_sided(p, Outcome(positive=("edema",)))
    shown, given, named = of(p, 1)
    assert p.known is not None
    assert asked.ids == tuple(str(i) for i in np.flatnonzero(p.known[:, 1]))
    assert np.array_equal(asked.labels, shown)
    assert np.array_equal(asked.probs[:, 1], given)
    assert np.array_equal(asked.pred, named)
    assert asked.asked is not None
    assert (asked.asked.threshold, asked.positive, asked.known) == (0.45, None, None)
    assert asked.clusters == tuple(str(i // 3) for i in np.flatnonzero(p.known[:, 1]))
    assert asked.groups["sex"] == tuple(np.array(p.groups["sex"])[p.known[:, 1]].tolist())
    own = two_sided(p, Outcome(positive=("edema",), threshold=0.6))
    assert np.array_equal(own.pred, given > 0.6)
    without = two_sided(replace(p, thresholds=None), Outcome(positive=("edema",)))
    assert np.array_equal(without.pred, given >= 0.5)


def test_of_several_findings_any_is_asked_for():
    p = predictions()
    assert p.known is not None
    assert p.positive is not None
    assert p.sigmoid is not None
    assert p.thresholds is not None
    by_level = two_sided(p, Outcome(positive=("lung",), level="place"))
    asked = two_sided(p, Outcome(positive=NAMES[:3]))
    shown, known = np.any(p.positive[:, :3], axis=1), np.all(p.known[:, :3], axis=1)
    rows = np.logical_or(shown, known)
    assert len(asked) == rows.sum() < N
    assert (shown & ~known).any()
    assert np.array_equal(asked.labels, shown[rows])
    assert np.array_equal(asked.probs[:, 1], p.sigmoid[rows, :3].max(axis=1))
    assert np.array_equal(asked.pred, np.any((p.sigmoid >= p.thresholds)[rows, :3], axis=1))
    assert np.array_equal(by_level.pred, asked.pred)
    everything = two_sided(
        p, Outcome(positive=NAMES)
    )  # whether it shows any, which images of one class cannot be asked
    assert everything.labels.sum() == p.positive.any(axis=1).sum()
    with pytest.raises(DataError, match="every class is positive"):
        two_sided(replace(p, positive=None, known=None), Outcome(positive=NAMES))
    with pytest.raises(DataError, match="no single value of a taxonomy level"):
        coarsen(p, "place")


def test_a_rule_is_chosen_on_the_validation_images_of_which_the_finding_is_known():
    p, validation = predictions(outcomes=(Outcome(positive=("nodule",), rule="sensitivity=0.9"),)), predictions(7)
    chosen = with_thresholds(p, validation).outcomes[0]
    shown, given, _ = of(validation, 2)
    assert chosen.chosen_on == shown.sum()
    assert chosen.threshold is not None
    assert (given[shown] > chosen.threshold).mean() >= 0.9
    assert (given[shown] > np.nextafter(np.float32(np.sort(given[shown])[int(0.1 * shown.sum())]), 1)).mean() < 0.9
    undecided = measure_outcome(p, None, p.outcomes[0])[0]
    assert "no validation image chose the threshold" in undecided["sensitivity"].model.note
    assert undecided["auc"].model.value is not None


def test_thresholds_are_chosen_on_what_is_known():
    validation = predictions(3)
    found = choose_thresholds(validation, NAMES, ThresholdRule("sensitivity", 0.8))
    for c in range(4):
        shown, given, _ = of(validation, c)
        alone = best_thresholds(given[:, None], shown[:, None], ThresholdRule("sensitivity", 0.8))
        assert (found.values[c], found.positives[c]) == (alone[0], shown.sum())
    assert found.fallbacks == ()
    assert validation.known is not None
    assert validation.positive is not None
    known = validation.known & ~(validation.positive & (np.arange(4) == 2))  # every nodule is one that nobody knows of
    without = replace(validation, known=known, positive=validation.positive & known)
    assert choose_thresholds(without, NAMES, ThresholdRule()).fallbacks == ("nodule",)


def test_every_number_of_a_finding_is_scikit_learns():
    p, found = predictions(), report()["findings"]
    for c, row in enumerate(found["rows"]):
        shown, given, named = of(p, c)
        values = {
            "auc": roc_auc_score(shown, given), "average_precision": average_precision_score(shown, given),
            "sensitivity": recall_score(shown, named), "specificity": recall_score(~shown, ~named),
            "ppv": precision_score(shown, named), "npv": precision_score(~shown, ~named),
            "outcome_brier": brier_score_loss(shown, given),
        }  # fmt: skip
        assert {name: row[name]["model"]["value"] for name in values} == pytest.approx(values)
        assert (row["class"], row["num_positive"], row["num_known"]) == (NAMES[c], shown.sum(), len(shown))
        assert row["prevalence"] == pytest.approx(shown.mean())
        assert row["surplus"]["value"] == pytest.approx((given - shown).mean(), abs=1e-6)
        expected = wilson(int(named[shown].sum()), int(shown.sum()))
        assert (row["sensitivity"]["model"]["low"], row["sensitivity"]["model"]["high"]) == pytest.approx(expected)
        assert row["threshold"] == p.thresholds[c]  # type: ignore[index]
        assert row["enough"] == (c != 3)
    assert found["rows"][0]["chosen_on"] == of(predictions(5), 0)[0].sum()
    assert p.known is not None
    assert found["unknown"] == pytest.approx(1 - p.known.mean())
    assert json.loads(json.dumps(report())) == report()


def test_what_is_named_beside_another_finding_is_found():
    pairs = report()["findings"]["pairs"]
    assert (pairs[0]["shown"], pairs[0]["named"]) == ("effusion", "edema")
    p = predictions()
    assert p.known is not None
    assert p.positive is not None
    assert p.sigmoid is not None
    own = p.positive[:, 0] & p.known[:, 1] & ~p.positive[:, 1]
    said = p.sigmoid[:, 1] >= 0.45
    assert (pairs[0]["n"], pairs[0]["share"]["value"]) == (own.sum(), pytest.approx(said[own].mean()))
    neither = p.known[:, 0] & ~p.positive[:, 0] & p.known[:, 1] & ~p.positive[:, 1]
    assert pairs[0]["elsewhere"] == pytest.approx(said[neither].mean())


def test_groups_are_compared_finding_by_finding():
    table, p = report()["groups"]["sex"], predictions()
    effusion = next(outcome for outcome in table["outcomes"] if outcome["name"] == "effusion")
    shown, _, named = of(p, 0)
    assert p.known is not None
    sex = np.array(p.groups["sex"])[p.known[:, 0]]
    for row in effusion["rows"]:
        own = sex == row["group"]
        assert row["num_positive"] == shown[own].sum()
        assert row["sensitivity"]["model"]["value"] == pytest.approx(named[own & shown].mean())
    assert effusion["sensitivity_gap"]["worst_group"] == "m"
    assert effusion["sensitivity_gap"]["p_holm"] < 0.01
    assert "fracture" in table["cautions"][0]


def test_the_report_leads_with_the_findings_and_says_nothing_of_single_classes():
    found = report()
    names = [name for name, _, _ in three_numbers(found)]
    assert names == [
        "AUC, mean of the findings",
        "Lowest sensitivity of a finding",
        "Its sensitivity in the worst group",
    ]
    assert "effusion for sex = m" in three_numbers(found)[2][2]
    said = " ".join(worries(found, None))
    for words in (
        "Effusion is missed more often for sex = m",
        "1 of 4 findings has fewer than 30",
        "edema is named on",
    ):
        assert words in said
    for text in (to_markdown(found, []), to_html(found, [])):
        for title in (
            "Findings, lowest sensitivity first",
            "Thresholds and probabilities",
            "Against zero-shot",
            "Named together",
            "Groups: sex",
            "any of them",
            "classes of which an image may show several",
        ):
            assert title in text
        for absent in ("Confusions", "Reliability", "Taxonomy", "Worst classes", "accuracy per class", "Slices"):
            assert absent not in text
    alone = to_markdown(report(paired=False))
    assert "Against zero-shot" not in alone
    no_groups = full_report(predictions(groups={}, unknown=0.0, known=None, thresholds=None))
    assert three_numbers(no_groups)[2][0] == "Images that are all right"
    assert "0.5 for every finding; none was chosen" in to_markdown(no_groups)


def test_two_models_are_compared_on_the_groups_of_a_finding():
    p = predictions()
    better = replace(p, sigmoid=predictions(skill=0.6).sigmoid)
    found = compare_groups(p, better, "sex", metric="sensitivity", positive=("effusion",), min_n=50)
    shown, _, named = of(p, 0)
    assert found["overall"]["before"]["value"] == pytest.approx(named[shown].mean())
    assert found["verdict"] == "better"
    assert "sensitivity (effusion) by sex" in levelling_markdown(found)
    assert compare_groups(p, better, "sex", metric="subset_accuracy")["overall"]["after"]["value"] is not None
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "the nearest that is: subset_accuracy"),
        ({"metric": "sensitivity"}, "name the class"),
        ({"metric": "example_f1", "positive": ("edema",)}, "of all classes at once"),
    ]
    for options, message in cases:
        with pytest.raises(DataError, match=message):
            compare_groups(p, better, "sex", **options)
    other = replace(p, known=None, positive=p.positive)
    with pytest.raises(DataError, match="images have another label in the baseline"):
        align(p, other)
    with pytest.raises(DataError, match="another label in the baseline"):
        align(p, replace(p, positive=None, known=None))
