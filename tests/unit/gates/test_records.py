# SPDX-License-Identifier: Apache-2.0
"""What is written of verdicts: JUnit, digests, the ledger; and rules that do not fit the images."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptclip.errors import GateError
from adaptclip.gate_rules import Expected, GateRule, Outcome
from adaptclip.gates.doubts import asks_little, doubts_of_expected
from adaptclip.gates.loading import check_rules
from adaptclip.gates.verdicts import Judged, Verdict, gates_digest, images_digest, note_judgement
from adaptclip.gates.wording import to_junit
from adaptclip.metrics.metric import Metric
from adaptclip.outputs import LEDGER
from adaptclip.predictions import Predictions

LEVELS = {"kind": ("bad", "bad", "good", "good")}
SHE: Any = {"metric": "sensitivity", "at_least": 0.5}


def verdict(conclusion: Any = "pass", **fields: Any) -> Verdict:
    given: Any = {"title": "accuracy ≥ 0.8", "reason": "why", "images": "i1", "gates": "g1"} | fields
    return Verdict(
        metric="accuracy", attribute=None, group=None, verdict=conclusion, value=0.9, low=0.8, high=1.0, n=100,
        confidence=0.95, **given,
    )  # fmt: skip


def predictions(labels: Any = (0, 1, 2, 3), **fields: Any) -> Predictions:
    labels = np.asarray(labels, int)
    probs = np.full((len(labels), 4), 0.1, np.float32)
    probs[np.arange(len(labels)), labels] = 0.7
    return Predictions(
        tuple(map(str, range(len(labels)))), labels, probs, tuple("abcd"), **{"levels": LEVELS, **fields}
    )


def test_junit_has_a_case_for_every_rule_and_an_error_for_what_is_not_decided():
    rules = [
        verdict(),
        verdict("fail", title="t\x00", reason="bad\x07", images="i2", gates="g2"),
        verdict("inconclusive"),
        verdict("inconclusive"),
    ]
    text = to_junit({"run": rules, "none": []})
    assert text.startswith("<?xml version='1.0'")
    assert text.endswith("</testsuites>\n")
    root = ElementTree.fromstring(text)
    assert (root.get("name"), root.get("verdict")) == ("adaptclip gate", "fail")
    judged, none = root.findall("testsuite")
    assert judged.attrib == {"name": "run", "tests": "4", "failures": "1", "errors": "2", "skipped": "0"}
    found = [(p.get("name"), p.get("value")) for p in judged.findall("properties/property")]
    assert found == [("images", "i1"), ("gates", "g1")]
    cases = judged.findall("testcase")
    assert {case.get("classname") for case in cases} == {"run"}
    assert [case.get("name") for case in cases] == ["accuracy ≥ 0.8", "t ", "accuracy ≥ 0.8", "accuracy ≥ 0.8"]
    assert [case[0].tag for case in cases] == ["system-out", "failure", "error", "error"]
    assert cases[0][0].text == "why"
    assert cases[1][0].attrib == {"type": "fail", "message": "bad "}
    assert cases[2][0].attrib == {"type": "inconclusive", "message": "why"}
    assert none.attrib == {"name": "none", "tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    [case] = none.findall("testcase")
    assert case.attrib == {"classname": "none", "name": "gates"}
    assert case[0].attrib["type"] == "none"
    assert "which is not a pass" in case[0].attrib["message"]
    assert none.find("properties") is None


def test_digests_do_not_depend_on_an_order_that_says_nothing():
    one = predictions((0, 1, 2))
    turned = replace(one, ids=one.ids[::-1], labels=one.labels[::-1].copy(), probs=one.probs[::-1].copy())
    assert images_digest(one) == images_digest(turned)
    assert images_digest(one) != images_digest(replace(one, labels=np.array([0, 1, 3])))
    assert images_digest(one) != images_digest(replace(one, ids=("0", "1", "x")))
    first, second = (
        GateRule(**SHE, positive=("a", "b")),
        GateRule(at_least=0.5, group="g", exclude=("x", "y"), reason="r"),
    )
    assert gates_digest([first, second]) == gates_digest([second, first])
    assert gates_digest([first]) == gates_digest([GateRule(**SHE, positive=("b", "a"))])
    assert gates_digest([second]) == gates_digest(
        [GateRule(at_least=0.5, group="g", exclude=("y", "x"), reason="another")]
    )
    gap = {"group": "g", "gap_at_most": 0.1}
    assert gates_digest([GateRule(**gap)]) == gates_digest([GateRule(**gap, margin=0.02)])
    for other in (
        {"positive": ("a",)},
        {"positive": ("a", "b"), "threshold": 0.5},
        {"positive": ("a", "b"), "min_n": 9},
    ):
        assert gates_digest([first]) != gates_digest([GateRule(**SHE | other)])
    assert gates_digest([second]) != gates_digest([GateRule(at_least=0.5, group="g", exclude=("x",), reason="r")])
    mine = Metric.of("mine", lambda y, p: 0.5)
    assert gates_digest([GateRule(metric=mine, at_least=0.5)]) != gates_digest([GateRule(at_least=0.5)])


def test_the_ledger_counts_judgements_of_the_same_images_and_sets_of_gates(tmp_path):
    rules, others, images = [GateRule(at_least=0.5)], [GateRule(at_least=0.6)], predictions()
    first = note_judgement(tmp_path, "gate", images, rules, another_set="x")
    assert first == Judged(images_digest(images), gates_digest(rules), 4, 1, 1, "x")
    assert first.to_dict()["num_images"] == 4
    assert note_judgement(tmp_path, "gate", images, others).gate_sets == 2
    third = note_judgement(tmp_path, "report", images, rules)
    assert (third.times, third.gate_sets, third.another_set) == (3, 2, "")
    assert note_judgement(tmp_path, "gate", predictions((0, 1)), rules).times == 1
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [line["command"] for line in lines] == ["gate", "gate", "report", "gate"]
    assert lines[0].keys() == {"when", "command", "gates", "images", "num_images"}
    with (tmp_path / LEDGER).open("a") as file:
        file.write("half a li\n[1]\n")  # what cannot be read was a judgement too
    assert note_judgement(tmp_path, "gate", images, rules).times == 6
    nowhere = note_judgement(None, "gate", images, rules, another_set="x")
    assert nowhere == Judged(images_digest(images), gates_digest(rules), 4, 1, 1, "x")


def test_a_ledger_that_cannot_be_read_or_written_is_said(tmp_path, caplog):
    (tmp_path / LEDGER).mkdir()
    with caplog.at_level(logging.WARNING):
        assert note_judgement(tmp_path, "gate", predictions(), []).times == 1
    assert "how often the run was judged before is not known" in caplog.text
    assert "that the run was judged again is not noted" in caplog.text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"at_least": 0.5, "group": "sxe"}, "no group attribute 'sxe'. Did you mean \"sex\""),
        ({"at_least": 0.5, "group": ("sex", "sxe")}, "no group attribute 'sxe'"),
        ({"at_least": 0.5, "level": "kin"}, "no taxonomy level 'kin'. Did you mean \"kind\""),
        ({**SHE, "positive": ("e",)}, "nothing is 'e'"),
        ({"at_least": 0.5, "metric": "top5_accuracy"}, "says nothing about 4 classes; use accuracy"),
        ({"at_least": 0.5, "group": "sex", "exclude": "x", "reason": "r"}, "excludes 'x', which is no group here"),
        ({"at_least": 0.5, "group": "sex", "exclude": ("f", "m"), "reason": "r"}, "excludes all groups of sex"),
    ],
)
def test_rules_that_do_not_fit_are_named(rule, message):
    images = predictions(groups={"sex": ("f", "m", "f", "m")})
    with pytest.raises(GateError, match=message):
        check_rules([GateRule(at_least=0.5), GateRule(**rule)], images)


def test_rules_that_fit_are_let_through():
    images = predictions(groups={"sex": ("f", "m", "f", "m")})
    three = replace(Metric.of("own", lambda y, p: 0.5), least_classes=4)
    check_rules(
        [
            GateRule(at_least=0.5, group="sex", exclude=("f", "unknown"), reason="r"),
            GateRule(at_least=0.5, group="sex"),
            GateRule(**SHE, positive=("bad",), level="kind"),
            GateRule(metric=three, at_least=0.5),
        ],
        images,
    )
    with pytest.raises(GateError, match="own says nothing about 2 classes"):
        check_rules([GateRule(metric=three, at_least=0.5, level="kind")], images)
    with pytest.raises(GateError, match="no group columns at all"):
        check_rules([GateRule(at_least=0.5, group="sex")], predictions())
    with pytest.raises(GateError, match="no levels at all"):
        check_rules([GateRule(at_least=0.5, level="kind")], predictions(levels={}))
    check_rules([], predictions(()))
    with pytest.raises(GateError, match="no rows"):
        check_rules([GateRule(at_least=0.5)], predictions(()))


def test_expected_classes_matter_to_rules_that_depend_on_them():
    images = predictions((0, 0, 2, 2), expected=Expected(classes="all"))

    def said(**rule: Any):
        return doubts_of_expected(GateRule(**rule), images)

    assert said(at_least=0.5) == ["The card expects images of the class b, d, but there are none."]
    assert said(at_least=0.5, level="kind") == []
    only_bad = predictions((0, 1, 0, 1), expected=Expected(classes="all"))
    assert doubts_of_expected(GateRule(at_least=0.5, level="kind"), only_bad) == [
        "The card expects images of the class c, d, but there are none."
    ]
    assert said(**SHE, positive=("a",)) == []
    assert said(**SHE, positive=("a", "b")) == ["The card expects images of the class b, but there are none."]
    assert said(metric="specificity", at_least=0.5, positive=("a", "b")) == [
        "The card expects images of the class d, but there are none."
    ]
    assert said(metric="selection_rate", at_least=0.5, positive=("a", "b")) == [
        "The card expects images of the class b, d, but there are none."
    ]
    assert said(**SHE, positive=("bad",), level="kind") == [
        "The card expects images of the class b, but there are none."
    ]
    named = predictions((0, 0, 2, 2), expected=Expected(classes=("c", "b", "z")))
    assert doubts_of_expected(GateRule(at_least=0.5), named) == [
        "The card expects images of the class b, z, but there are none."
    ]
    assert doubts_of_expected(GateRule(at_least=0.5), predictions((0,))) == []


def test_expected_groups_matter_unless_excluded_and_only_some_are_listed():
    wanted = ("f", "m", *(f"g{i}" for i in range(7)))
    images = predictions(groups={"sex": ("f", "f", "m", "m")}, expected=Expected(groups={"sex": wanted}))
    [many] = doubts_of_expected(GateRule(at_least=0.5, group="sex"), images)
    assert many == "The card expects images of sex = g0, g1, g2, g3, g4 and 2 more, but there are none."
    out = {"exclude": wanted[4:], "reason": "r"}
    [few] = doubts_of_expected(GateRule(at_least=0.5, group="sex", **out), images)
    assert few == "The card expects images of sex = g0, g1, but there are none."
    five = {"exclude": ("g5", "g6"), "reason": "r"}
    [listed] = doubts_of_expected(GateRule(at_least=0.5, group=("sex", "age"), **five), images)
    assert listed == "The card expects images of sex = g0, g1, g2, g3, g4, but there are none."
    assert doubts_of_expected(GateRule(at_least=0.5), images) == []


def test_a_rule_asks_little_where_one_answer_for_all_would_do():
    """60 % of class a: naming it always is right in 60 %, in every group that has as many."""
    labels = np.array([0, 0, 0, 1, 2] * 20)
    images = predictions(labels, groups={"site": tuple("ab"[i // 50] for i in range(100)),
                                         "odd": tuple("xy"[int(c > 0)] for c in labels)})  # fmt: skip

    def little(**rule: Any):
        return asks_little(GateRule(**rule), images)

    assert little(at_least=0.6)
    assert not little(at_least=0.61)
    assert little(at_least=0.6, group="site")
    assert not little(at_least=0.1, group="odd")
    assert little(at_least=0.1, group="odd", exclude="y", reason="r")
    assert not little(at_least=0.3, metric="mean_per_class_accuracy", group="odd")
    alarms = {"metric": "fpr", "positive": ("a",)}
    assert not little(**alarms, at_most=0.99)
    assert little(metric="fnr", positive=("a",), at_most=0.01)
    assert little(metric="selection_rate", positive=("a",), at_least=0.9)
    assert not little(metric="selection_rate", positive=("a",), at_most=0.9)
    assert not little(no_worse_than="run")
    assert not little(group="site", gap_at_most=0.49)
    exactly = Metric.of("half", lambda y, p: 0.5, better="lower")
    assert little(metric=exactly, at_most=0.5)
    assert asks_little(GateRule(at_least=0.6), images) is True
    assert asks_little(GateRule(at_least=0.7), images) is False
    assert asks_little(GateRule(**alarms, at_most=0.9), images) is False
    assert asks_little(GateRule(no_worse_than="run"), images) is False
    few = predictions((0, 0, 1), groups={"g": ("x", "x", "y")})
    assert not asks_little(GateRule(metric="auc", at_least=0.4, positive=("a",), group="g"), few)
    declared = replace(images, outcomes=(Outcome(positive=("a",), threshold=0.65),))
    assert not asks_little(GateRule(**SHE, positive=("a",)), declared)
    assert asks_little(GateRule(**SHE, positive=("a",)), images)
