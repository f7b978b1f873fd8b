# SPDX-License-Identifier: Apache-2.0
"""Gates on gaps, outcomes, levels, intersections and excluded groups; levelling down; JUnit."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from pydantic import ValidationError

from adaptclip.errors import GateError
from adaptclip.gate_rules import GateRule, Outcome
from adaptclip.gates import check_gates, exit_code
from adaptclip.gates.wording import to_junit
from adaptclip.predictions import Predictions

CLASSES = ("melanoma", "carcinoma", "nevus", "keratosis")
LEVELS = {"malignancy": ("malignant", "malignant", "benign", "benign")}


def by_site(**counts):
    """`by_site(a=(80, 100))`: 80 of the 100 images of site a are right."""
    sites = tuple(site for site, (_, n) in counts.items() for _ in range(n))
    right = np.concatenate([np.arange(n) < k for k, n in counts.values()])
    labels = np.arange(len(right)) % 4
    probs = np.full((len(right), 4), 0.1, np.float32)
    probs[np.arange(len(right)), np.where(right, labels, (labels + 1) % 4)] = 0.7
    return Predictions(tuple(map(str, range(len(right)))), labels, probs, CLASSES, {"site": sites}, None, LEVELS)


def one(model, base=None, **rule):
    return check_gates(model, base, [GateRule(**rule)])[0]


def test_a_small_gap_of_many_images_passes_and_a_large_one_fails():
    base = by_site(a=(500, 1000), b=(500, 1000))
    same = one(by_site(a=(900, 1000), b=(895, 1000)), base, group="site", gap_at_most=0.05)
    assert (same.verdict, same.kind, same.limit) == ("pass", "gap", 0.05)
    assert same.value == pytest.approx(0.005)
    assert same.high is not None
    assert same.value is not None
    assert same.value < same.high <= 0.05
    far = one(by_site(a=(900, 1000), b=(700, 1000)), base, group="site", gap_at_most=0.05)
    assert (far.verdict, far.group) == ("fail", "b")
    unsure = one(by_site(a=(92, 120), b=(94, 120)), by_site(a=(50, 120), b=(50, 120)), group="site", gap_at_most=0.05)
    assert unsure.verdict == "inconclusive"
    assert unsure.more_images is not None
    assert unsure.more_images > 100
    assert "would settle the gap" in unsure.reason


def test_a_levelled_down_model_fails_and_one_without_reference_never_passes():
    base = by_site(a=(950, 1000), b=(800, 1000))
    levelled = by_site(a=(700, 1000), b=(695, 1000))
    found = one(levelled, base, group="site", gap_at_most=0.05)
    assert found.verdict == "fail"
    assert "Levelled down" in found.reason
    alone = one(levelled, None, group="site", gap_at_most=0.05)
    assert alone.verdict == "inconclusive"
    assert "no reference" in alone.reason
    assert one(levelled, None, group="site", gap_at_most=0.05, at_least=0.6).verdict == "pass"
    assert one(levelled, None, group="site", gap_at_most=0.05, at_least=0.8).verdict == "fail"
    # The best group may give way as long as the worst does not.
    closed = by_site(a=(900, 1000), b=(895, 1000))
    assert one(closed, base, group="site", gap_at_most=0.05).verdict == "pass"


def test_a_gap_with_a_small_group_is_inconclusive_unless_the_group_is_excluded_with_a_reason():
    model, base = (
        by_site(a=(900, 1000), b=(895, 1000), unknown=(3, 3)),
        by_site(a=(5, 1000), b=(5, 1000), unknown=(1, 3)),
    )
    found = one(model, base, group="site", gap_at_most=0.05)
    assert found.verdict == "inconclusive"
    assert "unknown (3)" in found.reason
    out = {"exclude": ["unknown"], "reason": "not entered"}
    for rule in ({"gap_at_most": 0.05}, {"at_least": 0.8}):
        judged = one(model, base, group="site", **rule, **out)
        assert judged.verdict == "pass"
        assert judged.excluded == ({"group": "unknown", "n": 3},)
        assert "Left out by declaration: unknown (3 images). Reason given: not entered." in judged.reason
    with pytest.raises(GateError, match=r"excludes 'c', which is no group"):
        one(model, base, group="site", at_least=0.5, exclude=["c"], reason="x")
    with pytest.raises(GateError, match="nothing is left"):
        one(model, base, group="site", at_least=0.5, exclude=["a", "b", "unknown"], reason="x")


@pytest.mark.parametrize(
    ("metric", "value"), [("sensitivity", 0.75), ("tpr", 0.75), ("fnr", 0.25), ("specificity", 0.5), ("fpr", 0.5),
                          ("selection_rate", 0.625)],
)  # fmt: skip
def test_metrics_of_an_outcome_are_the_counts(metric, value):
    labels = np.repeat([0, 1, 2, 3], 40)
    says = np.concatenate([np.where(np.arange(80) < 60, 1, 2), np.where(np.arange(80) < 40, 3, 0)])
    probs = np.full((160, 4), 0.05, np.float32)
    probs[np.arange(160), says] = 0.85
    model = Predictions(tuple(map(str, range(160))), labels, probs, CLASSES, {}, None, LEVELS)
    side = "at_most" if metric in ("fnr", "fpr") else "at_least"
    found = one(model, metric=metric, level="malignancy", positive="malignant", **{side: 0.5})
    assert found.value == pytest.approx(value)
    assert found.n == (160 if metric == "selection_rate" else 80)
    single = one(model, metric=metric, positive=["melanoma", "carcinoma"], **{side: 0.5})
    assert (single.value, single.verdict) == (found.value, found.verdict)


def test_accuracy_at_a_level_and_intersections():
    model = by_site(a=(100, 200), b=(150, 200))
    wrong_side = {0: False, 1: True, 2: False, 3: True}  # class + 1 leaves the level for carcinoma and keratosis
    expected = np.mean((model.pred == model.labels) | [not wrong_side[int(c)] for c in model.labels])
    assert one(model, level="malignancy", at_least=0.1).value == pytest.approx(expected)
    sex = tuple("fm"[i % 2] for i in range(400))
    crossed = Predictions(model.ids, model.labels, model.probs, CLASSES, {**model.groups, "sex": sex}, None, LEVELS)
    found = one(crossed, group=["site", "sex"], at_least=0.3)
    assert found.attribute == "site × sex"
    assert {v.group for v in found.groups} == {"a, f", "a, m", "b, f", "b, m"}


def test_a_threshold_moves_the_sides_and_counts_what_lies_above_it():
    positive = np.linspace(0.05, 0.95, 100, dtype=np.float32)
    probs = np.stack([positive, 1 - positive], axis=1)
    model = Predictions(tuple(map(str, range(100))), np.zeros(100, int), probs, ("ill", "well"))
    for t in (0.2, 0.5, 0.9):
        rule = {"metric": "sensitivity", "positive": "ill", "threshold": t, "at_least": 0.1}
        assert one(model, **rule).value == pytest.approx((positive > t).mean())


def test_more_images_is_what_would_settle_it():
    few = one(by_site(a=(104, 130)), at_least=0.7, group="site", min_n=100)
    tight = one(by_site(a=(97, 130)), at_least=0.7, group="site", min_n=100)
    assert few.verdict == "pass"
    assert tight.verdict == "inconclusive"
    assert tight.more_images is not None
    n = 130 + tight.more_images
    assert one(by_site(a=(round(97 / 130 * n), n)), at_least=0.7, group="site").verdict == "pass"
    fewer = 130 + tight.more_images // 2
    assert one(by_site(a=(round(97 / 130 * fewer), fewer)), at_least=0.7, group="site").verdict == "inconclusive"
    assert f"About {tight.more_images} more images of site = a" in tight.reason.replace(",", "")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"metric": "sensitivity", "at_least": 0.5}, "needs to know what is positive"),
        ({"gap_at_most": 0.1}, "name the attribute"),
        ({"group": "site", "gap_at_most": 0.1, "no_worse_than": "zero_shot"}, "exactly one of"),
        ({"at_least": 0.5, "group": "site", "exclude": ["x"]}, "a reason"),
        ({"at_least": 0.5, "group": "site", "reason": "x"}, "exclude: the groups"),
        ({"metric": "selection_rate", "positive": "a", "no_worse_than": "zero_shot"}, "no better side"),
        ({"at_least": 0.5, "threshold": 0.3}, "threshold decides"),
        ({"at_least": 0.5, "group": ["site"]}, "different attributes"),
    ],
)
def test_rules_that_contradict_themselves(rule, message):
    with pytest.raises(ValidationError, match=message):
        GateRule(**rule)


def test_unknown_levels_and_classes_get_the_nearest_name():
    model = by_site(a=(100, 200))
    with pytest.raises(GateError, match=r"no taxonomy level 'malignant'.*Did you mean \"malignancy\""):
        one(model, metric="sensitivity", level="malignant", positive="malignant", at_least=0.5)
    with pytest.raises(GateError, match=r"nothing is 'melanomma'. Did you mean \"melanoma\""):
        one(model, metric="sensitivity", positive="melanomma", at_least=0.5)
    with pytest.raises(GateError, match="every class is positive"):
        one(model, metric="sensitivity", positive=list(CLASSES), at_least=0.5)
    assert Outcome(positive=("melanoma",)).name == "melanoma"


def test_junit_escapes_names_and_never_counts_inconclusive_as_good():
    model = by_site(**{"<b>&\x1b": (190, 200), "small": (3, 3)})
    verdicts = check_gates(model, None, [GateRule(at_least=0.5), GateRule(group="site", at_least=0.5)])
    assert exit_code(verdicts) == 3
    root = ElementTree.fromstring(to_junit({"run <1>": verdicts, "none": []}))
    suites = root.findall("testsuite")
    assert [(s.get("tests"), s.get("failures"), s.get("errors")) for s in suites] == [("2", "0", "1"), ("1", "0", "1")]
    assert suites[0].get("name") == "run <1>"
    assert root.get("verdict") == "inconclusive"
