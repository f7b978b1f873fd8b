"""Intervals of numbers that are smooth functions of sums over images: macro-F1, Brier score, severity, risk.

An image's *influence* is how much the number moves with that image's weight; the variance of the number is that of the
sum of the influences over independent units (linearisation, Binder 1983). It is turned into an effective number of
images for Wilson's formula, as the bootstrap's variance is in `evaluation.estimates`: near the ends of the scale the
interval stays honest, and it never leaves the scale. No resampling, so it costs next to nothing at a million images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptclip.errors import DataError
from adaptclip.evaluation.estimates import MIN_CLUSTERS, Measurement, few_clusters
from adaptclip.evaluation.influence import variance
from adaptclip.evaluation.intervals import RateSpread, Side, Spread


@dataclass(frozen=True)
class ScaledSpread:
    """Uncertainty of a number on a scale other than 0 to 1.

    Attributes:
        spread: uncertainty of (number - low end) / (high end - low end).
        low: low end of the scale.
        high: high end of the scale.
    """

    spread: Spread
    low: float
    high: float

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return self.spread.method

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bound on the number's own scale."""
        return self.low + (self.high - self.low) * self.spread.bound(side, alpha, exact=exact)


def linearised(
    value: float,
    influence: np.ndarray,
    clusters: Sequence[str] | np.ndarray | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    n: int | None = None,
    cap: float = float("inf"),
    note: str = "",
) -> Measurement:
    """A number with its uncertainty from the influences of the images behind it.

    Args:
        value: the estimate, within low..high.
        influence: (N,) how much it moves with each image's weight, so that mean-like numbers have (x - mean) / n.
        clusters: N unit ids (text or numbers), where images are not independent.
        low: low end of the number's scale.
        high: high end of it.
        n: images behind the number where other than N.
        cap: most images that the effective number may reach: those there are, for a share.
        note: what to know when reading it.

    Raises:
        DataError: the scale is empty, or the value lies outside it.
    """
    count = len(influence) if n is None else n
    if not (low < high and low - 1e-9 <= value <= high + 1e-9):
        raise DataError(f"a number on the scale {low:g} to {high:g} was expected, got {value:g}")
    unit = np.arange(len(influence)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    units = int(unit.max()) + 1
    # Clusters of one image are independent images.
    if units < MIN_CLUSTERS and units < len(influence):
        few = few_clusters(units)
    else:
        few = "no interval: a single image says nothing of others" if units < 2 else ""
    if few:
        return Measurement(float(value), count, None, "; ".join(filter(None, (note, few))))
    drawn = variance(influence - influence.mean(), unit) / (high - low) ** 2
    rate = float(np.clip((value - low) / (high - low), 0, 1))
    bernoulli = rate * (1 - rate)
    if drawn > 1e-15 and bernoulli > 1e-12:
        spread: Spread = RateSpread(rate, bernoulli / drawn, cap, units - 1, by="linearisation")
    else:
        # Nothing varies: each unit is one draw that could have come out otherwise.
        spread = RateSpread(rate, float(min(units, count)), float(units), None)
    return Measurement(
        float(value), count, spread if (low, high) == (0.0, 1.0) else ScaledSpread(spread, low, high), note
    )


def mean_of(
    values: np.ndarray,
    clusters: Sequence[str] | np.ndarray | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    note: str = "",
) -> Measurement:
    """The mean of one number per image, each within low..high; None where there are no images.

    Of (N,) bool values it is a share, and where images are independent its interval is Wilson's own. Nothing is drawn,
    so that tables may hold many of them.

    Args:
        values: (N,) numbers, or bool for what is counted.
        clusters: N unit ids (text or numbers), where images are not independent.
        low: low end of the numbers' scale.
        high: high end of it.
        note: what to know when reading the mean.
    """
    n = len(values)
    if n == 0:
        return Measurement(None, 0, note="no images")
    mean, share = float(np.mean(values, dtype=np.float64)), values.dtype == bool
    if share and (clusters is None or len(np.unique(np.asarray(clusters))) == n):
        return Measurement(mean, n, RateSpread(mean, float(n), float(n)), note)
    cap = float(n) if share else float("inf")
    return linearised(mean, (values - mean) / n, clusters, low=low, high=high, cap=cap, note=note)


def macro_f1_parts(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of the classes' F1 scores over the classes that occur as label or prediction, as scikit-learn does it.

    Args:
        predicted: (N,) class ids decided for; N is at least 1.
        labels: (N,) true class ids.

    Returns:
        The score, 0 to 1, and the (N,) influences of the images.
    """
    size = int(max(predicted.max(), labels.max())) + 1
    right = predicted == labels
    total = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)  # 2 TP + FP + FN
    f1 = 2 * np.bincount(labels[right], minlength=size) / np.maximum(total, 1)
    present = int((total > 0).sum())
    of_label, of_predicted = f1[labels] / total[labels], f1[predicted] / total[predicted]
    influence = (np.where(right, 2 / total[labels], 0.0) - of_label - of_predicted) / present
    return float(f1.sum() / present), influence
