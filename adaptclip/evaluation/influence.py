"""Metrics that are no plain rates, with the share that each image has in their error (influence): AUC and Brier score.

The variance of such an estimate is the sum of the squared influences (the infinitesimal jackknife); images of a cluster
are summed before they are squared. For one class this is DeLong's variance of the AUC (DeLong et al. 1988).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Linearised:
    """An estimate and what each image did to it.

    Attributes:
        value: the estimate.
        influence: (N,) adds up to 0; its squares add up to the variance of the estimate if images are independent.
        least: lower limit of the variance, where a handful of images shows too little of it.
    """

    value: float
    influence: np.ndarray
    least: float = 0.0


def variance(influence: np.ndarray, unit: np.ndarray) -> float:
    """Variance of an estimate from the influence of its images.

    Args:
        influence: (N,) as in Linearised, or the difference of two for a paired change.
        unit: (N,) the unit (cluster, or the image itself) of each image, 0 to U - 1; at least two units.
    """
    by_unit = np.bincount(unit, influence)
    num = len(by_unit)
    return float((by_unit**2).sum() * num / (num - 1))


def brier_score(probs: np.ndarray, labels: np.ndarray) -> Linearised:
    """Brier score: mean over the images of the squared errors of all classes' probabilities, 0 to 2 (Brier 1950).

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
    """
    own = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0].astype(np.float64)
    each = np.einsum("nc,nc->n", probs, probs, dtype=np.float64) - 2 * own + 1
    return Linearised(float(each.mean()), (each - each.mean()) / len(each))


def macro_auc(probs: np.ndarray, labels: np.ndarray) -> Linearised | None:
    """Mean over the classes of the area under the ROC curve of the class against the rest, 0 to 1; ties count half.

    Classes without an image, or with nothing but their own images, are left out of the mean.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Returns:
        None where no class can be told from others.
    """
    counts = np.bincount(labels, minlength=probs.shape[1])
    return _mean_auc(probs, counts, lambda c: labels == c)


def mean_auc(probs: np.ndarray, positive: np.ndarray) -> Linearised | None:
    """As `macro_auc`, where an image may be of several classes or of none.

    Args:
        probs: (N, C) probability of each class, or any score.
        positive: (N, C) bool.
    """
    return _mean_auc(probs, positive.sum(axis=0), lambda c: positive[:, c])


def _mean_auc(probs: np.ndarray, counts: np.ndarray, positive_of: Callable[[int], np.ndarray]) -> Linearised | None:
    """Mean AUC of the classes of which `counts` (C,) images are and others are not."""
    usable: list[int] = np.flatnonzero((counts > 0) & (counts < len(probs))).tolist()
    if not usable:
        return None
    total, least, influence = 0.0, 0.0, np.zeros(len(probs))
    for c in usable:
        positive = positive_of(c)
        area, of_positives, of_negatives = _one_class(probs[positive, c], probs[~positive, c])
        total += area
        least += _hanley_mcneil(area, len(of_positives), len(of_negatives))
        influence[positive] += _centred(of_positives - area)
        influence[~positive] += _centred(of_negatives - area)
    return Linearised(total / len(usable), influence / len(usable), least / len(usable) ** 2)


def _centred(deviations: np.ndarray) -> np.ndarray:
    """Influence of the images of one side: squares add up to their sample variance over their number."""
    num = len(deviations)
    return deviations / np.sqrt(num * max(num - 1, 1))


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
