# SPDX-License-Identifier: Apache-2.0
"""The area under the ROC curve, alone and as a mean over classes, with each image's influence on it.

The variance that follows from the influences is DeLong's (DeLong et al. 1988).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adaptclip.metrics.estimates import Estimate
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import MIN_IMAGES, MIN_OUTCOMES, Metric, Support
from adaptclip.metrics.rates import absent_words, class_weights, classes_support


@dataclass(frozen=True)
class Area:
    """A mean area under ROC curves.

    Attributes:
        value: the area, 0 to 1.
        influence: (N,) adds up to 0.
        least: lower limit of the variance, where a handful of images shows too little of it.
    """

    value: float
    influence: np.ndarray
    least: float = 0.0


def macro_auc(probs: np.ndarray, labels: np.ndarray) -> Area | None:
    """Mean over the classes of the area under the ROC curve of the class against the rest, 0 to 1; ties count half.

    Classes without an image, or with nothing but their own images, are left out of the mean.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Returns:
        None where no class can be told from others.
    """
    counts = np.bincount(labels, minlength=probs.shape[1])
    if probs.shape[1] == 2:
        # Of two classes each column is one less the other, and near 1 it has lost the digits that the other still has.
        odds = np.subtract(*np.log(np.maximum(probs.T.astype(np.float64), np.finfo(np.float64).tiny)))
        probs = np.stack([odds, -odds], axis=1)
    return _mean_auc(probs, counts, lambda c: labels == c)


def mean_auc(probs: np.ndarray, positive: np.ndarray, absent: np.ndarray | None = None) -> Area | None:
    """As `macro_auc`, where an image may be of several classes or of none.

    Args:
        probs: (N, C) probability of each class, or any score.
        positive: (N, C) bool, which classes an image shows.
        absent: (N, C) bool, which it does not show; None for all others. What is neither is left out of the class.
    """
    without = ~positive if absent is None else absent
    counts = np.where(without.any(axis=0), positive.sum(axis=0), 0)
    return _mean_auc(probs, counts, lambda c: positive[:, c], lambda c: without[:, c])


def _mean_auc(
    probs: np.ndarray,
    counts: np.ndarray,
    positive_of: Callable[[int], np.ndarray],
    negative_of: Callable[[int], np.ndarray] | None = None,
) -> Area | None:
    """Mean AUC of the classes of which `counts` (C,) images are and others are not."""
    usable: list[int] = np.flatnonzero((counts > 0) & (counts < len(probs))).tolist()
    if not usable:
        return None
    total, least, influence = 0.0, 0.0, np.zeros(len(probs))
    for c in usable:
        positive = positive_of(c)
        negative = ~positive if negative_of is None else negative_of(c)
        area, of_positives, of_negatives = _one_class(probs[positive, c], probs[negative, c])
        total += area
        least += _hanley_mcneil(area, len(of_positives), len(of_negatives))
        influence[positive] += (of_positives - area) / len(of_positives)
        influence[negative] += (of_negatives - area) / len(of_negatives)
    return Area(total / len(usable), influence / len(usable), least / len(usable) ** 2)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> Area:
    """Mean over the positive images of the precision at their rank (step-wise, not interpolated); ties rank together.

    An image moves it through its own precision and through that of every positive image that is not ranked above it.

    Args:
        scores: (N,) probabilities, or any score.
        positive: (N,) bool, at least one.
    """
    place = np.unique(-scores, return_inverse=True)[1]
    there, found = np.bincount(place), np.bincount(place, positive)
    reached, hits = np.cumsum(there), np.cumsum(found)
    precision, total = hits / reached, float(hits[-1])
    value = float((found * precision).sum() / total)
    # Sums over the ranks from an image's own downwards, where its weight is counted.
    gained, diluted = (np.cumsum((part / reached)[::-1])[::-1] for part in (found, found * precision))
    influence = positive * (precision[place] + gained[place] - value) - diluted[place]
    return Area(value, influence / total)


def _hanley_mcneil(area: float, positives: int, negatives: int) -> float:
    """Variance of an AUC by Hanley & McNeil (1982), which a class with a single image has too."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    parts = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    return parts / (positives * negatives)


def _one_class(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC, and for each positive (negative) the share of the other side that it is ranked above (below)."""
    order = np.argsort(positives, kind="stable")
    ranked = positives[order]
    # Looked up in rising order, which a processor's cache likes: five times faster for a million images.
    rising = np.argsort(negatives)
    below, upto = (np.searchsorted(ranked, negatives[rising], side) for side in ("left", "right"))
    of_negatives = np.empty(len(negatives))
    of_negatives[rising] = 1 - (below + upto) / (2 * len(ranked))
    # A negative lies below the k-th positive when at most k positives are not above it.
    size = len(ranked) + 1
    beaten = np.cumsum(np.bincount(upto, minlength=size))[:-1]
    reached = np.cumsum(np.bincount(below, minlength=size))[:-1]
    of_positives = np.empty(len(ranked))
    of_positives[order] = (beaten + reached) / (2 * len(negatives))
    return float(of_negatives.mean()), of_positives, of_negatives


def _auc(judged: Judged) -> Estimate:
    found = macro_auc(judged.probs, judged.labels)
    assert found is not None  # `_one_class_only` has left out images of a single class
    weights = class_weights(judged.labels, judged.counts)
    return Estimate(found.value, found.influence, weights, judged.labels, least=found.least, note=absent_words(judged))


def _one_class_only(judged: Judged) -> str:
    if judged.ranked is not None or not judged.confident:
        return "the predictions do not hold the probabilities of all classes"
    return "AUC needs images of two classes" if len(np.unique(judged.labels)) < 2 else ""


def _smaller_side(judged: Judged) -> tuple[Support, ...]:
    return (Support(int(judged.counts.min()), "images on the smaller side", MIN_OUTCOMES),)


MACRO_AUC = Metric(
    "macro_auc", "AUC (mean of the classes)", "AUC", _auc, per_cent=False, over_classes=True, undefined=_one_class_only,
    support=lambda judged: _smaller_side(judged) if judged.num_classes == 2 else classes_support(judged),
    is_general=True, in_groups=True, instead="labels_macro_auc",
)  # fmt: skip

AUC = Metric(
    "auc", "AUC", "AUC", _auc, per_cent=False, of_outcome=True, sides=(1, 0), undefined=_one_class_only,
    support=_smaller_side, is_general=True, in_groups=True,
)  # fmt: skip


def _positives(judged: Judged) -> tuple[Support, ...]:
    # With 30 it is too high by up to two points, and a gate at its limit would pass too often.
    return (Support(int(judged.counts[1]), "positive images", MIN_IMAGES),)


def _precision_estimate(judged: Judged) -> Estimate:
    found = average_precision(judged.probs[:, 1], judged.labels == 1)
    own = judged.labels == 1
    return Estimate(found.value, found.influence, own / own.sum())


AVERAGE_PRECISION = Metric(
    "average_precision", "average precision", "average precision", _precision_estimate, per_cent=False, of_outcome=True,
    sides=(1, 0), undefined=_one_class_only, support=_positives,
    meaning="mean of the precision at the rank of every positive image; an answer without skill has the share of "
    "positive images",
)  # fmt: skip
