# SPDX-License-Identifier: Apache-2.0
"""One decision rule for an outcome: the same number in the tables, in gates and in sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptclip.gate_rules import GateRule, Outcome
from adaptclip.gates import check_gates
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report
from adaptclip.reports.measuring import sampling_of, two_sided, with_thresholds
from adaptclip.reports.render import to_markdown

CLASSES = ("melanoma", "nevus", "keratosis")


def world(n=300, seed=0, prefix="i", **fields):
    """Three classes; melanomas are often the most probable class with a third of the probability only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    probs = rng.dirichlet((2.0, 2.0, 2.0), n)
    probs[np.arange(n), labels] += 0.25
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    groups = {"site": tuple(rng.choice(["a", "b"], n))}
    return Predictions(tuple(f"{prefix}{i}" for i in range(n)), labels, probs, CLASSES, groups, **fields)


RULES: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.5},
    {"rule": "sensitivity=0.95"},
    {"rule": "specificity=0.9"},
)


def test_the_rules_differ_here():
    model = world()
    found = {
        two_sided(model, with_thresholds(replace(model, outcomes=(outcome,)), world(prefix="v", seed=1)).outcomes[0])
        .pred.sum()
        .item()
        for outcome in (Outcome(positive=("melanoma",), **rule) for rule in RULES)
    }
    assert len(found) == 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("through_file", [False, True])
def test_table_gate_and_sentence_tell_one_number(rule, through_file, tmp_path):
    validation = world(prefix="v", seed=1)
    outcome = Outcome(positive=("melanoma",), **rule)
    model = with_thresholds(world(outcomes=(outcome,)), validation)
    if through_file:
        model.save(tmp_path / "predictions.parquet")
        model = Predictions.load(tmp_path / "predictions.parquet")
    rules = [
        GateRule(metric="sensitivity", positive=("melanoma",), at_least=0.3),
        GateRule(metric="sensitivity", positive=("melanoma",), at_least=0.3, group="site"),
    ]
    verdicts = check_gates(model, None, rules)
    report = full_report(model, validation=validation, draws=1000)
    hits = two_sided(model, model.outcomes[0]).pred[model.labels == 0]
    expected = hits.mean()
    page = to_markdown(report, verdicts)
    [table] = report["outcomes"]
    assert table["sensitivity"]["model"]["value"] == verdicts[0].value == expected
    assert f"is {100 * expected:.1f} % on {len(hits)} positive images" in verdicts[0].reason
    assert page.count(f"{100 * expected:.1f} % [") >= 2  # the headline and the table of the outcome
    by_group = {row["group"]: row for row in report["groups"]["site"]["outcomes"][0]["rows"]}
    assert {v.group: v.value for v in verdicts[1].groups} == {
        group: row["sensitivity"]["model"]["value"] for group, row in by_group.items()
    }
    one_by_one = {row["class"]: row for row in report["groups"]["site"]["one_vs_rest"]["classes"]}
    if rule:
        assert "melanoma" not in one_by_one
        assert "decision rule of their own" in report["groups"]["site"]["one_vs_rest"]["note"]
        assert f"Decision rule: {model.outcomes[0].rule_words}." in verdicts[0].reason
    else:
        assert one_by_one["melanoma"]["tpr"] == {g: row["sensitivity"]["model"] for g, row in by_group.items()}
    assert table["rule"] in page


def test_zero_shot_is_judged_by_the_same_threshold_and_the_page_says_so():
    outcome = Outcome(positive=("melanoma",), rule="sensitivity=0.95")
    model = with_thresholds(world(outcomes=(outcome,)), world(prefix="v", seed=1))
    base = replace(world(seed=0), probs=world(seed=5).probs)
    report = full_report(model, base, draws=1000)
    threshold = model.outcomes[0].threshold
    positives = base.probs[model.labels == 0, 0]
    assert report["outcomes"][0]["sensitivity"]["zero_shot"]["value"] == (positives > threshold).mean()
    page = to_markdown(report, None)
    assert "Zero-shot is judged by the same threshold, which was not chosen for it" in page
    on = (world(prefix="v", seed=1).labels == 0).sum()
    assert f"chosen on {on} positive validation images to keep a sensitivity of 0.95" in page


def test_without_validation_images_nothing_is_chosen_and_the_gate_is_open():
    outcome = Outcome(positive=("melanoma",), rule="sensitivity=0.95")
    model = with_thresholds(world(outcomes=(outcome,)), None)
    gate: dict[str, Any] = {"positive": ("melanoma",), "at_least": 0.1}
    rules = [
        GateRule(metric="sensitivity", **gate),
        GateRule(metric="sensitivity", group="site", gap_at_most=0.2, positive=("melanoma",)),
        GateRule(metric="auc", **gate),
    ]
    verdicts = check_gates(model, world(), rules)
    assert [v.verdict for v in verdicts] == ["inconclusive", "inconclusive", "pass"]
    assert "no validation image chose the threshold" in verdicts[0].reason
    report = full_report(model, world(), draws=1000)
    [table] = report["outcomes"]
    assert table["sensitivity"]["model"]["value"] is None
    assert "no validation image chose" in table["sensitivity"]["model"]["note"]
    assert table["auc"]["model"]["value"] is not None
    assert report["groups"]["site"]["outcomes"][0]["sensitivity_gap"] is None
    assert "not chosen yet" in to_markdown(report, verdicts)


@pytest.mark.parametrize(("fixed", "words"), [(True, "the study fixed how many"), (False, "met by chance")])
def test_the_page_says_how_the_images_were_sampled(fixed, words, tmp_path):
    model = world(fixed_classes=fixed, clusters=tuple(f"p{i // 2}" for i in range(300)))
    model.save(tmp_path / "p.parquet")
    model = Predictions.load(tmp_path / "p.parquet")
    report = full_report(model, world(), draws=1000)
    assert report["sampling"] == {"unit": "cluster", "num_units": 150, "classes": "fixed" if fixed else "random"}
    assert (sampling_of(model).stratum is None) == (not fixed)
    page = to_markdown(report, None)
    assert words in page
    assert "like these 150 could have given; the unit is the cluster" in page
