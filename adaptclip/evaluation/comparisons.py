"""An exact paired test, and comparisons of sets of images that share none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.intervals import DifferenceSpread, RateSpread


def sign_test(after: np.ndarray, before: np.ndarray, clusters: Sequence[str] | np.ndarray | None = None) -> float:
    """Two-sided exact p-value that what was right before and after differs only by chance.

    Of independent images this is McNemar's exact test. Units of several images count once, by the sign of their net
    change.

    Args:
        after: (N,) bool, right now.
        before: (N,) bool, right before.
        clusters: N unit ids, or None where the images are independent.
    """
    change = after.astype(np.int64) - before.astype(np.int64)
    if clusters is not None and len(change):
        change = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], change)
    up, down = int((change > 0).sum()), int((change < 0).sum())
    return min(1.0, 2 * float(binom.cdf(min(up, down), up + down, 0.5)))


def difference(first: Measurement, second: Measurement) -> Measurement:
    """First minus second, of independent sets of images."""
    if first.value is None or second.value is None:
        return Measurement(None, first.n + second.n, note=first.note or second.note)
    value, n = first.value - second.value, first.n + second.n
    if first.spread is None or second.spread is None:
        return Measurement(value, n, note=first.note or second.note)
    return Measurement(value, n, DifferenceSpread((first.value, first.spread), (second.value, second.spread)))


def harmonic(first: Measurement, second: Measurement) -> Measurement:
    """Harmonic mean of two rates of independent sets of images; 0 where one is 0 (Xian et al. 2017).

    Its variance is linearised, with each rate's effective number of images.
    """
    n = first.n + second.n
    if first.value is None or second.value is None:
        return Measurement(None, n, note=first.note or second.note)
    a, b = first.value, second.value
    value = 2 * a * b / (a + b) if a + b > 0 else 0.0
    if not (isinstance(first.spread, RateSpread) and isinstance(second.spread, RateSpread)):
        return Measurement(value, n, note=first.note or second.note)
    if value in (0.0, 1.0):
        least = min(first.spread.size, second.spread.size)
        return Measurement(value, n, RateSpread(value, least, least))
    slopes = 2 * b**2 / (a + b) ** 2, 2 * a**2 / (a + b) ** 2
    parts = zip(slopes, (a, b), (first.spread.size, second.spread.size), strict=True)
    variance = sum(slope**2 * rate * (1 - rate) / size for slope, rate, size in parts)
    size = value * (1 - value) / variance
    degrees = [s.df for s in (first.spread, second.spread) if s.df is not None]
    return Measurement(value, n, RateSpread(value, size, float(n), min(degrees) if degrees else None))
