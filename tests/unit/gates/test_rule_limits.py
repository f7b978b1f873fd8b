# SPDX-License-Identifier: Apache-2.0
"""What outcomes and rules accept, at the very limits, and their words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from adaptclip.errors import DataError
from adaptclip.gate_rules import Expected, GateRule, Outcome
from adaptclip.metrics.metric import Metric, Support

SHE = {"positive": ("ill",)}


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"threshold": 1e-9}, {"threshold": 0.0}),
        ({"threshold": 0.999}, {"threshold": 1.0}),
        ({"threshold": 0.5}, {"threshold": -0.5}),
        ({"threshold": 0.5}, {"threshold": 1.5}),
        ({"prevalence": 1e-9}, {"prevalence": 0.0}),
        ({"prevalence": 0.999}, {"prevalence": 1.0}),
        ({"prevalence": 0.1}, {"prevalence": -0.1}),
        ({"prevalence": 0.1}, {"prevalence": 1.1}),
        ({"chosen_on": 1}, {"chosen_on": 0}),
        ({}, {"positive": ()}),
        ({}, {"unknown": 1}),
        ({"rule": "sensitivity=0.001"}, {"rule": "sensitivity=0"}),
        ({"rule": "specificity=0.999"}, {"rule": "specificity=1"}),
        ({"rule": "argmax"}, {"rule": "argmax", "threshold": 0.5}),
        ({"rule": "threshold", "threshold": 0.5}, {"rule": "threshold"}),
        ({"rule": " sensitivity = 0.5"}, {"rule": "accuracy=0.5"}),
        ({"rule": "sensitivity=0.5"}, {"rule": "sensitivity=half"}),
        ({"rule": "sensitivity=0.5"}, {"rule": "sensitivity"}),
        ({"rule": "sensitivity=0.5", "threshold": 0.3}, {"rule": "sensitivity=1.5"}),
    ],
)
def test_outcomes_at_their_limits(accepted, refused):
    assert Outcome(**SHE | accepted)
    with pytest.raises(ValidationError):
        Outcome(**SHE | refused)


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"group": "g", "gap_at_most": 1e-9}, {"group": "g", "gap_at_most": 0.0}),
        ({"group": "g", "gap_at_most": 0.499}, {"group": "g", "gap_at_most": 0.5}),
        ({"group": "g", "gap_at_most": 0.499}, {"group": "g", "gap_at_most": 1.0}),
        ({"metric": "brier", "group": "g", "gap_at_most": 0.99}, {"group": "g", "gap_at_most": 1.9}),
        ({"group": "g", "gap_at_most": 0.1}, {"gap_at_most": 0.1}),
        ({"group": "g", "gap_at_most": 0.1}, {"group": "g", "gap_at_most": -0.5}),
        ({"no_worse_than": "r", "margin": 0.0}, {"no_worse_than": "r", "margin": -0.01}),
        ({"no_worse_than": "r", "margin": 0.499}, {"no_worse_than": "r", "margin": 0.5}),
        (
            {"metric": "brier", "no_worse_than": "r", "margin": 0.99},
            {"metric": "brier", "no_worse_than": "r", "margin": 1},
        ),
        ({"group": "g", "gap_at_most": 0.1, "margin": 0.1}, {"at_least": 0.5, "margin": 0.1}),
        ({"at_least": 0.5, "confidence": 0.51, "reason": "x"}, {"at_least": 0.5, "confidence": 0.5, "reason": "x"}),
        ({"at_least": 0.5, "confidence": 0.999}, {"at_least": 0.5, "confidence": 1.0}),
        ({"at_least": 0.5, "confidence": 0.8}, {"at_least": 0.5, "confidence": 0.79}),
        ({"at_least": 0.5, "confidence": 0.79, "reason": "x"}, {"at_least": 0.5, "confidence": 0.8, "reason": "x"}),
        ({"at_least": 0.5, "confidence": 0.79, "reason": "x"}, {"at_least": 0.5, "confidence": 0.79, "reason": " "}),
        ({"at_least": 0.5, "reason": " "}, {"at_least": 0.5, "reason": "x"}),
        ({"at_least": 0.5, "min_n": 1}, {"at_least": 0.5, "min_n": 0}),
        ({"metric": "fpr", "threshold": 0.5, "at_most": 0.5, **SHE}, {"at_least": 0.5, "threshold": 0.5}),
        (
            {"metric": "fpr", "threshold": 0.5, "at_most": 0.5, **SHE},
            {"metric": "auc", "threshold": 0.5, "at_least": 0.5, **SHE},
        ),
        (
            {"metric": "fpr", "threshold": 0.1, "at_most": 0.5, **SHE},
            {"metric": "fpr", "threshold": 0.0, "at_most": 0.5, **SHE},
        ),
        (
            {"metric": "fpr", "threshold": 0.9, "at_most": 0.5, **SHE},
            {"metric": "fpr", "threshold": 1.0, "at_most": 0.5, **SHE},
        ),
        ({"metric": "fpr", "at_most": 0.5, **SHE}, {"metric": "fpr", "at_most": 0.5, "positive": ()}),
        ({"metric": "fpr", "at_most": 0.5, **SHE}, {"metric": "fpr", "at_most": 0.5}),
        ({"at_least": 1.0}, {"at_least": 0.0}),
        ({"at_least": 1e-9}, {"at_least": -0.1}),
        ({"at_least": 0.9}, {"at_least": 1.1}),
        ({"metric": "brier", "at_most": 0.0}, {"metric": "brier", "at_most": 2.0}),
        ({"metric": "brier", "at_most": 1.9}, {"metric": "brier", "at_most": 2.1}),
        ({"metric": "net_benefit", "at_least": 0.0, **SHE}, {"metric": "net_benefit", "at_least": -1.0, **SHE}),
        ({"metric": "selection_rate", "at_most": 0.9, **SHE}, {"metric": "selection_rate", "at_most": 1.0, **SHE}),
        (
            {"metric": "selection_rate", "at_least": 0.9, **SHE},
            {"metric": "selection_rate", "no_worse_than": "r", **SHE},
        ),
        ({"metric": "ece", "at_most": 0.1}, {"metric": "ece", "at_least": 0.1}),
        ({"at_least": 0.1}, {"at_most": 0.1}),
        ({"at_least": 0.1}, {"at_least": 0.1, "no_worse_than": "r"}),
        ({"group": "g", "gap_at_most": 0.1, "at_least": 0.5}, {"group": "g", "gap_at_most": 0.1, "at_most": 0.5}),
        ({"group": "g", "gap_at_most": 0.1, "at_least": 0.5}, {"group": "g", "gap_at_most": 0.1, "no_worse_than": "r"}),
        (
            {"metric": "ece", "group": "g", "gap_at_most": 0.1, "at_most": 0.5},
            {"metric": "ece", "group": "g", "gap_at_most": 0.1, "at_least": 0.5},
        ),
        ({"group": ("a", "b"), "at_least": 0.5}, {"group": ("a",), "at_least": 0.5}),
        ({"group": ("a", "b"), "at_least": 0.5}, {"group": ("a", "a"), "at_least": 0.5}),
        (
            {"group": "g", "at_least": 0.5, "exclude": "x", "reason": "y"},
            {"at_least": 0.5, "exclude": "x", "reason": "y"},
        ),
        (
            {"group": "g", "at_least": 0.5, "exclude": "x", "reason": "y"},
            {"group": "g", "at_least": 0.5, "exclude": "x"},
        ),
        ({"metric": "macro_f1", "at_least": 0.5}, {"metric": "macro_f2", "at_least": 0.5}),
        (
            {"metric": "mean_per_class_accuracy", "at_least": 0.5, **SHE},
            {"metric": "top5_accuracy", "at_least": 0.5, **SHE},
        ),
        ({"at_least": 0.5}, {"at_least": 0.5, "unknown": 1}),
    ],
)
def test_rules_at_their_limits(accepted, refused):
    assert GateRule(**accepted)
    with pytest.raises(ValidationError):
        GateRule(**refused)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": "g", "at_least": 0.5, "exclude": "x"}, "leaving groups out needs a reason"),
        ({"at_least": 0.5, "confidence": 0.7}, "a confidence of 0.7, below 0.8, needs a reason"),
        ({"metric": "ece", "at_least": 0.5}, "ece is better when lower: use at_most, not at_least"),
        ({"at_most": 0.5}, "accuracy is better when higher: use at_least, not at_most"),
        ({}, "got none"),
        ({"group": "g", "gap_at_most": 1}, "a gap_at_most of 1 lets nearly every model through"),
        ({"at_least": "0,5"}, r"has a decimal comma; write 0\.5"),
        ({"metric": "sensitivity", "positive": 3, "at_least": 0.5}, 'put the name in quotes, such as "3"'),
        ({"metric": "sensitivity", "positive": ["a", True], "at_least": 0.5}, "true and false are no text in YAML"),
        ({"at_least": 0.5, "at_most": 0.7}, "got at_least and at_most"),
        ({"at_most": 0.1, "group": "g", "gap_at_most": 0.1}, r"\(or gap_at_most with at_least\)"),
        ({"metric": Metric.of("own", lambda y, p: 0.0, scale=(1, 3)), "at_least": 3.5}, "must lie within 1 and 3"),
    ],
)
def test_what_is_wrong_is_said(fields, message):
    with pytest.raises(ValidationError, match=message):
        GateRule(**fields)


@pytest.mark.parametrize("field", ["at_least", "at_most", "gap_at_most", "margin", "confidence", "min_n", "threshold"])
def test_yes_is_no_number(field):
    with pytest.raises(ValidationError, match="should be a number; yes, no, true and false are none"):
        GateRule.model_validate({"at_least": 0.5, field: True})


def test_yes_is_no_number_of_an_outcome():
    for field in ("threshold", "prevalence", "chosen_on"):
        with pytest.raises(ValidationError, match="should be a number; yes"):
            Outcome.model_validate({"positive": "ill", field: True})


def test_a_metric_of_more_than_two_classes_says_nothing_of_two_sides():
    three = replace(Metric.of("own", lambda y, p: 0.0), least_classes=3)
    assert GateRule(metric=three, at_least=0.5)
    with pytest.raises(ValidationError, match="of two sides, own says nothing; use sensitivity"):
        GateRule(metric=three, at_least=0.5, positive=("ill",))


def test_a_threshold_alone_is_a_rule_and_one_with_a_rule_is_kept():
    assert Outcome(positive=("ill",), threshold=0.3).rule == "threshold"
    kept = Outcome(positive=("ill",), rule="sensitivity=0.9", threshold=0.3)
    assert (kept.rule, kept.keeps) == ("sensitivity=0.9", ("sensitivity", 0.9))
    assert Outcome(positive=("ill",)).rule == "argmax"
    assert Outcome.model_validate({"positive": "ill", "threshold": None}).rule == "argmax"
    assert Outcome.model_validate({"positive": "ill"}).positive == ("ill",)
    with pytest.raises(ValidationError):
        kept.threshold = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("fields", "words", "undecided"),
    [
        ({}, "the most probable class decides", False),
        ({"threshold": 0.3}, "positive above a probability of 0.3", False),
        (
            {"rule": "sensitivity=0.95"},
            "a threshold that keeps a sensitivity of 0.95 on validation images, which is not chosen yet",
            True,
        ),
        (
            {"rule": "sensitivity=0.95", "threshold": 0.3},
            "positive above a probability of 0.3, chosen on validation images to keep a sensitivity of 0.95",
            False,
        ),
        (
            {"rule": "specificity=0.9", "threshold": 0.3, "chosen_on": 1},
            "positive above a probability of 0.3, chosen on 1 negative validation image to keep a specificity of 0.9",
            False,
        ),
        (
            {"rule": "sensitivity=0.9", "threshold": 0.3, "chosen_on": 1200},
            "positive above a probability of 0.3, chosen on 1,200 positive validation images to keep a sensitivity of "
            "0.9",
            False,
        ),
    ],
)
def test_words_of_decision_rules(fields, words, undecided):
    outcome = Outcome(positive=("ill",), **fields)
    assert outcome.rule_words == words
    assert (outcome.undecided == "") == (not undecided)
    if undecided:
        assert "keeps a sensitivity of 0.95; judge a run" in outcome.undecided


def test_outcomes_that_do_not_fit_the_classes():
    levels = {"kind": ("bad", "bad", "good")}
    Outcome(positive=("a",)).check(("a", "b"), {})
    Outcome(positive=("bad",), level="kind").check(("a", "b", "c"), levels)
    for fields, message in (
        ({"positive": ("a", "b")}, "every class is positive"),
        ({"positive": ("bad", "good"), "level": "kind"}, "every class is positive"),
        ({"positive": ("bad",)}, "nothing is 'bad'"),
        ({"positive": ("a",), "level": "kind"}, "nothing is 'a'"),
        ({"positive": ("a",), "level": "kinds"}, 'Did you mean "kind"'),
    ):
        with pytest.raises(DataError, match=message):
            Outcome.model_validate(fields).check(("a", "b") if "level" not in fields else ("a", "b", "c"), levels)
    with pytest.raises(DataError, match="no taxonomy levels at all"):
        Outcome(positive=("a",), level="kind").check(("a", "b"), {})
    assert Outcome(positive=("bad", "worse"), level="kind").name == "kind = bad or worse"


def test_what_is_expected_names_something():
    assert Expected.model_validate({"classes": "a"}).classes == ("a",)
    everything = Expected.model_validate({"classes": "all"})
    assert everything.of_classes(("a", "b")) == ("a", "b")
    assert Expected.model_validate({"classes": ["b"]}).of_classes(("a", "b")) == ("b",)
    assert Expected.model_validate({"groups": {"sex": "f"}}).groups == {"sex": ("f",)}
    with pytest.raises(ValidationError):
        everything.classes = ("a",)  # pyright: ignore[reportAttributeAccessIssue]
    for wrong in ({}, {"groups": {"sex": []}}, {"groups": {}, "classes": []}, {"clases": "all"}, {"groups": 3}):
        with pytest.raises(ValidationError):
            Expected.model_validate(wrong)


def test_the_outcome_of_a_rule_is_its_own_the_declared_one_or_none():
    declared = (
        Outcome(positive=("a", "b"), threshold=0.2),
        Outcome(positive=("a",), level="kind", threshold=0.3),
        Outcome(positive=("a",), threshold=0.4),
    )
    rule = {"metric": "sensitivity", "at_least": 0.5}
    assert GateRule(**rule, positive=("b", "a")).outcome_among(declared) == declared[0]
    assert GateRule(**rule, positive=("a",), level="kind").outcome_among(declared) == declared[1]
    assert GateRule(**rule, positive=("a",), level="other").outcome_among(declared) == Outcome(
        positive=("a",), level="other"
    )
    assert GateRule(**rule, positive=("a",), threshold=0.9).outcome_among(declared) == Outcome(
        positive=("a",), threshold=0.9
    )
    assert GateRule(at_least=0.5).outcome_among(declared) is None


def test_what_a_rule_lacks_is_the_first_that_is_too_little():
    rule = GateRule(at_least=0.5)
    many, few, fewer = Support(100), Support(29, "positive images", 30), Support(9, "images of a class", 10)
    assert rule.lacking((many, few, fewer)) == few
    assert rule.lacking((many, Support(30, "x", 30))) is None
    assert GateRule(at_least=0.5, min_n=29).lacking((many, few)) is None
    assert GateRule(at_least=0.5, min_n=30).lacking((many, few)) == few


def test_the_slack_of_a_gap_is_two_points_unless_given():
    assert GateRule(group="g", gap_at_most=0.1).slack == 0.02
    assert GateRule(group="g", gap_at_most=0.1, margin=0.0).slack == 0
    assert GateRule(no_worse_than="r").slack == 0
    assert GateRule(no_worse_than="r", margin=0.03).slack == 0.03


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({"at_least": 0.9}, "accuracy ≥ 0.9"),
        ({"metric": "ece", "at_most": 0.1}, "ece ≤ 0.1"),
        ({"at_least": 0.9, "level": "kind"}, "accuracy at level kind ≥ 0.9"),
        ({"metric": "fpr", "at_most": 0.9, "level": "kind", **SHE}, "fpr (kind = ill) ≤ 0.9"),
        ({"at_least": 0.9, "group": "sex"}, "accuracy of every sex ≥ 0.9"),
        ({"at_least": 0.9, "group": ("sex", "age")}, "accuracy of every sex × age ≥ 0.9"),
        ({"no_worse_than": "r"}, "accuracy no worse than r"),
        ({"no_worse_than": "r", "margin": 0.02}, "accuracy no worse than r − 0.02"),
        ({"group": "sex", "gap_at_most": 0.1}, "gap of accuracy by sex ≤ 0.1"),
        ({"group": "sex", "gap_at_most": 0.1, "at_least": 0.5}, "gap of accuracy by sex ≤ 0.1, every group ≥ 0.5"),
        ({"group": "sex", "gap_at_most": 0.1, "at_most": 0.5, "metric": "ece"},
         "gap of ece by sex ≤ 0.1, every group ≤ 0.5"),
    ],
)  # fmt: skip
def test_titles(fields, title):
    assert GateRule(**fields).title == title
