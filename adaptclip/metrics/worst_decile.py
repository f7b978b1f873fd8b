# SPDX-License-Identifier: Apache-2.0
"""Mean accuracy of the worst tenth of the classes, with bounds that know that the classes were picked.

Classes picked for a low accuracy look worse on the same images than they are. So the value is cross-fitted: picked on
one half of the images and judged on the other, over many halvings. It is too high rather than too low, as half the
images pick less well. The lower bound is that of the classes picked on all images and judged on the same: they look no
better than the classes that truly are the worst. The upper bound is around the cross-fitted value, with the images of
one half: classes picked elsewhere are truly no worse than the worst. So both bounds err on the wide side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from adaptclip.metrics.estimates import Comparison, Estimate, Measurement, measured
from adaptclip.metrics.intervals import RateSpread, Side, Spread
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, Drawing, Metric
from adaptclip.metrics.rates import classes_support, mean_of_classes

_HALVINGS = 100
"""Random halves over which the value is a mean."""


@dataclass(frozen=True)
class Picked:
    """The worst tenth of the classes, picked and judged on the same images.

    Attributes:
        of: ids of the classes that have images enough to be picked.
        classes: ids of those that were, lowest accuracy first.
        accuracy: mean of their accuracies, which is lower than the truth.
    """

    of: np.ndarray
    classes: np.ndarray
    accuracy: float | None


def pick_worst(judged: Judged) -> Picked:
    """Picks the tenth (at least one) of the classes with the lowest accuracy among those of 10 images or more."""
    of = np.flatnonzero(judged.counts >= MIN_CLASS_IMAGES)
    if len(of) < 2:
        return Picked(of, of[:0], None)
    rates = _right(judged)[of] / judged.counts[of]
    order = np.argsort(rates, kind="stable")[: _tenth(len(of))]
    return Picked(of, of[order], float(rates[order].mean()))


def _tenth(classes: int) -> int:
    return max(1, round(classes / 10))


def _right(judged: Judged) -> np.ndarray:
    return np.bincount(judged.labels[judged.right], minlength=judged.num_classes)


def _undefined(judged: Judged) -> str:
    if (judged.counts >= MIN_CLASS_IMAGES).sum() < 2:
        return f"fewer than two classes have at least {MIN_CLASS_IMAGES} images"
    return ""


def _cross_fitted(judged: Judged, of: np.ndarray) -> float:
    """Mean over halvings; whole units (patients) fall into one half."""
    rng = np.random.default_rng(0)
    right, counts = _right(judged)[of], judged.counts[of]
    worst, held = _tenth(len(of)), []
    for _ in range(_HALVINGS):
        if judged.sampling.clustered:
            first = (rng.permutation(judged.sampling.num_units) % 2 == 0)[judged.sampling.unit]
            half = np.bincount(judged.labels[first], minlength=judged.num_classes)[of]
            hits = np.bincount(judged.labels[first & judged.right], minlength=judged.num_classes)[of]
        else:  # how many of a class's right images fall into its random half is hypergeometric: none need be moved
            half = counts // 2
            hits = rng.hypergeometric(right, counts - right, half)
        usable = np.flatnonzero((half > 0) & (half < counts))
        if len(usable) < worst:
            continue
        order = usable[np.lexsort((rng.random(len(usable)), hits[usable] / half[usable]))[:worst]]
        held.append(float(((right - hits)[order] / (counts - half)[order]).mean()))
    return float(np.mean(held)) if held else float((right / counts).mean())


def _estimate(judged: Judged) -> Estimate:
    picked = pick_worst(judged)
    worth = np.zeros(judged.num_classes)
    worth[picked.classes] = 1 / (len(picked.classes) * judged.counts[picked.classes])
    rates = _right(judged) / np.maximum(judged.counts, 1)
    influence = worth[judged.labels] * (judged.right - rates[judged.labels])
    return Estimate(_cross_fitted(judged, picked.of), influence)


@dataclass(frozen=True)
class WorstSpread:
    """Bounds of two estimates.

    Attributes:
        value: the cross-fitted value, which lies within the bounds.
        low: around the accuracy of the classes as picked.
        high: around the cross-fitted value.
    """

    value: float
    low: Spread
    high: Spread

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "lower bound as picked, upper bound cross-fitted"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """One-sided bound that the truth lies beyond with probability `alpha` or less."""
        if side == "low":
            return min(self.low.bound("low", alpha, exact=exact), self.value)
        return max(self.high.bound("high", alpha, exact=exact), self.value)


@dataclass(frozen=True)
class ApartSpread:
    """Bounds of a change from the bounds of both numbers, each at half the chance of a miss: wide, never too narrow.

    Attributes:
        after: of the judged model.
        before: of the model it is compared with.
    """

    after: Spread
    before: Spread

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "from the bounds of both"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """One-sided bound of the change."""
        other: Side = "high" if side == "low" else "low"
        return self.after.bound(side, alpha / 2, exact=exact) - self.before.bound(other, alpha / 2, exact=exact)


def _measured(judged: Judged) -> Measurement:
    picked = pick_worst(judged)
    value = _cross_fitted(judged, picked.of)
    images = judged.take(np.isin(judged.labels, picked.classes))
    note = f"picked on one random half and judged on the other; mean of {_HALVINGS} halvings"
    of_picked = replace(mean_of_classes(images), note="")
    found = measured(of_picked, images.sampling)
    if not isinstance(found.spread, RateSpread):
        return Measurement(value, len(images), None, f"{note}; {found.note}")
    low, trials = found.spread, 1 / float((of_picked.shares**2).sum())
    high = RateSpread(value, min(low.size, trials) / 2, trials / 2, None if low.df is None else max(low.df / 2, 0.5))
    return Measurement(value, len(images), WorstSpread(value, low, high), note)


def _compare(judged: Judged, baseline: Judged | None, drawing: Drawing) -> Comparison:
    after = _measured(judged)
    if baseline is None:
        return Comparison(after)
    before = _measured(baseline)
    assert after.value is not None
    assert before.value is not None
    spread = None
    if after.spread is not None and before.spread is not None:
        spread = ApartSpread(after.spread, before.spread)
    note = after.note if spread is None else "each model has a worst tenth of its own"
    return Comparison(after, before, Measurement(after.value - before.value, after.n, spread, note))


WORST_DECILE = Metric(
    "worst_decile", "mean accuracy of the worst tenth of the classes", "worst tenth", _estimate, decides=True,
    over_classes=True, least_classes=2, undefined=_undefined, support=classes_support, measure_with=_compare,
    instead="labels_macro_sensitivity",
)  # fmt: skip
