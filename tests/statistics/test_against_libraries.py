# SPDX-License-Identifier: Apache-2.0
"""Every number that other libraries give too is theirs: statsmodels, scikit-learn, MAPIE, and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from scipy.stats import binomtest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score, log_loss, roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from adaptclip.metrics import METRICS
from adaptclip.metrics.calibration import log_loss_values
from adaptclip.metrics.estimates import variance
from adaptclip.metrics.gaps import holm
from adaptclip.metrics.intervals import exact_bound, wilson
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.predictions import Predictions
from adaptclip.reports.confidence import conformal_sets
from adaptclip.reports.measuring import sign_test


class Answers(ClassifierMixin, BaseEstimator):
    """A classifier for MAPIE whose features are the probabilities."""

    classes_ = np.arange(4)

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        return np.asarray(x)

    def predict(self, x):
        return self.predict_proba(x).argmax(axis=1)

    def __sklearn_is_fitted__(self):
        return True


def softened(seed, n=300, c=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    probs = rng.dirichlet(np.ones(c), n)
    probs[np.arange(n), labels] += 0.3
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    return Judged(labels, probs / probs.sum(axis=1, keepdims=True), Sampling.of(n))


@pytest.mark.parametrize(("count", "n"), [(0, 12), (7, 12), (12, 12), (250, 300)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_and_clopper_pearson_are_statsmodels(count, n, confidence):
    alpha = 1 - confidence
    assert wilson(count, n, confidence) == pytest.approx(proportion_confint(count, n, alpha, "wilson"), abs=1e-9)
    own = tuple(exact_bound(count / n, n, side, alpha / 2) for side in ("low", "high"))
    assert own == pytest.approx(proportion_confint(count, n, alpha, "beta"), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_paired_changes_are_tested_as_mcnemar_does(seed):
    rng = np.random.default_rng(seed)
    now, before = rng.random(80) < 0.8, rng.random(80) < 0.65
    table = [[int((now & before).sum()), int((now & ~before).sum())],
             [int((~now & before).sum()), int((~now & ~before).sum())]]  # fmt: skip
    expected: Any = mcnemar(table, exact=True)
    assert sign_test(now, before, np.arange(80)) == pytest.approx(expected.pvalue)
    assert expected.pvalue == pytest.approx(binomtest(table[0][1], table[0][1] + table[1][0]).pvalue)


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_statsmodels(seed):
    p = np.random.default_rng(seed).beta(0.5, 3, 17)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    judged = softened(seed)
    labels, probs = judged.labels, judged.probs.astype(np.float64)
    probs /= probs.sum(axis=1, keepdims=True)
    answer = probs.argmax(axis=1)
    expected = {
        "mean_per_class_accuracy": balanced_accuracy_score(labels, answer),
        "macro_f1": f1_score(labels, answer, average="macro"),
        "macro_auc": roc_auc_score(labels, probs, multi_class="ovr", average="macro"),
    }
    for name, value in expected.items():
        assert METRICS[name].value(judged) == pytest.approx(value, abs=1e-6)
    assert log_loss_values(judged.probs, labels).mean() == pytest.approx(log_loss(labels, probs), abs=1e-6)
    two = Judged(labels % 2, np.stack([1 - probs[:, 0], probs[:, 0]], 1).astype(np.float32), judged.sampling)
    # Of two classes the score over both is twice that over one (Brier 1950 against scikit-learn).
    assert METRICS["brier"].value(two) == pytest.approx(2 * brier_score_loss(labels % 2, probs[:, 0]), abs=1e-6)


def delong_variance(positives, negatives):
    """DeLong et al. 1988, by loops over pairs."""
    kernel = np.array([[1.0 if p > q else 0.5 if p == q else 0.0 for q in negatives] for p in positives])
    return kernel.mean(axis=1).var(ddof=1) / len(positives) + kernel.mean(axis=0).var(ddof=1) / len(negatives)


def test_variance_of_the_auc_is_delongs():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [70, 50])
    score = np.round(1 / (1 + np.exp(-rng.normal(labels, 1))), 2)  # rounded: ties count half
    judged = Judged(labels, np.stack([1 - score, score], axis=1), Sampling.of(120))
    estimate = METRICS["auc"].estimate(judged)
    found = variance(estimate, judged.sampling, 1.0).value
    assert found == pytest.approx(delong_variance(score[labels == 1], score[labels == 0]), rel=1e-6)


@pytest.mark.parametrize("n", [19, 50, 133])
def test_conformal_sets_hold_the_classes_of_an_independent_computation(n):
    """The k-th smallest of 1 - p(true class), k = ceil((n + 1) 0.9): split conformal prediction (Vovk), MAPIE's lac."""
    judged = softened(n, n)
    names = tuple(f"c{i}" for i in range(4))
    validation = Predictions(tuple(map(str, range(n))), judged.labels, judged.probs, names)
    scores = sorted(1 - float(judged.probs[i, judged.labels[i]]) for i in range(n))
    limit = scores[int(np.ceil((n + 1) * 0.9 - 1e-9)) - 1]
    test = softened(n + 1).probs
    expected = np.array([[1 - float(p) <= limit + 1e-7 for p in row] for row in test])
    found = conformal_sets(validation, 0.9).members(test)
    assert (found == expected).all()
    theirs = SplitConformalClassifier(Answers(), confidence_level=0.9, prefit=True, conformity_score="lac")
    theirs.conformalize(judged.probs, judged.labels)
    assert (found == theirs.predict_set(test)[1][..., 0]).all()
