# SPDX-License-Identifier: Apache-2.0
"""Plots show no more than their images allow."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import numpy as np
import pytest

from adaptclip.predictions import Predictions
from adaptclip.reports import calibration as calibration_sections
from adaptclip.reports.full import full_report
from adaptclip.reports.plots import confusion_matrix, reliability


def bin_of(confidence: float, n: int) -> dict[str, Any]:
    number = {"value": confidence, "low": confidence - 0.05, "high": confidence + 0.05}
    return {"low": confidence - 0.03, "high": confidence + 0.03, "n": n, "confidence": confidence, "accuracy": number}


def test_bins_of_few_images_are_open_points_that_no_line_joins():
    sizes = (50, 50, 9, 50)
    plot = reliability([bin_of(0.2 + 0.2 * i, n) for i, n in enumerate(sizes)], None)
    whole = reliability([bin_of(0.2 + 0.2 * i, 50) for i in range(4)], None)
    assert plot.count("<use") == whole.count("<use")  # every bin has a point
    assert plot.count("fill: none; stroke: var(--blue)") == 1 + whole.count("fill: none; stroke: var(--blue)")
    assert "opacity: 0.4" in plot
    assert "opacity: 0.4" not in whole


def test_answers_begin_where_there_are_enough_of_them(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    labels, probs = rng.integers(3, size=500), rng.dirichlet(np.ones(3), size=500).astype(np.float32)
    drawn: list[Any] = []
    monkeypatch.setattr(calibration_sections, "coverage", lambda curve, accuracy: drawn.append(curve) or "<svg></svg>")
    report = full_report(Predictions(tuple(map(str, range(500))), labels, probs, ("a", "b", "c")), draws=1000)
    assert min(report["calibration"]["selective"]["curve"])[0] < 0.01
    calibration_sections.selective_section(report, plots=True)
    assert min(point[0] for point in drawn[0]) * 500 >= 30
    assert max(point[0] for point in drawn[0]) == 1


@pytest.mark.parametrize(("n", "words"), [(9, "; open points stand for fewer than 10."), (10, "the images are.")])
def test_the_words_say_what_open_points_are(n, words):
    found = {"scores": {"surplus": {"value": 0.1}}, "bins": [bin_of(0.4, 50), bin_of(0.6, n)],
             "temperature": {"bins": None}}  # fmt: skip
    assert calibration_sections._reliability_words(found).endswith(words)


def test_long_names_keep_their_ends_and_say_themselves_in_full():
    long = [f"a<b> & the same long beginning, number {i:02d}" for i in range(3)]
    names = [*long, long[0].replace("beginning", "middle"), "short"]
    drawn = confusion_matrix(np.eye(5, dtype=int), names)
    labels = re.findall(r"<text[^>]*>(?:<title>(.*?)</title>)?([^<]*)</text>", drawn)
    axis = [(unescape(full), unescape(label)) for full, label in labels if label.startswith(("a&lt;", "short"))]
    # Both axes name every class in its order, those that are cut to the same too.
    shown = [f"a<b> & the…, number {i:02d}" for i in (0, 1, 2, 0)]
    assert axis == 2 * [*zip(names[:4], shown, strict=True), ("", "short")]
    assert "<title>short" not in drawn
    assert "<b>" not in drawn
