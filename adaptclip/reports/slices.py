"""Slices that nobody named: proposed on validation images, each tested once on the test images; numbers and section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adaptclip.evaluation.comparisons import difference
from adaptclip.evaluation.measuring import sampling_of
from adaptclip.evaluation.slices import MIN_TEST, MIN_VALIDATION, Slice, find_slices
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import gap_test, holm
from adaptclip.metrics.judged import Sampling
from adaptclip.reports.bias_sections import p_cell
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    one_line,
    points,
    rate,
    show_points,
    text,
)
from adaptclip.reports.numbers import number
from adaptclip.types import Predictions


def slice_report(
    predictions: Predictions,
    validation: Predictions | None,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Looks for slices on validation images, and tests whether the test images of each are answered less accurately.

    Args:
        predictions: the judged model.
        validation: the same model on images that are neither trained on nor judged; None where there are none.
        confidence: 1 - confidence is the chance of an alarm where no slice is less accurate, over all that are tested.
        draws: random deals of the tests.
        seed: of clusters and deals.

    Returns:
        JSON-able dict: "num_validation", "num_pairs" and "num_clusters" (slices that were looked at), "min_validation",
        "min_test", "tested" (list, the worst on validation images first: "slice", "n_validation",
        "validation_accuracy", "accuracy" and "rest" (numbers), "difference", "by_classes" (what of the difference the
        slice's mix of classes would bring about, each class at its own accuracy), "p_value" (one-sided, the largest of
        the tests of a slice: a pair is also compared with the rest of either half), "p_holm" (corrected for the slices
        tested), "worse", and for clusters of features "classes" (the commonest, with their share) and "nearest" (ids));
        None where there are no validation images or images may have several classes.
    """
    if validation is None or predictions.positive is not None or validation.class_names != predictions.class_names:
        return None
    search = find_slices(validation, predictions, seed=seed)
    sampling, right = sampling_of(predictions), predictions.pred == predictions.labels
    p_values = [_p_value(slice_, right, sampling, draws, seed) for slice_ in search.slices]
    tested = [
        {
            **_told(slice_, predictions, right, sampling, confidence),
            "p_value": p, "p_holm": float(corrected), "worse": bool(corrected <= 1 - confidence),
        }
        for slice_, p, corrected in zip(search.slices, p_values, holm(p_values), strict=True)
    ]  # fmt: skip
    return {
        "num_validation": search.num_validation, "num_pairs": search.num_pairs, "num_clusters": search.num_clusters,
        "min_validation": MIN_VALIDATION, "min_test": MIN_TEST, "tested": tested,
    }  # fmt: skip


def _p_value(slice_: Slice, right: np.ndarray, sampling: Sampling, draws: int, seed: int) -> float:
    """One-sided p-value that a slice is less accurate than all other images and, of a pair, than the rest of each half.

    All of these have to show it (an intersection-union test), so that a group that does badly as a whole does not make
    each of its parts a finding.
    """
    found = []
    for whole in (np.ones(len(right), bool), *slice_.halves):
        rows = np.flatnonzero(whole)
        own = slice_.test[rows].astype(np.int64)
        if not own.all():
            test = gap_test(right[rows], own, sampling.take(rows), draws=draws, seed=seed)
            found.append(float(test.below_p[1]))
    return max(found)


def _told(
    slice_: Slice, predictions: Predictions, right: np.ndarray, sampling: Sampling, confidence: float
) -> dict[str, Any]:
    inside, outside = (np.flatnonzero(part) for part in (slice_.test, ~slice_.test))
    own, rest = (mean_of(right[rows], sampling.take(rows)) for rows in (inside, outside))
    found: dict[str, Any] = {
        "slice": slice_.words, "n_validation": int(slice_.validation.sum()), "validation_accuracy": slice_.right,
        "accuracy": number(own, confidence), "rest": number(rest, confidence),
        "difference": number(difference(own, rest), confidence),
        "by_classes": float(_by_class(predictions, right)[inside].mean() - right[outside].mean()),
    }  # fmt: skip
    if slice_.nearest:
        sizes = np.bincount(predictions.labels[inside], minlength=len(predictions.class_names))
        first = np.argsort(-sizes, kind="stable")[:2]
        found["classes"] = [[predictions.class_names[c], float(sizes[c] / len(inside))] for c in first if sizes[c]]
        found["nearest"] = [predictions.ids[i] for i in slice_.nearest]
    return found


def _by_class(predictions: Predictions, right: np.ndarray) -> np.ndarray:
    """(N,) accuracy of each image's class."""
    sizes = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    return (np.bincount(predictions.labels, right, minlength=len(sizes)) / np.maximum(sizes, 1))[predictions.labels]


def slice_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """Slices that are less accurate beyond what noise explains."""
    slices = report.get("slices")
    worse = [entry for entry in slices["tested"] if entry["worse"]] if slices else []
    if worse:
        named = [
            f"{one_line(e['slice'])} ({show_points(e['difference'])} points; its mix of classes alone: "
            f"{100 * e['by_classes']:+.1f})"
            for e in worse
        ]
        yield f"Less accurate than all other images, in slices that nobody named: {', '.join(named)}"


def slice_section(report: Mapping[str, Any]) -> Section | None:
    """What was looked for, what was tested, and what came of it."""
    slices = report.get("slices")
    if not slices:
        return None
    return Section("Slices nobody named", "slices", list(_blocks(slices, report["confidence"])))


def _blocks(slices: Mapping[str, Any], confidence: float) -> Iterator[Block]:
    tested = slices["tested"]
    looked = slices["num_pairs"] + slices["num_clusters"]
    enough = f"{slices['min_validation']} validation and {slices['min_test']} test images"
    if not looked:
        yield Paragraph(
            f"On {slices['num_validation']:,} validation images nothing could be looked at: no pair of groups (or of a "
            f"group and a class) and no cluster of images that look alike has {enough}. So nothing is known of slices."
        )
        return
    pairs, clusters = slices["num_pairs"], slices["num_clusters"]
    kinds = [f"{pairs:,} pair{'s' * (pairs != 1)} of groups (or of a group and a class)"] * (pairs > 0)
    kinds += [
        f"{clusters} cluster{'s' * (clusters != 1)} of images that look alike (by their features, less the mean of "
        "their class)"
    ] * (clusters > 0)
    yield Paragraph(
        f"Looked at on {slices['num_validation']:,} validation images: {' and '.join(kinds)}, each with {enough} or "
        "more. "
        + (
            f"Tested on the test images: the {len(tested)} that did worst there."
            if tested
            else "None of them did worse there by a standard error or more, so that none was tested."
        )
    )
    if not tested:
        return
    yield _rows(tested)
    about = [words for entry in tested if (words := _about(entry))]
    if about:
        yield Bullets(about)
    worse = sum(entry["worse"] for entry in tested)
    found = (
        f"Less accurate by more than noise explains: {worse} of {len(tested)}. Where a model does worse is no "
        "explanation of why."
        if worse
        else "None is shown to be less accurate, which does not show that there is no such slice."
    )
    yield Paragraph(
        f"{found} Tested is whether a slice is less accurate than all other test images and, of a pair, than the rest "
        f"of either half too (one-sided, at the {100 * (1 - confidence):.3g} % level, Holm-corrected over the "
        f"{len(tested)} slices that were tested). “Its mix of classes” is what of the difference there would be if "
        "each class were answered as well in the slice as everywhere. The accuracy on validation images picked the "
        "slices, and is too low for that reason."
    )


def _rows(tested: list[Mapping[str, Any]]) -> Rows:
    rows = []
    for entry in tested:
        words = "less accurate" if entry["worse"] else "noise can explain it"
        picked = f"{100 * entry['validation_accuracy']:.1f} % (n = {entry['n_validation']:,})"
        rows.append([
            text(one_line(entry["slice"])), Cell(picked, numeric=True), count(entry["accuracy"]["n"]),
            rate(entry["accuracy"]), rate(entry["rest"]), points(entry["difference"]),
            Cell(f"{100 * entry['by_classes']:+.1f}", numeric=True), p_cell(entry["p_value"]), p_cell(entry["p_holm"]),
            text(words, "fail" if entry["worse"] else ""),
        ])  # fmt: skip
    header = ["slice", "on validation images", "n", "accuracy", "all other images", "difference in points",
              "its mix of classes", "p", "p (Holm)", ""]  # fmt: skip
    scales = {3: (0.0, 1.0), 4: (0.0, 1.0), 5: change_scale(rows, 5)}
    return Rows("Slices found on validation images, judged on test images", header, rows, scales, {5: 0.0})


def _about(entry: Mapping[str, Any]) -> str:
    """What a cluster of features holds, for whoever looks at its images."""
    if "nearest" not in entry:
        return ""
    classes = ", ".join(f"{100 * share:.0f} % {one_line(name)}" for name, share in entry["classes"])
    return f"{one_line(entry['slice'])}: {classes}; most typical: {', '.join(map(one_line, entry['nearest']))}."
