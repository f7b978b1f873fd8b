# SPDX-License-Identifier: Apache-2.0
"""Planned numbers of images against searches written out here, on the same assumptions."""

from __future__ import annotations

from math import asin, ceil, sqrt
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import beta, binom, chi2, norm, t

from adaptclip.errors import GateError
from adaptclip.gate_rules import GateRule
from adaptclip.gates.sample_size import Assumed, Planned, plan
from adaptclip.metrics.intervals import tango_bound

Z = norm.isf(0.05)


def rate_power(truth, limit, size, df=None):
    """Chance that the exact bound of so many images lies above the limit."""
    n = size if df is None else size * (Z / t.isf(0.05, df)) ** 2
    if beta.ppf(0.05, n, 1) < limit:
        return 0.0
    critical: Any = brentq(lambda p: beta.ppf(0.05, p * n, n - p * n + 1) - limit, limit, 1 - 1e-9)
    return norm.cdf(2 * sqrt(size) * (asin(sqrt(truth)) - asin(sqrt(critical))))


def smallest(power, asked, least=2):
    """The smallest whole number with a power as asked; the power rises."""
    low, high = least - 1, least
    while power(high) < asked:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= asked else (middle, high)
    return high


def one(assumed, **fields) -> Planned:
    return plan([GateRule(**fields)], assumed)[0]


@pytest.mark.parametrize(("truth", "limit", "power"), [(0.88, 0.8, 0.8), (0.75, 0.7, 0.9)])
def test_independent_images(truth, limit, power):
    found = one(Assumed(truth, power=power), at_least=limit)
    expected = smallest(lambda n: rate_power(truth, limit, n), power, 100)
    assert found.images == pytest.approx(expected, abs=1)
    assert (found.patients, found.groups, found.in_group, found.counted) == (None, 1, found.images, found.images)
    assert found.power is not None
    assert power <= found.power < power + 0.01
    assert found.words == f"Assumes a true accuracy of {truth:g}; independent images."
    assert found.to_dict()["images"] == found.images
    turned = one(
        Assumed(1 - truth, power=power, prevalence=0.5), metric="selection_rate", positive=("ill",), at_most=1 - limit
    )
    assert turned.images == pytest.approx(max(expected, 30), abs=1)


def test_every_group_has_to_pass():
    found = one(Assumed(0.9, groups={"site": 6}), at_least=0.8, group="site")
    expected = smallest(lambda n: rate_power(0.9, 0.8, n), 0.8 ** (1 / 6), 100)
    assert found.in_group == pytest.approx(expected, abs=1)
    assert found.images == 6 * (found.in_group or 0)
    assert found.groups == 6
    assert 0.8 <= (found.power or 0) < 0.82
    assert "; 6 equally large, independent groups of which every one has to pass; independent" in found.words


@pytest.mark.parametrize("icc", [0.0, 0.5])
def test_patients_are_worth_less_and_cost_degrees_of_freedom(icc):
    found = one(Assumed(0.9, per_patient=4, icc=icc), at_least=0.8)

    def power(patients):
        return rate_power(0.9, 0.8, 4 * patients / (1 + 3 * icc), patients - 1)

    expected = smallest(power, 0.8, 25)
    assert found.patients == pytest.approx(expected, abs=1)
    assert found.images == 4 * (found.patients or 0)
    assert f"; patients with 4 images whose correlation is {icc:g}." in found.words


def test_eight_patients_are_the_fewest():
    found = one(Assumed(0.999, per_patient=100, icc=0.0), at_least=0.1)
    assert (found.patients, found.images) == (8, 800)


@pytest.mark.parametrize(("metric", "share"), [("sensitivity", 0.2), ("specificity", 0.8)])
def test_images_of_one_side_come_by_chance(metric, share):
    found = one(Assumed(0.9, prevalence=0.2), metric=metric, positive=("ill",), at_least=0.8)

    def power(images):
        chances = (np.arange(25) + 0.5) / 25
        counts: Any = binom.ppf(chances, images, share).astype(int)
        return sum(rate_power(0.9, 0.8, k) if k >= 30 else 0.0 for k in counts.tolist()) / 25

    expected = smallest(power, 0.8, 50)
    assert found.images == pytest.approx(expected, rel=0.01)
    assert found.counted == round(share * (found.images or 0))
    assert found.kind == ("positive " if metric == "sensitivity" else "negative ")
    assert "; independent images; a prevalence of 0.2." in found.words
    many = one(Assumed(0.9, prevalence=0.2, per_patient=2), metric=metric, positive=("ill",), at_least=0.8)
    assert "; a patient's images being of one class; a prevalence" in many.words


def test_a_paired_rule_is_planned_without_a_true_change():
    found = one(Assumed(changed=0.2), no_worse_than="run", margin=0.05)

    def power(n):
        half = max(-tango_bound(0.1, 0.1, n, "low", 0.05), Z * sqrt(0.2 / n))
        error = -tango_bound(0.1, 0.1, n, "low", 0.05) / Z
        return norm.cdf((0.05 - half) / error)

    assert found.images == pytest.approx(smallest(power, 0.8, 100), abs=1)
    assert found.words == "Assumes no true change, and 20% of the answers changing; independent images."
    lower = one(
        Assumed(changed=0.2, prevalence=0.999), metric="fpr", positive=("ill",), no_worse_than="run", margin=0.05
    )
    assert (lower.counted or 0) == pytest.approx(found.images, rel=0.15)


def test_a_mean_of_classes_needs_images_of_each_and_loses_their_degrees_of_freedom():
    found = one(Assumed(0.9, classes=5), at_least=0.8, metric="mean_per_class_accuracy")

    def enough(images):
        return max(1 - 5 * binom.cdf(9, images, 0.2), 0) * chi2.cdf(images - 100, 4)

    expected = smallest(lambda n: enough(n) * rate_power(0.9, 0.8, n, max(n - 5, 1)), 0.8, 20)
    assert found.images == pytest.approx(expected, abs=1)
    assert found.words.endswith("; 5 equally frequent and equally well recognised classes.")
    patients = one(Assumed(0.9, classes=5, per_patient=3, icc=0.4), at_least=0.8, metric="mean_per_class_accuracy")

    def enough_of(units):
        return max(1 - 5 * binom.cdf(ceil(10 / 3) - 1, units, 0.2), 0) * chi2.cdf((3 * units - 100) / 3, 4)

    expected = smallest(lambda u: enough_of(u) * rate_power(0.9, 0.8, 3 * u / (1 + 2 * 0.4), max(u - 5, 1)), 0.8, 20)
    assert patients.patients == pytest.approx(expected, abs=1)


def test_many_classes_cost_degrees_of_freedom():
    found = one(Assumed(0.9, classes=60), at_least=0.8, metric="mean_per_class_accuracy", min_n=1)

    def power(n):
        enough = max(1 - 60 * binom.cdf(0, n, 1 / 60), 0) * chi2.cdf(n - 1, 59)
        return enough * rate_power(0.9, 0.8, n, max(n - 60, 1))

    assert found.images == pytest.approx(smallest(power, 0.8, 70), abs=1)
    few = one(Assumed(0.9, classes=3, power=0.5), at_least=0.8, metric="mean_per_class_accuracy", min_n=1)
    expected = smallest(lambda n: chi2.cdf(n - 1, 2) * rate_power(0.9, 0.8, n, max(n - 3, 1)), 0.5, 10)
    assert few.images == pytest.approx(expected, abs=1)


def test_patients_of_each_class_are_what_a_plan_waits_for_where_the_truth_is_far_from_the_limit():
    found = one(Assumed(0.99, classes=8, per_patient=3, icc=0.0), at_least=0.5, metric="mean_per_class_accuracy")

    def power(units):
        enough = max(1 - 8 * binom.cdf(3, units, 1 / 8), 0) * chi2.cdf((3 * units - 100) / 3, 7)
        return enough * rate_power(0.99, 0.5, 3 * units, max(units - 8, 1))

    assert found.patients == pytest.approx(smallest(power, 0.8, 20), abs=1)


def test_a_rule_of_its_own_minimum_keeps_it():
    assert one(Assumed(0.99), at_least=0.5).images == 100
    assert one(Assumed(0.99), at_least=0.5, min_n=37).images == 37
    assert one(Assumed(0.999), at_least=0.5, min_n=1).images == smallest(lambda n: rate_power(0.999, 0.5, n), 0.8)


def test_no_number_beyond_ten_million():
    found = one(Assumed(0.90001), at_least=0.9)
    assert (found.images, found.patients, found.in_group, found.counted, found.power) == (None,) * 5
    assert found.words == "No realistic number: even 10,000,000 in each group would not be enough."
    assert (one(Assumed(0.9003), at_least=0.9).images or 0) > 5_000_000


@pytest.mark.parametrize(
    ("allowed", "refused", "message"),
    [
        ({"expect": 0.999}, {"expect": 1.0}, "expect must lie between 0 and 1, got 1"),
        ({"expect": 0.9}, {"expect": 0.0}, "expect must lie"),
        ({"prevalence": 0.999}, {"prevalence": 1.0}, "prevalence must lie"),
        ({"prevalence": 0.001}, {"prevalence": 0.0}, "prevalence must lie"),
        ({"changed": 0.999}, {"changed": 1.0}, "changed must lie"),
        ({"changed": 0.001}, {"changed": 0.0}, "changed must lie"),
        ({"power": 0.5}, {"power": 0.49}, "power must be at least 0.5"),
        ({"power": 0.99}, {"power": 1.0}, "and below 1, got 1"),
        ({"icc": 0.0}, {"icc": -0.01}, "icc must lie within"),
        ({"icc": 1.0}, {"icc": 1.01}, "icc must lie within"),
        ({"per_patient": 1}, {"per_patient": 0}, "the number of images per patient is too small"),
        ({"classes": 2}, {"classes": 1}, "the number of classes is too small"),
        ({"groups": {"site": 1}}, {"groups": {"site": 0}}, "the number of groups of site is too small"),
    ],
)
def test_assumptions_at_their_limits(allowed, refused, message):
    Assumed(**allowed).check()
    with pytest.raises(GateError, match=message):
        Assumed(**refused).check()


@pytest.mark.parametrize(
    ("fields", "assumed", "message"),
    [
        ({"at_least": 0.9}, {"expect": 0.9}, "expect more than 0.9"),
        (
            {"metric": "fpr", "positive": ("ill",), "at_most": 0.1},
            {"expect": 0.1, "prevalence": 0.5},
            "expect less than 0.1",
        ),
        ({"at_least": 0.9}, {}, "which value do you expect"),
        ({"at_least": 0.9, "group": "site"}, {"expect": 0.95}, 'Say --groups "site=2"'),
        ({"at_least": 0.9}, {"expect": 0.95, "groups": {"site": 2}}, "No gate has a group"),
        ({"at_least": 0.9, "metric": "macro_f1"}, {"expect": 0.95}, "how many are there"),
        ({"no_worse_than": "run"}, {}, "passes in 5 % of cases"),
    ],
)
def test_what_can_never_pass_or_is_missing_is_named(fields, assumed, message):
    with pytest.raises(GateError, match=message):
        plan([GateRule(**fields)], Assumed(**assumed))


def test_what_no_formula_plans_is_said_and_named():
    rules = [
        GateRule(group="site", gap_at_most=0.1),
        GateRule(metric="brier", at_most=0.3),
        GateRule(metric="macro_auc", at_least=0.8),
    ]
    gap, brier, auc = plan(rules, Assumed(0.9, groups={"site": 3}, classes=3))
    assert (gap.title, gap.groups) == ("gap of accuracy by site ≤ 0.1", 3)
    assert gap.words.startswith("The largest gap between groups depends on")
    assert brier.words.startswith("How much Brier score varies")
    assert auc.words.startswith("How much AUC (mean of the classes) varies")
    assert one(Assumed(0.9, classes=3), metric="macro_f1", at_least=0.8).images is not None
