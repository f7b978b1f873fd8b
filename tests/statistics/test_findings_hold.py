# SPDX-License-Identifier: Apache-2.0
"""Findings of patients with several images, some of them not known: intervals cover the truth."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from adaptclip.gate_rules import Outcome
from adaptclip.metrics import LABELS_METRICS, find_metric
from adaptclip.prediction_files import shares
from adaptclip.predictions import Predictions
from adaptclip.reports.any_of import rows_asked
from adaptclip.reports.measuring import judged, two_sided

PREVALENCE, SKILL = np.array([0.4, 0.3, 0.25]), np.array([2.0, 1.5, 1.0])
OF_FINDING = ("sensitivity", "specificity", "ppv", "npv", "auc", "average_precision", "outcome_brier")


def drawn(rng: np.random.Generator, patients: int) -> Predictions:
    """Three images of a patient are alike in what they show and in how the model errs; of a fifth it is not known.

    A finding of ill patients is known more often, as where only they are examined; which images are known says nothing
    else, so that the truth is that of the known ones.
    """
    unit = np.repeat(np.arange(patients), 3)
    ill = rng.random((patients, 3)) < PREVALENCE
    shown = np.where(rng.random((len(unit), 3)) < 0.8, ill[unit], rng.random((len(unit), 3)) < PREVALENCE)
    noise = 0.7 * rng.normal(size=(patients, 3))[unit] + 0.7 * rng.normal(size=(len(unit), 3))
    given = (1 / (1 + np.exp(-(noise + SKILL * shown - 1)))).astype(np.float32)
    known = rng.random((len(unit), 3)) < np.where(shown, 0.9, 0.7)
    return Predictions(
        tuple(map(str, range(len(unit)))), (shown & known).argmax(axis=1), shares(given), tuple("abc"),
        clusters=tuple(map(str, unit)), sigmoid=given, positive=shown & known, known=known,
    )  # fmt: skip


@cache
def coverage() -> dict[str, float]:
    """How often 95 % intervals of 150 patients hold what endless patients give."""
    rng = np.random.default_rng(0)
    endless, data = drawn(rng, 20_000), [drawn(rng, 150) for _ in range(150)]
    outcome = Outcome(positive=("b",))
    assert rows_asked(endless, outcome) is not None
    found = {}
    for names, view in ((LABELS_METRICS, lambda p: judged(p)), (OF_FINDING, lambda p: judged(two_sided(p, outcome)))):
        truth: dict[str, Any] = {name: find_metric(name).value(view(endless)) for name in names}
        seen = [view(p) for p in data]
        for name in names:
            ends: list[Any] = [find_metric(name).compare(one).model.interval(0.95) for one in seen]
            found[name] = float(np.mean([low <= truth[name] <= high for low, high in ends]))
    return found


@pytest.mark.parametrize("name", [*LABELS_METRICS, *OF_FINDING])
def test_intervals_cover_the_truth(name):
    # 150 sets tell a coverage of 95 % to within 4.7 points (2.6 standard errors).
    assert coverage()[name] >= 0.90
