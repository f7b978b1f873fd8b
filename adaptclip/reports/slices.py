# SPDX-License-Identifier: Apache-2.0
"""Slices that nobody named: parts of the images in which a model errs, found on validation images for a test to judge.

Looked at are the pairs of what is known of an image (its groups, its class), such as the images of one class at one
site, and clusters of images whose features are alike. What is found on images cannot be tested on the same ones: of
many slices, some look bad by chance. So validation images only propose a few, and test images judge each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.metrics.estimates import MIN_CLUSTERS, mean_of
from adaptclip.metrics.gaps import gap_test, holm
from adaptclip.reports.bias import p_cell
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    number,
    one_line,
    points,
    rate,
    show_points,
    text,
)
from adaptclip.reports.measuring import difference, encode, sampling_of

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Sampling
    from adaptclip.predictions import Predictions

MIN_VALIDATION = 20
"""Validation images that a slice needs to be looked at."""

MIN_TEST = 30
"""Test images that it needs to be looked at, as each of them might have to be tested."""

MOST_SLICES = 5
"""Slices that are proposed: each further one makes it harder to be sure of any."""

MOST_CLUSTERS = 8
"""Clusters of images with like features."""

_LEAST_SCORE = 1.0
"""Standard errors by which a slice does worse on validation images before it is proposed."""

_SAME = 0.5
"""Two slices are one where they have this part of the images of both in common."""

_NEARLY_ALL = 0.8
"""A pair with this part of the images of one of its halves is that half, which has a name."""

_MOST_CELLS = 2_000_000
_MOST_FITTED = 20_000
_NEAREST = 3


@dataclass(frozen=True)
class Slice:
    """A part of the images.

    Attributes:
        words: what its images have in common.
        validation: (M,) bool, its images among the validation images that were looked at.
        test: (N,) bool, its test images.
        right: share of its validation images that are right, which is too low: it was picked for that.
        halves: (N,) bool, the test images of either half of a pair; none of a cluster.
        nearest: positions of the test images that are most like all of them, where it is a cluster of features.
    """

    words: str
    validation: np.ndarray
    test: np.ndarray
    right: float
    halves: tuple[np.ndarray, ...] = ()
    nearest: tuple[int, ...] = ()


@dataclass(frozen=True)
class Search:
    """What was looked at and found.

    Attributes:
        slices: those that are proposed, the worst on validation images first; at most MOST_SLICES.
        num_pairs: pairs of groups and classes that were looked at.
        num_clusters: clusters of features that were looked at.
        num_validation: validation images on which they were.
    """

    slices: tuple[Slice, ...]
    num_pairs: int
    num_clusters: int
    num_validation: int


_Candidate = tuple[float, Callable[[], Slice]]
"""Standard errors by which it does worse on validation images, and what makes the slice."""


def find_slices(validation: Predictions, test: Predictions, *, seed: int = 0) -> Search:
    """Proposes slices in which a model does badly on validation images; its answers on test images are not looked at.

    A pair is proposed where it does worse than the rest of either half: what one group has by itself its own table
    tells. Single groups, single classes and declared intersections have tables and are passed over. Features are taken
    less the mean of the image's class, so that clusters are not the classes over again. Validation images of clusters
    (patients) that are among the test images too are left out.

    Args:
        validation: predictions of M images that are neither trained on nor judged.
        test: predictions of the N judged images, of the same classes.
        seed: of the clusters.
    """
    rows = _apart(validation, test)
    right = (validation.pred == validation.labels)[rows]
    pairs = list(_pairs(validation, test, rows, right))
    clusters = list(_clusters(validation, test, rows, right, seed))
    found: list[Slice] = []
    unit = sampling_of(test).unit
    for score, make in sorted([*pairs, *clusters], key=lambda candidate: -candidate[0]):
        if score < _LEAST_SCORE or len(found) == MOST_SLICES:
            break
        made = make()
        units = min(len(np.unique(unit[part])) for part in (made.test, ~made.test))
        if units >= MIN_CLUSTERS and not any(_same(made, other) for other in found):
            found.append(made)
    return Search(tuple(found), len(pairs), len(clusters), len(rows))


def _apart(validation: Predictions, test: Predictions) -> np.ndarray:
    """Positions of the validation images whose cluster has no test image."""
    if validation.clusters is None or test.clusters is None:
        return np.arange(len(validation))
    known = set(test.clusters)
    return np.array([i for i, cluster in enumerate(validation.clusters) if cluster not in known], np.int64)


def _same(a: Slice, b: Slice) -> bool:
    return bool((a.validation & b.validation).sum() >= _SAME * (a.validation | b.validation).sum())


def _worse(right: np.ndarray, n: np.ndarray, all_right: np.ndarray, all_n: np.ndarray) -> np.ndarray:
    """Standard errors by which parts are less accurate than the rest of what holds them; 0 where there is no rest.

    Args:
        right: right images of each part.
        n: images of each part.
        all_right: right images of what holds the part.
        all_n: images of that.
    """
    rest = np.maximum(all_n - n, 0)
    pooled = (all_right + 1) / (all_n + 2)
    error = np.sqrt(pooled * (1 - pooled) * (1 / np.maximum(n, 1) + 1 / np.maximum(rest, 1)))
    return np.where(rest > 0, ((all_right - right) / np.maximum(rest, 1) - right / np.maximum(n, 1)) / error, 0.0)


@dataclass(frozen=True)
class _Column:
    """What is known of every image, as codes of its values.

    Attributes:
        name: of the group column, or "class".
        values: K.
        validation: (M,) code of each validation image.
        test: (N,) code of each test image.
    """

    name: str
    values: tuple[str, ...]
    validation: np.ndarray
    test: np.ndarray


def _columns(validation: Predictions, test: Predictions, rows: np.ndarray) -> list[_Column]:
    columns = [_Column("class", test.class_names, validation.labels[rows], test.labels)]
    for name in test.groups:
        if name in validation.groups:
            values, codes = encode([*validation.groups[name], *test.groups[name]])
            columns.append(_Column(name, values, codes[: len(validation)][rows], codes[len(validation) :]))
    return columns


def _pairs(validation: Predictions, test: Predictions, rows: np.ndarray, right: np.ndarray) -> Iterator[_Candidate]:
    """Pairs of values that have images enough, each with how much worse than the rest of its halves it does."""
    declared = {frozenset(names) for names in test.intersections}
    for a, b in combinations(_columns(validation, test, rows), 2):
        size = (len(a.values), len(b.values))
        if frozenset((a.name, b.name)) in declared or size[0] * size[1] > _MOST_CELLS:
            continue
        cell, cell_test = a.validation * size[1] + b.validation, a.test * size[1] + b.test
        n, hits = (np.bincount(cell, w, minlength=size[0] * size[1]).reshape(size) for w in (None, right))
        n_test = np.bincount(cell_test, minlength=size[0] * size[1]).reshape(size)
        halves = [(hits.sum(axis=k, keepdims=True), n.sum(axis=k, keepdims=True)) for k in (0, 1)]
        part_of_both = n <= _NEARLY_ALL * np.minimum(halves[0][1], halves[1][1])
        scores = np.minimum(*(_worse(hits, n, *half) for half in halves))
        for i, j in np.argwhere((n >= MIN_VALIDATION) & (n_test >= MIN_TEST) & part_of_both):
            yield float(scores[i, j]), partial(_pair, a, b, int(i), int(j), float(hits[i, j] / n[i, j]))


def _pair(a: _Column, b: _Column, i: int, j: int, right: float) -> Slice:
    halves = a.test == i, b.test == j
    own = (a.validation == i) & (b.validation == j)
    return Slice(f"{a.name} = {a.values[i]}, {b.name} = {b.values[j]}", own, halves[0] & halves[1], right, halves)


def _clusters(
    validation: Predictions, test: Predictions, rows: np.ndarray, right: np.ndarray, seed: int
) -> Iterator[_Candidate]:
    """Clusters of images whose features are alike (k-means), with how much worse than the other images each does."""
    number = min(MOST_CLUSTERS, len(rows) // MIN_VALIDATION)
    if validation.features is None or test.features is None or number < 2:
        return
    from sklearn.cluster import KMeans  # a second to import, and only here

    own, labels = validation.features[rows], validation.labels[rows]
    counts = np.bincount(labels, minlength=len(test.class_names))
    means = np.zeros((len(counts), own.shape[1]), np.float32)
    np.add.at(means, labels, own)
    # A class without validation images has none of its own, and is told by what all images have in common.
    means = np.where(counts[:, None] > 0, means / np.maximum(counts, 1)[:, None], own.mean(axis=0)).astype(np.float32)
    some = np.random.default_rng(seed).permutation(len(rows))[:_MOST_FITTED]
    fitted = KMeans(number, random_state=seed).fit(own[some] - means[labels[some]])
    of, of_test = fitted.predict(own - means[labels]), np.empty(len(test), np.int64)
    distance = np.empty(len(test), np.float32)
    for start in range(0, len(test), _MOST_FITTED):
        part = slice(start, start + _MOST_FITTED)
        away = fitted.transform(test.features[part] - means[test.labels[part]])
        of_test[part], distance[part] = away.argmin(axis=1), away.min(axis=1)
    n, hits = np.bincount(of, minlength=number), np.bincount(of, right, minlength=number)
    scores = _worse(hits, n, np.asarray(right.sum()), np.asarray(len(rows)))
    enough = (n >= MIN_VALIDATION) & (np.bincount(of_test, minlength=number) >= MIN_TEST)
    for c in np.flatnonzero(enough):
        inside = np.flatnonzero(of_test == c)
        nearest = inside[np.argsort(distance[inside], kind="stable")[:_NEAREST]]
        words = f"cluster {c + 1} of {number} of images that look alike"
        made = Slice(
            words, np.equal(of, c), np.equal(of_test, c), float(hits[c] / n[c]), nearest=tuple(map(int, nearest))
        )
        yield float(scores[c]), partial(_itself, made)


def _itself(made: Slice) -> Slice:
    return made


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
        tested), "worse", and for clusters of features "classes" (the commonest, with their share) and "nearest"
        (names of images));
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
        found["nearest"] = [predictions.names[i] for i in slice_.nearest]
    return found


def _by_class(predictions: Predictions, right: np.ndarray) -> np.ndarray:
    """(N,) accuracy of each image's class."""
    sizes = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    return (np.bincount(predictions.labels, right, minlength=len(sizes)) / np.maximum(sizes, 1))[predictions.labels]


def slice_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """Slices that are less accurate beyond what chance explains."""
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
        f"Less accurate by more than chance explains: {worse} of {len(tested)}. Where a model does worse is no "
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
