# SPDX-License-Identifier: Apache-2.0
"""Where slices are looked for, what is proposed, and what a report says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report
from adaptclip.reports.headline import worries
from adaptclip.reports.render import to_html, to_markdown
from adaptclip.reports.slices import MOST_SLICES, find_slices, slice_report


def part(prefix: str, n: int = 480, *, wrong: str = "", dark: bool = False, seed: int = 0) -> Predictions:
    """Nine of ten images are right, and of those of site 1 and sex 1 (wrong="pair") or of dark ones, half."""
    rng = np.random.default_rng(seed)
    site, sex, labels = np.arange(n) % 3, np.arange(n) // 3 % 2, np.arange(n) // 6 % 2
    features = rng.normal(0, 0.1, (n, 4)).astype(np.float32)
    features[:, 0] += labels  # a class looks like itself, and dark images like each other
    is_dark = np.arange(n) % 5 == 0
    features[is_dark, 1] += 1
    rate = np.where((wrong == "pair") & (site == 1) & (sex == 1) | (wrong == "dark") & is_dark, 0.5, 0.9)
    right = rng.random(n) < rate
    columns: dict[str, Any] = {"site": tuple(f"s{i}" for i in site), "sex": tuple("fm"[i] for i in sex)}
    return Predictions(
        tuple(f"{prefix}{i}" for i in range(n)), labels,
        np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)],
        ("cat", "dog"), columns, features=features if dark else None,
    )  # fmt: skip


def test_a_pair_of_groups_is_found_and_judged_by_test_images():
    report = slice_report(part("t", wrong="pair", seed=1), part("v", wrong="pair"))
    assert report is not None
    worst = report["tested"][0]
    assert worst["slice"] == "site = s1, sex = m"
    assert worst["worse"]
    assert (worst["accuracy"]["n"], worst["rest"]["n"], worst["n_validation"]) == (80, 400, 80)
    assert worst["difference"]["value"] == pytest.approx(worst["accuracy"]["value"] - worst["rest"]["value"])
    assert worst["difference"]["high"] < 0
    # 3 sites x 2 sexes, 3 x 2 classes, 2 x 2: pairs with 20 images and more.
    assert (report["num_pairs"], report["num_clusters"], report["num_validation"]) == (16, 0, 480)
    assert len(report["tested"]) <= MOST_SLICES


def test_test_images_decide_and_are_not_searched():
    """Bad on validation images only: proposed, and not found worse. Bad on test images only: not proposed."""
    alone = slice_report(part("t", seed=1), part("v", wrong="pair"))
    assert alone is not None
    assert alone["tested"][0]["slice"] == "site = s1, sex = m"
    assert not alone["tested"][0]["worse"]
    never = part("v")
    never = replace(never, probs=np.eye(2, dtype=np.float32)[never.labels])
    nothing = slice_report(part("t", wrong="pair", seed=1), never)
    assert nothing is not None
    assert nothing["tested"] == []
    swapped = part("t", wrong="pair", seed=1)
    swapped = replace(swapped, probs=swapped.probs[:, ::-1].copy())
    first, second = (find_slices(part("v", wrong="pair"), test) for test in (part("t", seed=1), swapped))
    assert [s.words for s in first.slices] == [s.words for s in second.slices]


def test_a_group_that_is_bad_as_a_whole_makes_no_finding_of_its_parts():
    """Everything of sex m is bad on test images: a part of it is less accurate than all others, and no worse than m."""
    test = part("t", seed=1)
    male = np.array(test.groups["sex"]) == "m"
    rng = np.random.default_rng(2)
    answer = np.where(rng.random(480) < np.where(male, 0.55, 0.95), test.labels, 1 - test.labels)
    test = replace(test, probs=np.eye(2, dtype=np.float32)[answer])
    report = slice_report(test, part("v", wrong="pair"))
    assert report is not None
    first = report["tested"][0]
    assert first["slice"] == "site = s1, sex = m"
    assert first["difference"]["high"] < 0
    assert not first["worse"]


def test_what_the_mix_of_classes_brings_about_is_told():
    test = part("t", seed=1)
    answer = np.where((test.labels == 1) & (np.arange(480) % 2 == 0), 0, test.labels)
    test = replace(test, probs=np.eye(2, dtype=np.float32)[answer])
    report = slice_report(test, part("v", wrong="pair"))
    assert report is not None
    right, labels = answer == test.labels, test.labels
    inside = (np.array(test.groups["site"]) == "s1") & (np.array(test.groups["sex"]) == "m")
    alone = np.mean([right[labels == c].mean() for c in labels[inside]]) - right[~inside].mean()
    assert report["tested"][0]["by_classes"] == pytest.approx(alone)


def test_declared_intersections_and_halves_that_have_a_name_are_passed_over():
    validation, test = part("v", wrong="pair"), part("t", wrong="pair", seed=1)
    declared = find_slices(validation, replace(test, intersections=(("site", "sex"),)))
    assert declared.num_pairs == 10
    assert not any("site" in s.words and "sex" in s.words for s in declared.slices)
    # A second name for the sites: each pair with one of its own values is that site.
    same = [replace(p, groups={**p.groups, "clinic": p.groups["site"]}) for p in (validation, test)]
    assert not any("clinic" in s.words and "site" in s.words for s in find_slices(same[0], same[1]).slices)
    # What a whole group has by itself is no slice of it.
    whole = [replace(p, groups={"sex": p.groups["sex"], "hand": tuple("lr"[i % 7 % 2] for i in range(480))})
             for p in (part("v"), part("t"))]  # fmt: skip
    for k, p in enumerate(whole):
        male = np.array(p.groups["sex"]) == "m"
        answer = np.where(male & (np.arange(480) % 11 < 5), 1 - p.labels, p.labels)
        whole[k] = replace(p, probs=np.eye(2, dtype=np.float32)[answer])
    assert not any(s.words == "sex = m, hand = l" and s.right < 0.3 for s in find_slices(whole[0], whole[1]).slices)


def test_like_images_are_found_by_their_features_and_not_by_their_class():
    validation, test = part("v", wrong="dark", dark=True), part("t", wrong="dark", dark=True, seed=1)
    report = slice_report(test, validation)
    assert report is not None
    assert report["num_clusters"] > 1
    worst = report["tested"][0]
    assert worst["slice"].startswith("cluster ")
    assert worst["worse"]
    assert {int(name[1:]) % 5 for name in worst["nearest"]} == {0}, "the most typical ones are dark"
    assert max(share for _, share in worst["classes"]) < 0.7, "images of both classes"
    again = slice_report(test, validation)
    assert again == report


def test_validation_images_of_patients_that_are_tested_are_left_out():
    validation, test = part("v", wrong="pair"), part("t", wrong="pair", seed=1)
    patients = [tuple(f"{k}{i // 4}" for i in range(480)) for k in "vt"]
    half = (*patients[1][:240], *patients[0][240:])
    search = find_slices(replace(validation, clusters=half), replace(test, clusters=patients[1]))
    assert search.num_validation == 240
    few = tuple(f"t{i % 6}" for i in range(480))  # six patients say nothing of others
    assert find_slices(replace(validation, clusters=patients[0]), replace(test, clusters=few)).slices == ()


def test_what_was_looked_at_stands_in_the_report():
    validation, test = part("v", wrong="pair"), part("t", wrong="pair", seed=1)
    report = full_report(test, validation=validation, draws=1000)
    for page in (to_markdown(report), to_html(report)):
        words = " ".join(page.split())
        assert "Slices nobody named" in words
        assert "16 pairs of groups (or of a group and a class), each with 20 validation and 30 test images" in words
        assert f"Holm-corrected over the {len(report['slices']['tested'])} slices that were tested" in words
    assert any("in slices that nobody named: site = s1, sex = m (" in worry for worry in worries(report, None))
    few = full_report(test, validation=part("v", 30), draws=1000)
    assert "On 30 validation images nothing could be looked at" in to_markdown(few)
    assert "So nothing is known of slices" in to_markdown(few)
    assert full_report(test, draws=1000)["slices"] is None


def test_features_have_a_row_for_each_image():
    with pytest.raises(DataError, match=r"a row for each of 480 images, got shape \(3, 4\)"):
        replace(part("t"), features=np.zeros((3, 4), np.float32))
