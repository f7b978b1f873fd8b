# SPDX-License-Identifier: Apache-2.0
"""Yes or no for each class: how well the classes of an image are named where it may have several, or none.

Rates of one class are plain shares of images. Means over the classes (macro), over all pairs of image and class (micro)
and over the images (example-based) are means of ratios of sums, with the interval of their linearised variance.
Definitions are scikit-learn's; see Zhang & Zhou 2014, section 2.2, for the example-based ones.

Where it is not known whether an image shows a class, that pair of image and class counts nowhere: rates, areas and
precisions of a class are those of the images of which it is known, and an image is judged by its known classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from adaptclip.metrics.estimates import Estimate, Measurement, mean, mean_of, measured, share
from adaptclip.metrics.judged import Judged, Marks, Sampling
from adaptclip.metrics.metric import MIN_IMAGES, MIN_OUTCOMES, Metric, Support
from adaptclip.metrics.ranking import average_precision as ranked_precision
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
    positive, absent, named = marks.positive[:, c], marks.absent[:, c], marks.named[:, c]

    def part(hits: np.ndarray, of: np.ndarray) -> Measurement:
        return mean_of(hits[of], sampling.take(np.flatnonzero(of)))

    own = marks.of_class(c)
    return {
        "auc": measure(mean_area(own), sampling, "needs images of the class and others"),
        "average_precision": measure(mean_precision(own), sampling, "no images of the class"),
        "sensitivity": part(named, positive),
        "specificity": part(~named, absent),
        "precision": part(positive, named & (positive | absent)),
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
    found = mean_auc(marks.probs, marks.positive, marks.absent)
    if found is None:
        return None
    usable = marks.positive.any(axis=0) & marks.absent.any(axis=0)
    return _estimate(found.value, found.influence, marks.positive[:, usable], least=found.least)


def mean_precision(marks: Marks) -> Estimate | None:
    """Average precision (`ranking.average_precision`), mean of the classes that have images; None without one."""
    chosen = np.flatnonzero(marks.positive.any(axis=0))
    if not len(chosen):
        return None
    total, influence = 0.0, np.zeros(len(marks.probs))
    for c in chosen:
        rows = np.flatnonzero(marks.certain[:, c])
        found = ranked_precision(marks.probs[rows, c], marks.positive[rows, c])
        total += found.value
        influence[rows] += found.influence
    return _estimate(total / len(chosen), influence / len(chosen), marks.positive[:, chosen])


def mean_of_classes(marks: Marks, rate: str) -> Estimate | None:
    """One of RATES, mean over the classes for which it is defined (macro); None where there is none.

    Sensitivity and F1 are of classes that have images here, specificity of those that not all images are of, precision
    of those that were named at least once.
    """
    part, whole = _sums(marks, rate)
    defined = whole.sum(axis=0) > 0
    if rate == "f1":
        defined &= marks.positive.any(axis=0)
    return _mean_ratio(part[:, defined], whole[:, defined])


def pooled(marks: Marks, rate: str) -> Estimate | None:
    """One of RATES over all pairs of image and class alike (micro)."""
    part, whole = _sums(marks, rate)
    return _mean_ratio(part.sum(axis=1, keepdims=True), whole.sum(axis=1, keepdims=True))


def exact(marks: Marks) -> Estimate:
    """Share of the images of which every known class is answered rightly (subset accuracy)."""
    return share(((marks.named == marks.positive) | ~marks.certain).all(axis=1))


def wrong_answers(marks: Marks) -> Estimate:
    """Share of wrong answers among all known pairs of image and class (Hamming loss)."""
    wrong, known = (part.sum(axis=1) for part in ((marks.named != marks.positive) & marks.certain, marks.certain))
    value = float(wrong.sum() / known.sum())
    return Estimate(value, (wrong - value * known) / known.sum(), known / known.sum())


def overlap(marks: Marks, *, f1: bool) -> Estimate:
    """Mean over the images of the F1 or Jaccard index of its classes and those named; 1 where both are none.

    Of an image both are taken among its known classes.
    """
    both = (marks.positive & marks.named).sum(axis=1).astype(np.float64)
    whole = (marks.positive.sum(axis=1) + (marks.named & marks.certain).sum(axis=1)).astype(np.float64)
    part, whole = (2 * both, whole) if f1 else (both, whole - both)
    return mean(np.divide(part, whole, out=np.ones_like(part), where=whole > 0))


def _sums(marks: Marks, rate: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) numbers of which the sums over the images, divided, are the rate of each class."""
    positive, named = marks.positive, marks.named & marks.certain
    right = positive & named
    if rate == "f1":
        return 2 * right.astype(np.int64), positive.astype(np.int64) + named
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "sensitivity": (right, positive),
        "specificity": (marks.absent & ~named, marks.absent),
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
    rarest = int(np.minimum(marks.positive.sum(axis=0), marks.absent.sum(axis=0)).min())
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
    of_images: bool = False,
    better: str = "higher",
    per_cent: bool = True,
    short: str = "",
    hub: str = "",
    meaning: str = "",
) -> Metric:
    def estimate(judged: Judged) -> Estimate:
        assert judged.marks is not None
        found = find(judged.marks)
        assert found is not None
        return found

    def undefined(judged: Judged) -> str:
        if judged.marks is None:
            return NO_MARKS
        if not judged.marks.certain.any():
            return "of no image it is known which classes it shows"
        return "no class for which it is defined" if find(judged.marks) is None else ""

    def told(judged: Judged) -> np.ndarray:
        """Images of which something is known."""
        return np.ones(len(judged), bool) if judged.marks is None else np.any(judged.marks.certain, axis=1)

    return Metric(
        name, words, short or words, estimate, better=better, of_labels=True, decides=True, undefined=undefined,  # type: ignore[arg-type]
        support=_support if over_classes else lambda judged: (Support(len(judged)),),
        selects=told if of_images else None, per_cent=per_cent, is_general=True, meaning=meaning, hub=hub,
    )  # fmt: skip


_RATE_WORDS = dict(zip(RATES, ("sensitivity", "specificity", "precision", "F1"), strict=True))

SEVERAL_LABELS = (
    _metric(
        "labels_macro_auc", "AUC, mean of the classes by themselves", mean_area, over_classes=True, per_cent=False,
        short="mean AUC", hub="roc_auc",
    ),
    _metric(
        "labels_macro_average_precision", "average precision, mean of the classes (mAP)", mean_precision,
        over_classes=True, per_cent=False, short="mAP",
        meaning="of a frequent class it is higher by nature: an answer without skill has the class's share of images",
    ),
    *(
        _metric(
            f"labels_macro_{rate}",
            f"{words}, mean of the classes",
            partial(mean_of_classes, rate=rate),
            over_classes=True,
            short=f"mean {words}",
            hub="f1" if rate == "f1" else "",
        )
        for rate, words in _RATE_WORDS.items()
    ),
    *(
        _metric(
            f"labels_micro_{rate}", f"{words}, of all answers", partial(pooled, rate=rate), short=f"{words} (micro)"
        )
        for rate, words in _RATE_WORDS.items()
    ),
    _metric(
        "subset_accuracy", "share of images with exactly their classes", exact, of_images=True, short="exactly right",
        hub="accuracy",
    ),
    _metric("example_f1", "F1, mean of the images", partial(overlap, f1=True), of_images=True, short="F1 of images"),
    _metric(
        "example_jaccard", "Jaccard index, mean of the images", partial(overlap, f1=False), of_images=True,
        short="Jaccard",
    ),
    _metric(
        "hamming_loss", "share of wrong answers (Hamming loss)", wrong_answers, of_images=True, better="lower",
        short="wrong answers",
    ),
)  # fmt: skip
"""Metrics of images that may have several classes, or none."""
