# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import binom

from adaptclip.errors import DataError, GateError, StorageError
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates, exit_code, load_gates, overall_verdict
from adaptclip.predictions import Predictions


def judged(right, *, sites=None, confidence=0.9, num_classes=8, clusters=None):
    """Predictions that are right where asked, over balanced classes."""
    right = np.asarray(right, bool)
    n = len(right)
    labels = np.arange(n) % num_classes
    probs = np.full((n, num_classes), (1 - confidence) / (num_classes - 1), np.float32)
    probs[np.arange(n), np.where(right, labels, (labels + 1) % num_classes)] = confidence
    groups = {} if sites is None else {"site": tuple(sites)}
    names = tuple(f"c{i}" for i in range(num_classes))
    return Predictions(tuple(map(str, range(n))), labels, probs, names, groups, clusters)


def share(correct, n):
    return np.arange(n) < correct


def by_site(**counts):
    """`by_site(a=(80, 100))`: 80 of the 100 images of site a are right."""
    sites = [site for site, (_, n) in counts.items() for _ in range(n)]
    return judged(np.concatenate([share(k, n) for k, n in counts.values()]), sites=sites)


def one(predictions, baseline=None, **rule):
    return check_gates(predictions, baseline, [GateRule(**rule)])[0]


@pytest.mark.parametrize(("limit", "verdict"), [(0.70, "pass"), (0.80, "inconclusive"), (0.90, "fail")])
def test_three_verdicts(limit, verdict):
    found = one(judged(share(160, 200)), at_least=limit)
    assert found.verdict == verdict
    assert found.value == 0.8
    assert found.n == 200
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.8 < found.high
    assert "80.0 % on 200 images" in found.reason


def test_the_accuracy_gate_is_the_exact_binomial_test():
    for correct in range(150, 186):
        found = one(judged(share(correct, 200)), at_least=0.8, confidence=0.95)
        passes = binom.sf(correct - 1, 200, 0.8) <= 0.05
        fails = binom.cdf(correct, 200, 0.8) < 0.05
        assert found.verdict == ("pass" if passes else "fail" if fails else "inconclusive")


@pytest.mark.parametrize("truth", [0.1, 0.8, 0.95])
def test_a_model_at_the_limit_passes_at_most_as_often_as_stated(truth):
    rng = np.random.default_rng(0)
    counts, repeats = np.unique(rng.binomial(150, truth, 4000), return_counts=True)
    passed = [one(judged(share(k, 150)), at_least=truth).verdict == "pass" for k in counts]
    rate = np.average(passed, weights=repeats)
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)
    assert rate > 0.005


def test_equal_groups_at_the_limit_rarely_pass_or_fail_as_a_family():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(150):
        counts = {f"s{i}": (int(rng.binomial(120, 0.8)), 120) for i in range(6)}
        verdicts.append(one(by_site(**counts), at_least=0.8, group="site").verdict)
    most = binom.isf(0.001, 150, 0.05)
    assert verdicts.count("fail") <= most
    assert verdicts.count("pass") <= most


@pytest.mark.parametrize("correct", [0, 30, 59, 60])
def test_a_group_of_60_images_is_inconclusive_whatever_its_accuracy(correct):
    found = one(by_site(big=(390, 400), small=(correct, 60)), at_least=0.5, group="site")
    assert found.verdict == "inconclusive"
    assert found.group == "small"
    assert "60 images, too few for a verdict: the rule asks for 100" in found.reason
    assert exit_code([found]) == 3


def test_every_group_is_judged_and_the_worst_is_named():
    model = by_site(a=(190, 200), b=(110, 200), unknown=(100, 200))
    found = one(model, at_least=0.8, group="site")
    assert (found.verdict, found.group, found.attribute) == ("fail", "unknown", "site")
    assert [(v.group, v.verdict) for v in found.groups] == [("unknown", "fail"), ("b", "fail"), ("a", "pass")]
    assert "over 3 groups" in found.reason
    assert "The same verdict for b" in found.reason
    passing = one(by_site(a=(190, 200), b=(185, 200)), at_least=0.8, group="site")
    assert (passing.verdict, passing.group) == ("pass", "b")
    assert passing.reason.startswith("Both groups pass; the worst:")


def test_one_failing_group_outweighs_a_small_one():
    found = one(by_site(a=(50, 200), small=(3, 3)), at_least=0.8, group="site")
    assert (found.verdict, found.group) == ("fail", "a")


def test_failing_is_corrected_for_the_groups_that_can_be_judged_only():
    alone = one(by_site(a=(147, 200)), at_least=0.8, group="site")
    with_small = one(by_site(a=(147, 200), s1=(3, 3), s2=(3, 3)), at_least=0.8, group="site")
    among_many = one(by_site(a=(147, 200), **{f"g{i}": (170, 200) for i in range(7)}), at_least=0.8, group="site")
    assert alone.groups[0].high == with_small.groups[0].high
    assert alone.verdict == with_small.verdict == "fail"
    assert among_many.verdict == "inconclusive"


def test_no_worse_than_zero_shot_is_paired():
    base = judged(share(150, 300))
    better = judged(share(180, 300))
    assert one(better, base, no_worse_than="zero_shot").verdict == "pass"
    same = one(base, dataclasses.replace(base, made_by={"method": "zero_shot"}), no_worse_than="zero_shot", margin=0.02)
    assert (same.verdict, same.value) == ("pass", 0.0)
    assert one(base, base, no_worse_than="zero_shot").verdict == "inconclusive"
    worse = one(judged(share(120, 300)), base, no_worse_than="zero_shot", margin=0.02)
    assert worse.verdict == "fail"
    assert "change of accuracy against zero-shot is -10.0 points" in worse.reason
    assert "at least -2 points" in worse.reason


def test_no_worse_than_per_group_finds_the_group_that_lost():
    before, after = by_site(a=(100, 200), b=(150, 200)), by_site(a=(180, 200), b=(120, 200))
    found = one(after, before, no_worse_than="zero_shot", group="site", margin=0.02)
    assert (found.verdict, found.group) == ("fail", "b")
    assert found.value == pytest.approx(-0.15)


def test_calibration_is_better_when_lower():
    right = share(270, 300)
    calibrated, overconfident = judged(right, confidence=0.9), judged(right, confidence=0.999)
    assert one(calibrated, metric="ece", at_most=0.06).verdict == "pass"
    assert one(overconfident, metric="ece", at_most=0.02).verdict == "fail"
    assert one(calibrated, overconfident, metric="ece", no_worse_than="zero_shot").verdict == "pass"
    assert one(overconfident, calibrated, metric="ece", no_worse_than="zero_shot").verdict == "fail"


def test_groups_too_small_for_calibration_are_inconclusive():
    model = by_site(a=(90, 100), b=(90, 100))
    thin = Predictions(model.ids, model.labels, np.random.default_rng(0).dirichlet(np.ones(8), 200).astype(np.float32),
                       model.class_names, model.groups)  # fmt: skip
    found = one(thin, metric="ece", at_most=0.9, group="site")
    assert found.verdict == "inconclusive"
    assert "is not known: 100 images for" in found.reason


def test_mean_per_class_gate_says_which_classes_it_cannot_speak_for():
    model = judged(share(190, 200))
    missing = Predictions(model.ids, model.labels, np.pad(model.probs, ((0, 0), (0, 1))), (*model.class_names, "z"))
    found = one(missing, metric="mean_per_class_accuracy", at_least=0.8)
    # Nothing is known of a class without images, so a claim about all classes cannot be decided.
    assert found.verdict == "inconclusive"
    assert "0 images of the smallest class" in found.reason
    assert one(model, metric="mean_per_class_accuracy", at_least=0.8).verdict == "pass"


def test_many_images_of_few_patients_are_inconclusive():
    clusters = tuple(f"p{i % 5}" for i in range(400))
    found = one(judged(np.ones(400), clusters=clusters), at_least=0.5)
    assert found.verdict == "inconclusive"
    assert "5 clusters, and at least 8 are needed" in found.reason
    patients = judged(np.repeat(share(32, 40), 10), clusters=tuple(f"p{i // 10}" for i in range(400)))
    assert one(patients, at_least=0.72).verdict == "inconclusive"
    assert one(judged(np.repeat(share(32, 40), 10)), at_least=0.72).verdict == "pass"


def test_no_rules_are_not_a_pass():
    assert check_gates(judged([True]), None, []) == []
    assert overall_verdict([]) == "none"
    assert exit_code([]) == 3


def test_exit_codes():
    verdicts = {v.verdict: v for v in (one(judged(share(160, 200)), at_least=limit) for limit in (0.7, 0.8, 0.9))}
    assert exit_code([verdicts["pass"]]) == 0
    assert exit_code([verdicts["pass"], verdicts["inconclusive"]]) == 3
    assert exit_code([verdicts["inconclusive"], verdicts["fail"], verdicts["pass"]]) == 2
    assert overall_verdict(list(verdicts.values())) == "fail"


def test_verdicts_are_frozen_and_json_able():
    found = one(by_site(a=(190, 200), b=(110, 200)), at_least=0.8, group="site")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["groups"][0]["group"] == "b"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.verdict = "pass"  # pyright: ignore[reportAttributeAccessIssue]


def test_rules_that_do_not_fit_the_predictions():
    model = by_site(a=(190, 200))
    with pytest.raises(GateError, match=r"no group attribute 'sight'.*Did you mean \"site\""):
        one(model, at_least=0.5, group="sight")
    with pytest.raises(GateError, match="no group columns at all"):
        one(judged([True]), at_least=0.5, group="site")
    with pytest.raises(GateError, match="no zero-shot predictions were given"):
        one(model, no_worse_than="zero_shot")
    with pytest.raises(GateError, match="top-5 accuracy says nothing about 5 classes"):
        one(judged([True, False], num_classes=5), metric="top5_accuracy", at_least=0.9)
    with pytest.raises(DataError, match="same images"):
        one(model, judged([True]), no_worse_than="zero_shot")
    empty = Predictions((), np.zeros(0, int), np.zeros((0, 2)), ("a", "b"))
    with pytest.raises(GateError, match="no rows"):
        one(empty, at_least=0.5)


def test_load_gates(tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text(
        "gates:\n- {metric: accuracy, at_least: 0.6}\n- {group: sex, no_worse_than: zero_shot, margin: 0.02}\n"
    )
    assert load_gates(path) == [
        GateRule(at_least=0.6),
        GateRule(group="sex", no_worse_than="zero_shot", margin=0.02),
    ]
    path.write_text("gates: []\n")
    assert load_gates(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: [{metric: acuracy, at_least: 0.6}]", r'gate 1: unknown metric \'acuracy\'.*Did you mean "accuracy"'),
        ("gates: [{at_least: 0.6}, {at_leats: 0.6}]", r'gate 2: .*unknown field "at_leats".*Did you mean "at_least"'),
        ("gates: [{metric: accuracy}]", r"exactly one of at_least, at_most, no_worse_than, gap_at_most .*; got none"),
        ("gates: [{at_least: 0.6, at_most: 0.9}]", "exactly one of"),
        ("gates: [{at_least: high}]", "gate 1: at_least: .*number.*'high'"),
        ("gates: [{at_least: 0.6, confidence: 95}]", "gate 1: confidence: .*less than 1.*95"),
        ("gates: [{at_least: 0,5}]", "gate 1: 5 stands alone after a comma.*write 0.5, not 0,5"),
        ("gates:\n- at_least: 0,5", "gate 1: at_least: has a decimal comma; write 0.5"),
        ("gates: [{at_least: yes}]", "gate 1: at_least: should be a number; yes.*got True"),
        ("{metric: accuracy, at_least: 0.6}", r"a rule by itself; put `gates:` above it .* gates: \[{metric"),
        ("gates: [accuracy]", "gate 1 should be a mapping such as"),
        ("gates: {metric: accuracy}", 'a list of rules under the key "gates", got dict'),
        ("gate: []", 'unknown key "gate". Did you mean "gates"'),
        ("{}", 'a list of rules under the key "gates", got NoneType'),
    ],
)
def test_load_gates_names_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(GateError, match=message):
        load_gates(path)


def test_a_plain_list_of_rules_is_told_where_its_key_goes(tmp_path):
    (tmp_path / "gates.yaml").write_text("- {metric: accuracy, at_least: 0.6}\n")
    with pytest.raises(StorageError, match="should be a list of rules with a line `gates:` above it, got list"):
        load_gates(tmp_path / "gates.yaml")


def test_load_gates_of_a_missing_file(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere\.yaml"):
        load_gates(tmp_path / "nowhere.yaml")
