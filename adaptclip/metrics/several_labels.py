# SPDX-License-Identifier: Apache-2.0
"""Yes or no for each class: how well the classes of an image are named where it may have several, or none.

Rates of one class are plain shares of images. Means over the classes (macro), over all pairs of image and class (micro)
and over the images (example-based) are means of ratios of sums, with the interval of their linearised variance.
Definitions are scikit-learn's; see Zhang & Zhou 2014, section 2.2, for the example-based ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from adaptclip.metrics.estimates import Estimate, Measurement, mean, mean_of, measured, share
from adaptclip.metrics.judged import Judged, Marks, Sampling
from adaptclip.metrics.metric import MIN_IMAGES, MIN_OUTCOMES, Metric, Support
from adaptclip.metrics.ranking import mean_auc

RATES = ("sensitivity", "specificity", "precision", "f1")
"""What thresholds decide."""

NO_MARKS = "the predictions do not answer yes or no for each class"


def class_rates(marks: Marks, sampling: Sampling, c: int) -> dict[str, Measurement]:
    """Returns "auc", "average_precision" and RATES of one class.

    Args:
        marks: what the images show and were said to show.
        sampling: how they were drawn.
        c: id of the class.
    """
    positive, named = marks.positive[:, c], marks.named[:, c]

    def part(hits: np.ndarray, of: np.ndarray) -> Measurement:
        return mean_of(hits[of], sampling.take(np.flatnonzero(of)))

    own = marks.of_class(c)
    return {
        "auc": measure(mean_area(own), sampling, "needs images of the class and others"),
        "average_precision": average_precision(own),
        "sensitivity": part(named, positive),
        "specificity": part(~named, ~positive),
        "precision": part(positive, named),
        "f1": measure(mean_of_classes(own, "f1"), sampling),
    }


def measure(
    estimate: Estimate | None, sampling: Sampling, note: str = "no class for which it is defined"
) -> Measurement:
    """The estimate with its interval; without a value, and with the note, where there is none."""
    if estimate is None:
        return Measurement(None, len(sampling.unit), note=note)
    return measured(estimate, sampling)


def mean_area(marks: Marks) -> Estimate | None:
    """Mean area under the ROC curve of the classes that have images with and without them; None without one."""
    found = mean_auc(marks.probs, marks.positive)
    if found is None:
        return None
    counts = marks.positive.sum(axis=0)
    usable = (counts > 0) & (counts < len(marks.positive))
    return _estimate(found.value, found.influence, marks.positive[:, usable], least=found.least)


def average_precision(marks: Marks) -> Measurement:
    """Mean precision over the ranks of the positive images (step-wise area, not interpolated), mean of the classes.

    It has no interval: its error is not a mean over images.
    """
    from sklearn.metrics import average_precision_score

    chosen = np.flatnonzero(marks.positive.any(axis=0))
    if not len(chosen):
        return Measurement(None, len(marks.positive), note="no images of the class")
    values = [average_precision_score(marks.positive[:, k], marks.probs[:, k]) for k in chosen]
    return Measurement(float(np.mean(values)), len(marks.positive), note="no interval is computed for it")


def mean_of_classes(marks: Marks, rate: str) -> Estimate | None:
    """One of RATES, mean over the classes for which it is defined (macro); None where there is none.

    Sensitivity and F1 are of classes that have images here, specificity of those that not all images are of, precision
    of those that were named at least once.
    """
    part, whole = _sums(marks.positive, marks.named, rate)
    defined = whole.sum(axis=0) > 0
    if rate == "f1":
        defined &= marks.positive.any(axis=0)
    return _mean_ratio(part[:, defined], whole[:, defined])


def pooled(marks: Marks, rate: str) -> Estimate | None:
    """One of RATES over all pairs of image and class alike (micro)."""
    part, whole = _sums(marks.positive, marks.named, rate)
    return _mean_ratio(part.sum(axis=1, keepdims=True), whole.sum(axis=1, keepdims=True))


def exact(marks: Marks) -> Estimate:
    """Share of the images whose classes were named exactly (subset accuracy)."""
    return share((marks.named == marks.positive).all(axis=1))


def wrong_answers(marks: Marks) -> Estimate:
    """Share of wrong answers among all pairs of image and class (Hamming loss)."""
    return mean((marks.named != marks.positive).mean(axis=1))


def overlap(marks: Marks, *, f1: bool) -> Estimate:
    """Mean over the images of the F1 or Jaccard index of its classes and those named; 1 where both are none."""
    both = (marks.positive & marks.named).sum(axis=1).astype(np.float64)
    whole = (marks.positive.sum(axis=1) + marks.named.sum(axis=1)).astype(np.float64)
    part, whole = (2 * both, whole) if f1 else (both, whole - both)
    return mean(np.divide(part, whole, out=np.ones_like(part), where=whole > 0))


def _sums(positive: np.ndarray, named: np.ndarray, rate: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) numbers of which the sums over the images, divided, are the rate of each class."""
    right = positive & named
    if rate == "f1":
        return 2 * right.astype(np.int64), positive.astype(np.int64) + named
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "sensitivity": (right, positive),
        "specificity": (~positive & ~named, ~positive),
        "precision": (right, named),
    }
    return sums[rate]


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> Estimate | None:
    """Mean over the columns of sum(part) / sum(whole), both (N, K), with every sum of `whole` above 0."""
    sums = whole.sum(axis=0, dtype=np.float64)
    if not len(sums) or not sums.all():
        return None
    ratios = part.sum(axis=0) / sums
    influence = ((part - ratios * whole) / sums).mean(axis=1)
    return _estimate(float(ratios.mean()), influence, whole)


def _estimate(value: float, influence: np.ndarray, whole: np.ndarray, least: float = 0.0) -> Estimate:
    """A mean of ratios; it rests on the images in `whole` (N, K), of which every column counts alike."""
    weights = (whole / whole.sum(axis=0)).mean(axis=1)
    trials = max(1, round(1 / float((weights**2).sum())))
    return Estimate(value, influence, weights, least=least, n=trials)


def _support(judged: Judged) -> tuple[Support, ...]:
    """All images, and of the class with fewest either those that show it or those that do not."""
    marks = judged.marks
    if marks is None:
        return (Support(0),)
    counts = marks.positive.sum(axis=0)
    rarest = int(np.minimum(counts, len(judged) - counts).min())
    return (
        Support(len(judged), "images", MIN_IMAGES),
        Support(rarest, "images on the smaller side of the rarest class", MIN_OUTCOMES),
    )


def _metric(
    name: str,
    words: str,
    find: Callable[[Marks], Estimate | None],
    *,
    over_classes: bool = False,
    better: str = "higher",
) -> Metric:
    def estimate(judged: Judged) -> Estimate:
        assert judged.marks is not None
        found = find(judged.marks)
        assert found is not None
        return found

    def undefined(judged: Judged) -> str:
        if judged.marks is None:
            return NO_MARKS
        return "no class for which it is defined" if find(judged.marks) is None else ""

    return Metric(
        name, words, words, estimate, better=better, of_labels=True, decides=True, undefined=undefined,  # type: ignore[arg-type]
        support=_support if over_classes else lambda judged: (Support(len(judged)),),
    )  # fmt: skip


SEVERAL_LABELS = (
    _metric("subset_accuracy", "share of images with exactly their classes", exact),
    _metric("hamming_loss", "share of wrong answers (Hamming loss)", wrong_answers, better="lower"),
    _metric("example_f1", "F1, mean of the images", partial(overlap, f1=True)),
    _metric("example_jaccard", "Jaccard index, mean of the images", partial(overlap, f1=False)),
    *(
        _metric(
            f"labels_macro_{rate}",
            f"{words}, mean of the classes",
            partial(mean_of_classes, rate=rate),
            over_classes=True,
        )
        for rate, words in zip(RATES, ("sensitivity", "specificity", "precision", "F1"), strict=True)
    ),
    *(
        _metric(f"labels_micro_{rate}", f"{words}, of all answers", partial(pooled, rate=rate))
        for rate, words in zip(RATES, ("sensitivity", "specificity", "precision", "F1"), strict=True)
    ),
    _metric("labels_macro_auc", "AUC, mean of the classes by themselves", mean_area, over_classes=True),
)
"""Metrics of images that may have several classes, or none."""
