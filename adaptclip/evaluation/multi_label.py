"""Yes or no for each class: how well the classes of an image are named where it may have several, or none.

Rates of one class are plain shares of images. Means over the classes, and F1, are means of ratios of sums over the
images, with the interval of their linearised variance (`metrics.estimates`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from adaptclip.metrics.estimates import Estimate, Measurement, mean_of, measured
from adaptclip.metrics.judged import Sampling
from adaptclip.metrics.ranking import mean_auc

RATES = ("sensitivity", "specificity", "precision", "f1")
"""What thresholds decide."""


@dataclass(frozen=True)
class Named:
    """Images with what they show and what they were said to show.

    Attributes:
        probs: (N, C) probability of each class by itself.
        positive: (N, C) bool, whether the image is one.
        named: (N, C) bool, whether its probability reaches the class's threshold.
        sampling: how the images were drawn.
    """

    probs: np.ndarray
    positive: np.ndarray
    named: np.ndarray
    sampling: Sampling

    def take(self, rows: np.ndarray) -> Named:
        """Some of the images, by position."""
        return Named(self.probs[rows], self.positive[rows], self.named[rows], self.sampling.take(rows))


def class_rates(images: Named, c: int) -> dict[str, Measurement]:
    """Returns "auc", "average_precision" and RATES of one class."""
    positive, named = images.positive[:, c], images.named[:, c]

    def part(hits: np.ndarray, of: np.ndarray) -> Measurement:
        return mean_of(hits[of], images.sampling.take(np.flatnonzero(of)))

    return {
        "auc": auc(images, c),
        "average_precision": average_precision(images, c),
        "sensitivity": part(named, positive),
        "specificity": part(~named, ~positive),
        "precision": part(positive, named),
        "f1": mean_of_classes(images, "f1", c),
    }


def auc(images: Named, c: int | None = None) -> Measurement:
    """Area under the ROC curve of class c, or its mean over the classes that have images with and without them."""
    columns = slice(None) if c is None else slice(c, c + 1)
    positive = images.positive[:, columns]
    found = mean_auc(images.probs[:, columns], positive)
    if found is None:
        return Measurement(None, len(positive), note="needs images of the class and others")
    counts = positive.sum(axis=0)
    usable = (counts > 0) & (counts < len(positive))
    return _measured(found.value, found.influence, positive[:, usable], images.sampling, least=found.least)


def average_precision(images: Named, c: int | None = None) -> Measurement:
    """Mean precision over the ranks of the positive images (step-wise area, without interpolation), of a class or mean.

    It has no interval: its error is not a mean over images.
    """
    chosen = np.flatnonzero(images.positive.any(axis=0)) if c is None else np.array([c])
    if not len(chosen) or not images.positive[:, chosen].any():
        return Measurement(None, len(images.positive), note="no images of the class")
    values = [average_precision_score(images.positive[:, k], images.probs[:, k]) for k in chosen]
    return Measurement(float(np.mean(values)), len(images.positive), note="no interval is computed for it")


def mean_of_classes(images: Named, rate: str, c: int | None = None) -> Measurement:
    """One of RATES, mean over the classes for which it is defined (macro), or of class c alone.

    Sensitivity and F1 are of classes that have images here, specificity of those that not all images are of, precision
    of those that were named at least once.
    """
    columns = slice(None) if c is None else slice(c, c + 1)
    part, whole = _sums(images.positive[:, columns], images.named[:, columns], rate)
    defined = whole.sum(axis=0) > 0
    if rate == "f1":
        defined &= images.positive[:, columns].any(axis=0)
    return _mean_ratio(part[:, defined], whole[:, defined], images.sampling)


def pooled(images: Named, rate: str) -> Measurement:
    """One of RATES over all pairs of image and class alike (micro)."""
    part, whole = _sums(images.positive, images.named, rate)
    return _mean_ratio(part.sum(axis=1, keepdims=True), whole.sum(axis=1, keepdims=True), images.sampling)


def _sums(positive: np.ndarray, named: np.ndarray, rate: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) numbers of which the sums over the images, divided, are the rate of each class."""
    right = positive & named
    if rate == "f1":
        return 2 * right.astype(np.int64), positive.astype(np.int64) + named
    return {
        "sensitivity": (right, positive),
        "specificity": (~positive & ~named, ~positive),
        "precision": (right, named),
    }[rate]


def _mean_ratio(part: np.ndarray, whole: np.ndarray, sampling: Sampling) -> Measurement:
    """Mean over the columns of sum(part) / sum(whole), both (N, K), with every sum of `whole` above 0."""
    sums = whole.sum(axis=0, dtype=np.float64)
    if not len(sums) or not sums.all():
        return Measurement(None, len(part), note="no class for which it is defined")
    ratios = part.sum(axis=0) / sums
    influence = ((part - ratios * whole) / sums).mean(axis=1)
    return _measured(float(ratios.mean()), influence, whole, sampling)


def _measured(
    value: float, influence: np.ndarray, whole: np.ndarray, sampling: Sampling, least: float = 0.0
) -> Measurement:
    """A mean of ratios; it rests on the images in `whole` (N, K), of which every column counts alike."""
    weights = (whole / whole.sum(axis=0)).mean(axis=1)
    trials = max(1, round(1 / float((weights**2).sum())))
    return measured(Estimate(value, influence, weights, least=least, n=trials), sampling)
