# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.predictions import Predictions
from adaptclip.reports.probe import ndkl, probe_report


def images(n=400):
    groups = {"sex": ("f", "m") * (n // 2)}
    probs = np.full((n, 2), 0.5, np.float32)
    return Predictions(tuple(map(str, range(n))), np.arange(n) % 2, probs, ("a", "b"), groups)


def test_planted_associations_and_skews_are_found():
    model, rng = images(), np.random.default_rng(0)
    female = np.arange(400) % 2 == 0
    before = rng.normal(size=(400, 4))
    now = before.copy()
    now[female, 2] += 3.0
    report = probe_report(model, {"bad": ["thief"], "good": ["saint"]}, now, before, k=50, draws=1000)
    json.dumps(report, allow_nan=False)
    part = report["association"]["groups"]["sex"]["bad"]
    rates = {row["group"]: row for row in part["rows"]}
    expected = (now[female].argmax(1) == 2).mean()
    assert rates["f"]["model"]["value"] == pytest.approx(expected)
    assert rates["f"]["change"]["low"] > 0.3
    assert rates["m"]["change"]["value"] == 0
    assert (part["gap"]["best_group"], part["gap"]["p_value"] < 0.01) == ("f", True)
    ranked = {row["query"]: row for row in report["retrieval"]["sex"]}
    top = now[:, 2].argsort()[::-1][:50]
    assert ranked["thief"]["max_skew"] == pytest.approx(np.log(female[top].mean() / 0.5))
    assert ranked["thief"]["max_skew_group"] == "f"
    assert ranked["thief"]["p_value"] < 0.01
    assert ranked["thief"]["ndkl"] > ranked["thief"]["ndkl_null_95"]
    assert ranked["saint"]["p_value"] > 0.01


def test_ndkl_by_hand():
    assert ndkl(np.array([[0, 1]]), np.array([5, 5]))[0] == pytest.approx(np.log(2) / (1 + 1 / np.log2(3)))


def test_bad_input():
    with pytest.raises(DataError, match="at least one word"):
        probe_report(images(), {}, np.zeros((400, 2)))
    with pytest.raises(DataError, match=r"should be \(400, 3\)"):
        probe_report(images(), {"x": ["y"]}, np.zeros((400, 2)))
