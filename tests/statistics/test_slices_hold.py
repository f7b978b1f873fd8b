# SPDX-License-Identifier: Apache-2.0
"""Slices that nobody named: seldom found where there is none, mostly found where there is one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from adaptclip.metrics.gaps import holm
from adaptclip.predictions import Predictions
from adaptclip.reports.slices import slice_report

CLASSES = 3
SITES, SEXES, DEVICES = 4, 2, 3


def part(
    rng: np.random.Generator, n: int, prefix: str, *, bad: float = 1.0, whole: float = 0.85, size: int = 1
) -> Predictions:
    """Images of which 85 % are right, of one sex `whole`, and of that sex at one site `bad` of these.

    `size` images of a patient are alike.
    """
    unit = np.repeat(np.arange(n // size), size)
    site, sex, device = (rng.integers(0, k, n // size)[unit] for k in (SITES, SEXES, DEVICES))
    labels = rng.integers(0, CLASSES, len(unit))
    rate = np.where(sex == 1, whole, 0.85) * np.where((site == 1) & (sex == 1), bad, 1.0)
    if size > 1:
        rate = rng.beta(2 * rate[::size], 2 * (1 - rate[::size]))[unit]
    answer = np.where(rng.random(len(unit)) < rate, labels, (labels + 1) % CLASSES)
    groups = {"site": site, "sex": sex, "device": device}
    columns: dict[str, Any] = {name: tuple(f"{name[0]}{v}" for v in values) for name, values in groups.items()}
    return Predictions(
        tuple(f"{prefix}{i}" for i in range(len(unit))), labels, np.eye(CLASSES, dtype=np.float32)[answer],
        tuple("abc"), columns, tuple(f"{prefix}{u}" for u in unit) if size > 1 else None,
    )  # fmt: skip


@cache
def found(repeats: int, **world: Any) -> list[dict[str, Any]]:
    rng, reports = np.random.default_rng(0), []
    for repeat in range(repeats):
        report = slice_report(part(rng, 1200, "t", **world), part(rng, 600, "v", **world), draws=400, seed=repeat)
        assert report is not None
        reports.append(report)
    return reports


def alarms(reports: list[dict[str, Any]]) -> int:
    return sum(any(entry["worse"] for entry in report["tested"]) for report in reports)


def test_without_a_bad_slice_five_of_a_hundred_studies_find_one():
    """Some thirty slices are looked at, and up to five tested; one sex is bad as a whole, which is no finding."""
    reports = found(200, whole=0.6)
    assert np.mean([len(report["tested"]) for report in reports]) > 3
    assert min(report["num_pairs"] for report in reports) > 30
    for tested in (report["tested"] for report in reports):
        assert [e["p_holm"] for e in tested] == pytest.approx(holm([e["p_value"] for e in tested]).tolist())
    assert binom.ppf(0.01, 200, 0.02) <= alarms(reports) <= binom.isf(0.001, 200, 0.05)


def test_patients_whose_images_are_alike_raise_no_more_alarms():
    reports = found(100, size=6)
    assert np.mean([len(report["tested"]) for report in reports]) > 1
    assert alarms(reports) <= binom.isf(0.001, 100, 0.05)


def test_a_bad_slice_that_nobody_named_is_found():
    reports = found(40, bad=0.7)
    named = [[e["slice"] for e in report["tested"] if e["worse"]] for report in reports]
    assert sum("site = s1, sex = s1" in names for names in named) >= 34
    # Others that hold some of its images are less accurate too; those that hold none are not.
    apart = [name for names in named for name in names if "site = s1" not in name and "sex = s1" not in name]
    assert len(apart) <= 4
