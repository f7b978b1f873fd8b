# SPDX-License-Identifier: Apache-2.0
"""Verdicts on levels, changes and groups turn where the exact tests do; what they name, count and say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from adaptclip.gate_rules import GateRule, Outcome
from adaptclip.gates import check_gates
from adaptclip.gates.sample_size import More
from adaptclip.gates.verdicts import Verdict, exit_code, overall_verdict
from adaptclip.gates.wording import more_words, shown
from adaptclip.metrics.intervals import PairedSpread
from adaptclip.metrics.metric import Support
from adaptclip.predictions import Predictions


def answers(right, sites=None, **fields) -> Any:
    """Two classes by turns, of which some images are right; all probabilities differ."""
    right = np.asarray(right, bool)
    n = len(right)
    labels = np.arange(n) % 2
    sure = np.linspace(0.6, 0.9, n)
    own = np.where(right, sure, 1 - sure)
    probs = np.where(labels[:, None] == np.arange(2), own[:, None], 1 - own[:, None]).astype(np.float32)
    groups = {} if sites is None else {"site": tuple(sites)}
    return Predictions(tuple(map(str, range(n))), labels, probs, ("ill", "well"), groups, **fields)


def by_site(**counts) -> Any:
    right = np.concatenate([np.arange(n) < k for k, n in counts.values()])
    return answers(right, [site for site, (_, n) in counts.items() for _ in range(n)])


def one(model, base=None, **rule) -> Any:
    return check_gates(model, base, [GateRule(**rule)])[0]


@pytest.mark.parametrize("k", range(140, 182, 3))
def test_a_group_of_three_fails_by_the_exact_test_at_a_third_of_alpha(k):
    model = by_site(a=(k, 200), b=(190, 200), c=(192, 200))
    found = {v.group: v for v in one(model, at_least=0.8, group="site").groups}["a"]
    passes, fails = binom.sf(k - 1, 200, 0.8) <= 0.05, binom.cdf(k, 200, 0.8) < 0.05 / 3
    assert found.verdict == ("pass" if passes else "fail" if fails else "inconclusive")


@pytest.mark.parametrize("wrong", range(4, 40, 3))
def test_an_error_rate_turns_at_the_exact_tests_too(wrong):
    labels = np.arange(200) % 2
    right = np.ones(200, bool)
    right[np.flatnonzero(labels == 0)[:wrong]] = False
    model = answers(right)
    found = one(model, metric="fnr", positive=("ill",), at_most=0.2)
    passes, fails = binom.cdf(wrong, 100, 0.2) <= 0.05, binom.sf(wrong - 1, 100, 0.2) < 0.05
    assert found.verdict == ("pass" if passes else "fail" if fails else "inconclusive")
    assert found.value == pytest.approx(wrong / 100)
    assert found.low < found.value < found.high
    assert (found.limit, found.kind, found.n) == (0.2, "level", 100)


@pytest.mark.parametrize("better", [True, False])
def test_a_change_is_judged_against_minus_the_margin(better):
    before = np.arange(400) < 300
    now = np.arange(400) < (300 + (8 if better else -8))
    metric = {"metric": "accuracy", "no_worse_than": "zero_shot"}
    model, base = answers(now), replace(answers(before), made_by={"method": "zero_shot"})
    gained, lost = (now & ~before).mean(), (before & ~now).mean()
    bounds = [PairedSpread(gained, lost, 400, 400).bound(side, 0.05, exact=True) for side in ("low", "high")]
    found = one(model, base, **metric, margin=0.2)
    assert (found.low, found.high) == pytest.approx(tuple(bounds))
    assert (found.kind, found.limit, found.value) == ("change", -0.2, pytest.approx(gained - lost))
    if not better:
        assert one(model, base, **metric, margin=-bounds[0] + 1e-6).verdict == "pass"
        assert one(model, base, **metric, margin=-bounds[0] - 1e-6).verdict == "inconclusive"
        assert one(model, base, **metric, margin=max(-bounds[1] - 1e-6, 0)).verdict == "fail"
    assert one(model, base, **metric).limit == 0


def test_a_change_of_an_error_rate_has_the_margin_above():
    before = np.ones(400, bool)
    now = before.copy()
    now[:20:2] = False  # ten positive images are missed
    rule = {"metric": "fnr", "positive": ("ill",), "no_worse_than": "zero_shot"}
    base = replace(answers(before), made_by={"method": "zero_shot"})
    found = one(answers(now), base, **rule, margin=0.2)
    assert (found.verdict, found.limit, found.value) == ("pass", 0.2, pytest.approx(0.05))
    assert one(answers(now), base, **rule, margin=0.01).verdict == "fail"
    assert "change of false negative rate (ill) against zero-shot is +5.0 points" in found.reason


def test_groups_are_ordered_worst_first_in_the_metrics_own_direction():
    model = by_site(a=(150, 200), b=(160, 200), c=(155, 200))
    found = one(model, at_least=0.76, group="site")
    assert [v.group for v in found.groups] == ["a", "c", "b"]
    assert {v.verdict for v in found.groups} == {"inconclusive"}
    labels = model.labels == 0
    missed = one(model, metric="fnr", positive=("ill",), at_most=0.24, group="site", min_n=30)
    rates = {s: (~(model.pred == model.labels)[labels & (np.array(model.groups["site"]) == s)]).mean() for s in "abc"}
    assert [v.group for v in missed.groups] == sorted(rates, key=lambda s: -rates[s])


def test_the_reason_of_a_family_names_those_with_the_same_verdict():
    three = one(by_site(a=(190, 200), b=(189, 200), c=(191, 200)), at_least=0.8, group="site")
    assert three.reason.startswith("All 3 groups pass; the worst: the accuracy for site = b")
    single = one(by_site(a=(190, 200)), at_least=0.8, group="site")
    assert single.reason.startswith("The accuracy for site = a")
    unsure = one(by_site(a=(160, 200), b=(158, 200), c=(195, 200)), at_least=0.76, group="site")
    assert unsure.verdict == "inconclusive"
    more = unsure.groups[1].more_images
    assert f"The same verdict for a (about {more:,} more) (of 3 groups)." in unsure.reason


@pytest.mark.parametrize("metric", ["accuracy", "sensitivity"])
def test_noise_is_that_of_the_images_that_are_counted(metric):
    """Only positive images say what noise gives sensitivities; a gap without values of images has none."""
    about = {"metric": metric, "positive": ("ill",)} if metric != "accuracy" else {}
    sites = ["a", "b"] * 2 * 150
    sites[1::4], sites[2::4] = ["a"] * 150, ["b"] * 150  # every second pair of neighbours goes to one site
    model = answers(np.random.default_rng(0).random(600) < 0.8, sites)
    found = one(model, group="site", gap_at_most=0.3, at_least=0.1, **about)
    n = 150 if metric == "sensitivity" else 300
    usual = 1.96 * np.sqrt(0.16 * 2 / n)
    said = float(found.reason.split("a gap of up to ")[1].split(" points")[0]) / 100
    assert said == pytest.approx(usual, rel=0.2)


def test_metrics_that_are_no_means_over_images_have_no_noise():
    model = answers(np.random.default_rng(0).random(600) < 0.8, ["a", "b", "b", "a"] * 150)
    found = one(model, metric="mean_per_class_accuracy", group="site", gap_at_most=0.3, at_least=0.1)
    assert "Noise" not in found.reason
    single = one(answers(np.ones(200), ["a"] * 200), group="site", gap_at_most=0.3, at_least=0.1)
    assert single.verdict == "inconclusive"
    no_positives = answers(np.arange(400) % 3 > 0, ["a" if i % 2 else "b" for i in range(400)])
    lone = one(no_positives, metric="sensitivity", positive=("ill",), group="site", gap_at_most=0.3, at_least=0.1)
    assert "Noise" not in lone.reason


def test_the_decision_rule_is_said_where_it_decides():
    outcome = Outcome(positive=("ill",), threshold=0.3)
    model = answers(np.arange(200) % 10 > 0, outcomes=(outcome,))
    rate = one(model, metric="sensitivity", positive=("ill",), at_least=0.5)
    assert rate.reason.endswith(" Decision rule: positive above a probability of 0.3.")
    assert "Decision rule" not in one(model, metric="auc", positive=("ill",), at_least=0.5).reason
    assert "Decision rule" not in one(model, at_least=0.5).reason
    plain = one(answers(np.arange(200) % 10 > 0), metric="sensitivity", positive=("ill",), at_least=0.5)
    assert "Decision rule" not in plain.reason


def test_clusters_are_counted_beside_images():
    patients = tuple(f"p{i // 5}" for i in range(300))
    right = np.repeat(np.arange(60) % 5 > 0, 5)
    model = answers(right, clusters=patients)
    found = one(model, at_least=0.76)
    assert found.verdict == "inconclusive"
    assert found.more_clusters == -(-found.more_images // 5)
    assert f"About {found.more_clusters:,} more clusters of 5 images would settle it" in found.reason


def test_nothing_is_said_of_further_images_where_there_is_no_interval():
    few = one(answers(np.ones(300), clusters=tuple(f"p{i % 5}" for i in range(300))), at_least=0.5)
    assert (few.verdict, few.more_images, few.more_clusters) == ("inconclusive", None, None)


def test_one_worst_verdict_decides_the_release():
    one_of = {
        c: Verdict("t", "m", None, None, c, 0.5, 0.4, 0.6, 9, 0.95, "r") for c in ("pass", "inconclusive", "fail")
    }
    assert overall_verdict([one_of["pass"]]) == "pass"
    assert overall_verdict([one_of["pass"], one_of["inconclusive"]]) == "inconclusive"
    assert overall_verdict([one_of["inconclusive"], one_of["fail"], one_of["pass"]]) == "fail"
    assert overall_verdict([]) == "none"
    assert [exit_code([v]) for v in one_of.values()] == [0, 3, 2]
    assert exit_code([]) == 3
    plain = one_of["pass"]
    assert (plain.groups, plain.excluded, plain.images, plain.gates, plain.kind) == ((), (), "", "", "level")
    assert (plain.more_images, plain.more_clusters, plain.limit, plain.asks_little) == (None, None, None, False)


def test_values_are_shown_in_the_metrics_unit():
    accuracy, brier = GateRule(at_least=0.5), GateRule(metric="brier", at_most=0.5)
    change = GateRule(no_worse_than="r")
    assert shown(accuracy, 0.1234) == "12.3 %"
    assert shown(accuracy, 0.125, "g") == "12.5 %"
    assert shown(accuracy, 0.1, signed=True) == "+10.0 points"
    assert shown(change, -0.1234) == "-12.3 points"
    assert shown(change, 0.1, signed=False) == "10.0 %"
    assert shown(brier, 0.12345) == "0.123"
    assert shown(brier, 0.12345, "g") == "0.12345"
    assert shown(brier, 0.12345, signed=True) == "+0.123"


SETTLE, EVEN = "would settle it, either way, with", "an even chance"
NONE = "No realistic number of further images would settle it: ten times as many might well not."
CLOSE = "; for a chance of 80 % no number is realistic, as close as it may be to the limit."


@pytest.mark.parametrize(
    ("more", "lacking", "words"),
    [
        (None, None, ""),
        (More(1, 1), None, f" About 1 more image of x {SETTLE} {EVEN}."),
        (More(15, 3000), None, f" About 15 more images of x {SETTLE} {EVEN}, about 3,000 with one of 80 %."),
        (More(1500, 1500), None, f" About 1,500 more images of x {SETTLE} {EVEN}."),
        (More(20, None), None, f" About 20 more images of x {SETTLE} {EVEN}{CLOSE}"),
        (More(None, None), None, f" {NONE}"),
        (
            More(21, 40, 2.5),
            None,
            f" About 9 more clusters of 2.5 images of x {SETTLE} {EVEN}, about 16 with one of 80 %.",
        ),
        (More(21, 21, 4.0), None, f" About 6 more clusters of 4 images of x {SETTLE} {EVEN}."),
        (More(70, 70), Support(30), " At least 70 more images of x are needed."),
        (None, Support(30), " At least 70 more images of x are needed."),
        (
            More(71, 71),
            Support(30),
            f" At least 70 more images of x are needed. About 71 more images of x {SETTLE} {EVEN}.",
        ),
        (
            More(None, None),
            Support(30, "positive images", 130),
            f" At least 100 more positive images of x are needed. {NONE}",
        ),
    ],
)
def test_words_of_how_many_more(more, lacking, words):
    assert more_words(GateRule(at_least=0.5), more, " of x", lacking) == words


def test_images_that_a_metric_counts_are_named():
    rule = GateRule(metric="sensitivity", positive=("ill",), at_least=0.5)
    assert more_words(rule, More(1500, 1500), "") == f" About 1,500 more positive images {SETTLE} {EVEN}."


def test_reasons_say_directions_notes_and_groups():
    model = answers(np.arange(200) < 180)
    rate: Any = {"metric": "fnr", "positive": ("ill",)}
    assert one(model, **rate, at_most=0.5).reason.startswith(
        "The false negative rate (ill) is 10.0 % on 100 positive images and, with 95 % confidence, at most 16.4 %; "
        "the rule asks for at most 50 %."
    )
    failed = one(model, **rate, at_most=0.01).reason
    assert failed.endswith("and, with 95 % confidence, at least 5.5 %; the rule asks for at most 1 %.")
    assert (
        "the rule asks for at most 10 %, but the data only show at most 16.4 %"
        in one(model, **rate, at_most=0.1).reason
    )
    noted = one(model, metric="ppv", positive=("ill",), at_least=0.5, min_n=1).reason
    assert noted.endswith(" (at the 50 % of positive images here; no prevalence declared.)")
    small = one(by_site(a=(190, 200), small=(55, 60)), at_least=0.5, group="site").reason
    assert small.endswith("At least 40 more images of site = small are needed.")
    alone = one(by_site(a=(100, 200), b=(190, 200)), at_least=0.8, group="site").reason
    assert "The same verdict" not in alone


def test_words_of_a_verdict():
    model = answers(np.arange(200) < 150)
    few = one(model, at_least=0.5, min_n=300)
    assert few.reason.startswith("The accuracy is 75.0 % on 200 images, too few for a verdict: the rule asks for 300.")
    assert few.more_images == 100
    smallest = one(model, metric="mean_per_class_accuracy", at_least=0.5, min_n=150)
    assert "on 200 images (100 images of the smallest class), too few" in smallest.reason
    passing = one(model, at_least=0.6)
    assert "75.0 % on 200 images and, with 95 % confidence, at least 69." in passing.reason
    assert passing.reason.endswith("; the rule asks for at least 60 %.")
    failing = one(model, at_least=0.9)
    assert "with 95 % confidence, at most 80.0 %" in failing.reason
    assert failing.reason.endswith("; the rule asks for at least 90 %.")
    unsure = one(model, at_least=0.75)
    assert "the rule asks for at least 75 %, but the data only show at least 69." in unsure.reason
    silent = one(model, metric="ppv", positive=("ill",), at_least=0.5, threshold=0.95, min_n=1)
    assert silent.reason.startswith("The positive predictive value (ill) is not known: no image is called positive.")
    below = one(model, metric="ece", at_most=0.9)
    assert "at most" in below.reason.split("the rule asks for ")[1]
    groups = one(by_site(a=(100, 200), b=(199, 200)), at_least=0.9, group="site")
    assert "with 95 % confidence over 2 groups, at most" in groups.reason
