# SPDX-License-Identifier: Apache-2.0
"""Gates on images that may show several classes: verdicts where the truth is known, and what is handed to `judge`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import adaptclip as ac
from adaptclip.data.declared import check_declared
from adaptclip.errors import DataError, GateError
from adaptclip.gate_rules import Expected, GateRule
from adaptclip.gates import check_gates, check_rules
from adaptclip.gates.sample_size import Assumed, plan
from adaptclip.gates.verdicts import images_digest
from adaptclip.metrics import METRICS
from adaptclip.prediction_files import shares
from adaptclip.predictions import Predictions

NAMES = ("crack", "rust", "dent")


def world(n: int = 900, seed: int = 0, *, found: float = 0.9, left: float = 0.9, unknown: float = 0.1) -> Predictions:
    """Every class is named on `found` of the images that show it and on 1 - `left` of the others; men's dents less."""
    rng = np.random.default_rng(seed)
    shown = rng.random((n, 3)) < [0.4, 0.3, 0.3]
    sex = np.where(rng.random(n) < 0.5, "f", "m")
    rate = np.where(shown, found, 1 - left)
    rate[:, 2] = np.where(shown[:, 2] & (sex == "m"), found - 0.3, rate[:, 2])
    named = rng.random((n, 3)) < rate
    given = np.where(named, rng.uniform(0.5, 1, (n, 3)), rng.uniform(0, 0.49, (n, 3))).astype(np.float32)
    known = rng.random((n, 3)) >= unknown
    return Predictions(
        tuple(map(str, range(n))), (shown & known).argmax(axis=1), shares(given), NAMES, {"sex": tuple(sex.tolist())},
        sigmoid=given, positive=shown & known, known=known,
    )  # fmt: skip


def verdicts(p: Predictions, *rules: dict[str, Any], baseline: Predictions | None = None) -> list[str]:
    return [v.verdict for v in check_gates(p, baseline, [GateRule.model_validate(rule) for rule in rules])]


def test_verdicts_follow_the_truth_finding_by_finding():
    p = world()
    assert verdicts(
        p,
        {"metric": "sensitivity", "positive": "crack", "at_least": 0.82, "group": "sex"},
        {"metric": "sensitivity", "positive": "dent", "at_least": 0.82, "group": "sex"},
        {"metric": "sensitivity", "positive": "crack", "at_least": 0.9},
        {"metric": "specificity", "positive": "rust", "at_least": 0.86},
        {"metric": "sensitivity", "positive": ["crack", "rust"], "at_least": 0.85},
        {"metric": "labels_macro_specificity", "at_least": 0.85},
        {"metric": "outcome_ece", "positive": "crack", "at_most": 0.05},
    ) == ["pass", "fail", "inconclusive", "pass", "pass", "pass", "fail"]
    assert verdicts(
        p,
        {"metric": "sensitivity", "positive": "crack", "no_worse_than": "zero_shot", "margin": 0.02},
        {"metric": "auc", "positive": "rust", "no_worse_than": "zero_shot", "margin": 0.02},
        {"metric": "sensitivity", "positive": "dent", "gap_at_most": 0.1, "group": "sex"},
        baseline=replace(p, sigmoid=world(found=0.5).sigmoid),
    ) == ["pass", "pass", "fail"]


def test_a_group_of_which_nothing_is_known_does_not_vanish():
    p = world()
    assert p.known is not None
    assert p.positive is not None
    women = np.array(p.groups["sex"]) == "f"
    known = p.known & ~(women[:, None] & (np.arange(3) == 0))
    p = replace(p, known=known, positive=p.positive & known)
    rule = {"metric": "sensitivity", "positive": "crack", "at_least": 0.5, "group": "sex"}
    verdict = check_gates(p, None, [GateRule.model_validate(rule)])[0]
    assert (verdict.verdict, verdict.group) == ("inconclusive", "f")
    assert verdict.groups[0].n == 0
    assert verdict.groups[1].verdict == "pass"


def test_a_model_at_its_limit_passes_in_one_of_twenty():
    rule = GateRule(metric="sensitivity", positive=("crack",), at_least=0.9)
    passed = [check_gates(world(400, seed, found=0.9), None, [rule])[0].verdict == "pass" for seed in range(120)]
    assert np.mean(passed) <= 0.1
    assert verdicts(world(400, found=0.97), {"metric": "sensitivity", "positive": "crack", "at_least": 0.9}) == ["pass"]


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if not (m.of_outcome or m.of_labels)])
def test_metrics_of_images_with_one_class_are_refused_before_anything_is_judged(name):
    metric = METRICS[name]
    limit = {"at_most": 0.5} if metric.lower_is_better else {"at_least": 0.5}
    with pytest.raises(GateError, match="images may have several classes here, or none"):
        check_rules([GateRule.model_validate({"metric": name, **limit})], world(60))
    with pytest.raises(ValueError, match=r"gates\.0: images may have several classes here"):
        check_declared([GateRule.model_validate({"metric": name, **limit})], (), (), several=True)
    nearest = metric.instead.partition(",")[0]
    assert nearest in METRICS
    assert METRICS[nearest].of_labels or METRICS[nearest].of_outcome


def test_what_does_not_fit_is_refused_in_words():
    p = replace(world(60), levels={"kind": ("a", "a", "b")})
    for rule, message in (
        ({"metric": "subset_accuracy", "level": "kind", "at_least": 0.5}, "no single value of a taxonomy level"),
        ({"metric": "sensitivity", "positive": "crak", "at_least": 0.5}, 'Did you mean "crack"'),
    ):
        with pytest.raises(GateError, match=message):
            check_rules([GateRule.model_validate(rule)], p)
    with pytest.raises(ValueError, match="of all classes at once"):
        GateRule(metric="hamming_loss", positive=("crack",), at_most=0.1)
    one_class = replace(p, positive=None, known=None)
    assert verdicts(one_class, {"metric": "accuracy", "at_least": 0.99}) != ["pass"]


def test_a_verdict_belongs_to_what_is_known_of_the_images():
    p = world(60)
    assert p.known is not None
    assert p.positive is not None
    more = p.known.copy()
    more[np.unravel_index(np.argmin(more), more.shape)] = True
    assert images_digest(p) != images_digest(replace(p, known=more))
    order = np.arange(60)[::-1]
    turned = replace(
        p, ids=p.ids[::-1], labels=p.labels[order], probs=p.probs[order], sigmoid=p.sigmoid[order],  # type: ignore[index]
        positive=p.positive[order], known=p.known[order], groups={"sex": p.groups["sex"][::-1]},
    )  # fmt: skip
    assert images_digest(turned) == images_digest(p)


def test_copies_and_absent_findings_keep_a_gate_from_passing():
    p = world(300)
    rows = np.tile(np.arange(300), 2)
    copied = replace(
        p, ids=tuple(map(str, range(600))), labels=p.labels[rows], probs=p.probs[rows], sigmoid=p.sigmoid[rows],  # type: ignore[index]
        positive=p.positive[rows], known=p.known[rows], groups={"sex": p.groups["sex"] * 2},  # type: ignore[index]
    )  # fmt: skip
    rule = GateRule(metric="specificity", positive=("crack",), at_least=0.5)
    assert check_gates(copied, None, [rule])[0].verdict == "inconclusive"
    assert "sequence of 300 rows" in check_gates(copied, None, [rule])[0].reason
    assert p.positive is not None
    without = replace(p, positive=p.positive & (np.arange(3) != 1), expected=Expected(classes="all"))
    verdict = check_gates(without, None, [GateRule(metric="labels_micro_f1", at_least=0.1)])[0]
    assert "expects images of the class rust" in verdict.reason


def test_the_constant_answer_is_told_from_skill():
    p = world()
    always = replace(p, sigmoid=np.full_like(p.probs, 0.1))
    found = check_gates(always, None, [GateRule(metric="specificity", positive=("crack",), at_least=0.9)])[0]
    assert (found.verdict, found.asks_little) == ("pass", True)
    skilled = check_gates(p, None, [GateRule(metric="sensitivity", positive=("crack",), at_least=0.8)])[0]
    assert (skilled.verdict, skilled.asks_little) == ("pass", False)


def test_images_that_gates_on_findings_need():
    rules = [GateRule(metric="sensitivity", positive=(name,), at_least=0.8) for name in ("crack", "rust")]
    frequent, rare = plan(rules, Assumed(expect=0.9, prevalence=0.5, prevalences={"rust": 0.05}))
    assert frequent.images is not None
    assert rare.images is not None
    assert 8 * frequent.images < rare.images < 12 * frequent.images
    assert "a prevalence of 0.05" in rare.words
    together = plan([GateRule(metric="labels_macro_sensitivity", at_least=0.8)], Assumed(expect=0.9))[0]
    assert (together.images, "plan each class by itself" in together.words) == (None, True)
    with pytest.raises(GateError, match='Did you mean "rust"'):
        plan(rules, Assumed(expect=0.9, prevalences={"rusty": 0.1}))


def given(p: Predictions) -> np.ndarray:
    assert p.positive is not None
    assert p.known is not None
    return np.where(p.known, p.positive, np.nan)


def test_judge_takes_tables_of_yes_and_no_and_lists_of_names():
    import pandas as pd

    p = world(150)
    assert p.sigmoid is not None
    shown, gates = given(p), [{"metric": "sensitivity", "positive": "crack", "at_least": 0.5}]
    table = pd.DataFrame(p.sigmoid[:, ::-1], columns=list(NAMES[::-1]))
    ways = [
        ac.judge(shown, p.sigmoid, class_names=NAMES, gates=gates),
        ac.judge(np.nan_to_num(shown, nan=-1).astype(int).tolist(), p.sigmoid.tolist(), class_names=NAMES, gates=gates),
        ac.judge(pd.DataFrame(shown, columns=list(NAMES)), table, gates=gates, thresholds=0.5),
    ]
    for way in ways:
        assert way.verdict == "pass"
        assert sorted(way.predictions.class_names) == sorted(NAMES)
        row = next(row for row in way.report["findings"]["rows"] if row["class"] == "rust")
        rows = ~np.isnan(shown[:, 1])
        assert row["auc"]["model"]["value"] == pytest.approx(roc_auc_score(shown[rows, 1], p.sigmoid[rows, 1]))
    names = [[NAMES[c] for c in np.flatnonzero(row == 1)] for row in shown]
    of_names = ac.judge(names, p.sigmoid, class_names=NAMES, thresholds={"crack": 0.4, "rust": 0.5, "dent": 0.6})
    assert of_names.predictions.known is None
    assert np.array_equal(of_names.predictions.positive, shown == 1)  # type: ignore[arg-type]
    assert of_names.predictions.thresholds is not None
    assert of_names.predictions.thresholds.tolist() == [0.4, 0.5, 0.6]
    assert "Findings" in of_names.to_html()
    one = ac.judge(shown == 1, p.sigmoid, zero_shot=p.sigmoid / 2)
    assert one.report["overall"]["labels_macro_auc"]["change"]["value"] == pytest.approx(0, abs=1e-9)


def test_judge_refuses_mixed_shapes_in_words():
    p = world(100)
    assert p.sigmoid is not None
    shown = np.nan_to_num(given(p))
    several = [["crack"], ["rust", "dent"], [], *([["crack"]] * 97)]
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (p.labels, p.sigmoid, {}, "give y_true as"),
        (shown[:, :2], p.sigmoid, {}, "has the shape of the probabilities"),
        (shown * 0.5, p.sigmoid, {}, "holds 1, 0, and NaN or -1"),
        (several, p.sigmoid, {}, "give class_names"),
        (several, p.sigmoid, {"class_names": ("crack", "rust", "dnt")}, "'dent' is no class"),
        ([[1], [0, 1]] * 50, p.sigmoid, {"class_names": NAMES}, "or a list of class names for each"),
        (shown, p.sigmoid, {"thresholds": {"crack": 0.5}, "class_names": NAMES}, "thresholds lack 'rust'"),
        (shown, p.sigmoid, {"thresholds": [0.5, 0.5]}, "thresholds should be 3 numbers"),
        (p.labels, p.probs, {"thresholds": 0.5}, "one class for each image"),
        (shown, p.sigmoid * 3, {}, "numbers from 0 to 1"),
    ]
    for y, probs, options, message in cases:
        with pytest.raises(DataError, match=message):
            ac.judge(y, probs, **options)
