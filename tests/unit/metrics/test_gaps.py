# SPDX-License-Identifier: Apache-2.0
"""AUC, Brier score and fairlearn's differences against other libraries; permutation nulls with known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    demographic_parity_ratio,
    equal_opportunity_difference,
    equalized_odds_difference,
    selection_rate,
)
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from adaptclip.gate_rules import Outcome
from adaptclip.metrics import METRICS
from adaptclip.metrics.calibration import brier_values
from adaptclip.metrics.estimates import variance
from adaptclip.metrics.gaps import gap_test, holm
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.ranking import macro_auc
from adaptclip.predictions import Predictions
from adaptclip.reports.bias import group_table
from adaptclip.reports.measuring import threshold_for, two_sided
from adaptclip.reports.outcomes import class_rates


def random_predictions(seed, n=600, c=3, **fields):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    probs = rng.dirichlet(np.ones(c), n)
    probs[np.arange(n), labels] += 0.4
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    groups = {"sex": tuple(rng.choice(["f", "m", "x"], n))}
    names = tuple(f"c{i}" for i in range(c))
    return Predictions(tuple(map(str, range(n))), labels, probs, names, groups, **fields)


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_brier_agree_with_scikit_learn_ties_included(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 50)])
    probs = (rng.integers(1, 5, (54, 4)) / 4.0).astype(np.float64)
    probs /= probs.sum(axis=1, keepdims=True)
    found = macro_auc(probs, labels)
    assert found is not None
    assert found.value == pytest.approx(np.mean([roc_auc_score(labels == k, probs[:, k]) for k in range(4)]))
    assert found.influence.sum() == pytest.approx(0, abs=1e-12)
    expected = ((probs - np.eye(4)[labels]) ** 2).sum(axis=1).mean()
    assert brier_values(probs, labels).mean() == pytest.approx(expected)
    assert macro_auc(probs, np.zeros(54, int)) is None


def test_variance_of_the_auc_is_that_of_repeated_samples():
    rng = np.random.default_rng(0)
    labels, values, found = np.repeat([0, 1], [60, 40]), [], []
    for _ in range(600):
        positive = 1 / (1 + np.exp(-rng.normal(1.2 * labels, 1)))
        images = Judged(labels, np.stack([1 - positive, positive], axis=1), Sampling.of(100))
        part = METRICS["auc"].estimate(images)
        values.append(part.value)
        found.append(variance(part, images.sampling, 1.0).value)
    assert np.mean(found) == pytest.approx(np.var(values), rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_differences_are_fairlearns(seed):
    outcome = Outcome(positive=("c0", "c1"))
    model = random_predictions(seed, outcomes=(outcome,))
    table = group_table(model, None, "sex", draws=1000)
    judged = two_sided(model, outcome)
    given: dict[str, Any] = {
        "y_true": judged.labels,
        "y_pred": judged.pred,
        "sensitive_features": np.array(model.groups["sex"]),
    }
    [part] = table["outcomes"]
    for function in (demographic_parity_difference, demographic_parity_ratio, equal_opportunity_difference,
                     equalized_odds_difference):  # fmt: skip
        assert part[function.__name__] == pytest.approx(function(**given))
    by_class = {row["class"]: row for row in table["one_vs_rest"]["classes"]}
    assert len(by_class) == 3
    for c, row in enumerate(by_class[f"c{i}"] for i in range(3)):
        given |= {"y_true": model.labels == c, "y_pred": model.pred == c}
        for function in (demographic_parity_difference, demographic_parity_ratio, equal_opportunity_difference,
                         equalized_odds_difference):  # fmt: skip
            assert row[function.__name__] == pytest.approx(function(**given))
        frame = MetricFrame(metrics=selection_rate, **given)
        assert {g: v["value"] for g, v in row["selection_rate"].items()} == pytest.approx(dict(frame.by_group))


def test_a_group_without_positives_is_left_out_and_not_counted_as_zero():
    labels = np.concatenate([np.tile([0, 1], 50), np.ones(50, int)])
    probs = np.where(labels[:, None] == np.arange(2), 0.8, 0.2).astype(np.float32)
    groups = {"site": ("a",) * 50 + ("b",) * 50 + ("c",) * 50}
    outcome = Outcome(positive=("x",))
    model = Predictions(tuple(map(str, range(150))), labels, probs, ("x", "y"), groups, outcomes=(outcome,))
    [part] = group_table(model, None, "site", draws=1000)["outcomes"]
    assert part["left_out"] == ["a", "b", "c"]
    assert part["equal_opportunity_difference"] is None
    assert part["rows"][2]["sensitivity"]["model"]["value"] is None
    assert class_rates(labels, model.pred, np.repeat([0, 1, 2], 50), 3, 2)[0].tolist() == [[25, 25], [25, 25], [0, 50]]


@pytest.mark.parametrize("groups", [2, 6, 12])
@pytest.mark.parametrize("clustered", [False, True])
def test_equal_groups_rarely_show_a_gap(groups, clustered):
    rng, fired, repeats = np.random.default_rng(groups), 0, 60
    code = np.repeat(np.arange(groups), 60)
    clusters = np.arange(groups * 60) // 3 if clustered else None
    sampling = Sampling.of(groups * 60, clusters)
    for seed in range(repeats):
        right = rng.random(groups * 60) < 0.8
        right = right[clusters * 3] if clusters is not None else right
        fired += gap_test(right, code, sampling, draws=1000, seed=seed).p_value <= 0.05
    assert fired <= binom.isf(0.001, repeats, 0.05)


def test_a_planted_gap_is_found_and_its_group_named():
    rng = np.random.default_rng(0)
    code = np.repeat(np.arange(4), 400)
    test = gap_test(rng.random(1600) < np.where(code == 2, 0.65, 0.85), code)
    assert (test.worst, test.p_value < 0.01) == (2, True)
    assert holm(test.rest_p)[2] < 0.05
    assert test.value > test.null_quantile


def test_groups_whose_patients_differ_in_how_alike_they_are_raise_no_alarms():
    """10 patients with all images alike against 200 independent ones, equal accuracy: labels dealt out raised 42 %."""
    rng, fired, repeats = np.random.default_rng(1), 0, 120
    unit = np.concatenate([np.repeat(np.arange(10), 20), 10 + np.arange(200)])
    code = np.repeat([0, 1], 200)
    for seed in range(repeats):
        right = np.concatenate([np.repeat(rng.random(10) < 0.8, 20), rng.random(200) < 0.8])
        fired += gap_test(right, code, Sampling.of(400, unit), draws=1000, seed=seed).p_value <= 0.05
    assert fired <= binom.isf(0.001, repeats, 0.05)


def test_clusters_of_one_image_are_independent_images():
    rng = np.random.default_rng(1)
    code, right = rng.integers(0, 3, 300), rng.random(300) < 0.7
    exact, again = (
        gap_test(right, code, draws=4000),
        gap_test(right, code, Sampling.of(300, np.arange(300)), draws=4000),
    )
    assert exact.p_value == again.p_value
    assert exact.null_quantile == again.null_quantile


def test_clusters_over_several_groups_move_these_together():
    """Every patient has an image in each group and all fare alike: the groups' means hardly differ by chance."""
    rng = np.random.default_rng(2)
    patient, code = np.repeat(np.arange(80), 2), np.tile([0, 1], 80)
    right = np.where(rng.random(160) < 0.05, rng.random(160) < 0.7, (rng.random(80) < 0.7)[patient])
    together = gap_test(right, code, Sampling.of(160, patient), draws=4000)
    apart = gap_test(right, code, draws=4000)
    assert together.null_quantile < 0.6 * apart.null_quantile


def test_holm():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).tolist() == []


@pytest.mark.parametrize(("metric", "rate"), [("sensitivity", 0.9), ("specificity", 0.8), ("sensitivity", 1.0)])
def test_a_threshold_chosen_on_validation_keeps_its_rate_there(metric, rate):
    model, outcome = random_predictions(3), Outcome(positive=("c0",))
    t = threshold_for(metric, rate, model, outcome)
    moved = two_sided(model, Outcome(positive=("c0",), threshold=t))
    side = moved.labels == (metric == "sensitivity")
    assert (moved.pred == moved.labels)[side].mean() >= rate
