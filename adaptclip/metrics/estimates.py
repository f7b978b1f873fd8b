# SPDX-License-Identifier: Apache-2.0
"""A number with its uncertainty: one way from the influence of the images to an interval, for every metric.

An image's *influence* is how much a number moves with that image's weight. The variance of the number is that of the
sum of the influences over the units that were sampled (linearisation, Binder 1983; for an AUC it is DeLong's variance).
Three things keep it honest where there is little. A unit that holds a share h of the weight pulls the number towards
itself, so that its influence is divided by 1 - h (the jackknife). Where the variance rests on a few units only (many
patients with nothing but right answers, two with errors), how alike a patient's images are is hardly known: the
variance is mixed with the one that would hold if they were all alike, the more the fewer units it rests on. And a class
of a handful of units, all right or all wrong, varies no less than the others.

The variance then becomes an *effective number* of images, with Student's t for the degrees of freedom that it has, in
Wilson's or Clopper and Pearson's formula (Korn & Graubard 1998; Dean & Pagano 2015): near the ends of the scale the
interval stays honest, and it never leaves the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptclip.errors import DataError
from adaptclip.metrics.intervals import PairedSpread, RateSpread, ScaledSpread, ScoreSpread, Side, Spread
from adaptclip.metrics.judged import Sampling

MIN_CLUSTERS = 8
"""Fewer clusters than this say too little about clusters not seen: no interval is given."""

FEW_UNITS = 10
"""A class with fewer units shows too little of how its images vary."""

_ALIKE = 1.5
"""Weight of "all images of a unit are alike" against the squared number of units that a variance rests on: chosen by
simulation, so that gates at their limit pass in about 5 % with 8 to 50 units, whatever the correlation within them."""


@dataclass(frozen=True)
class Measurement:
    """One number and what is known about its uncertainty.

    Attributes:
        value: the estimate; None where there is none.
        n: images behind it.
        spread: gives bounds; None where there is no interval.
        note: why a value or an interval is missing, or what to know when reading it; empty when there is nothing.
    """

    value: float | None
    n: int
    spread: Spread | None = None
    note: str = ""

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float | None:
        """One-sided bound at level 1 - alpha, or None."""
        return None if self.spread is None else self.spread.bound(side, alpha, exact=exact)

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """Two-sided interval, or None."""
        if self.spread is None:
            return None
        alpha = (1 - confidence) / 2
        return self.spread.bound("low", alpha), self.spread.bound("high", alpha)


@dataclass(frozen=True)
class Comparison:
    """A metric of the judged model, of the baseline, and the paired change; the latter two None without a baseline."""

    model: Measurement
    baseline: Measurement | None = None
    change: Measurement | None = None


@dataclass(frozen=True)
class Estimate:
    """A number and what each image does to it.

    Attributes:
        value: the number.
        influence: (N,) how much it moves with each image's weight; adds up to 0.
        weights: (N,) share of the number that rests on each image, adding up to 1; None for equal shares.
        cell: (N,) the part (class) around whose own mean the influence is centred; None where there is one part.
        hits: (N,) bool where the number is a weighted share of right images, which makes it a rate; None otherwise.
        least: lower limit of the variance, where a handful of images shows too little of it.
        n: images behind the number where that is not N.
        note: what to know when reading it.
    """

    value: float
    influence: np.ndarray
    weights: np.ndarray | None = None
    cell: np.ndarray | None = None
    hits: np.ndarray | None = None
    least: float = 0.0
    n: int | None = None
    note: str = ""

    @property
    def shares(self) -> np.ndarray:
        """(N,) `weights`, equal where they are None."""
        return np.full(len(self.influence), 1 / len(self.influence)) if self.weights is None else self.weights


@dataclass(frozen=True)
class Variance:
    """Variance of an estimate.

    Attributes:
        value: the variance; 0 where nothing varies.
        df: degrees of freedom it has.
        trials: independent images of these weights that would say as much, had every unit one image.
        units: the same with every unit as one image.
    """

    value: float
    df: float
    trials: float
    units: float


def few_clusters(units: int) -> str:
    """Says why a number of so few clusters has no interval."""
    return f"no interval: {units} cluster{'s' * (units != 1)}, and at least {MIN_CLUSTERS} are needed"


def too_few(sampling: Sampling) -> str:
    """Why numbers of these images have no interval, or ""."""
    if sampling.clustered and sampling.num_units < MIN_CLUSTERS:
        return few_clusters(sampling.num_units)
    return "no interval: a single image says nothing of others" if sampling.num_units < 2 else ""


def variance(estimate: Estimate, sampling: Sampling, most: float) -> Variance:
    """Variance of an estimate from the influence of its images.

    Args:
        estimate: over the images of `sampling`.
        sampling: how they were drawn; at least two units.
        most: variance of one image at the estimate's value, where it is a rate or lies on a scale of its own.
    """
    weights, unit = estimate.shares, sampling.unit
    held = np.bincount(unit, weights)  # (U,) share of each unit
    units, floor = 1 / float((held**2).sum()), 0.0
    cells = _cells(estimate, sampling)
    if cells is None:  # the jackknife
        by_unit = np.bincount(unit, estimate.influence) / np.maximum(1 - held, 0.5)
        by_unit = (by_unit - by_unit.mean()) * np.sqrt(1 - 1 / sampling.num_units)
        df = units - 1
    else:
        influence = cells.centred(estimate.influence, sampling)
        by_unit, floor = np.bincount(unit, influence), cells.floor(influence, estimate.hits, most)
        df = cells.degrees
    square = by_unit**2
    value = max(float(square.sum()) + floor, estimate.least)
    if sampling.clustered and value > 0:
        rests_on = float(square.sum() ** 2 / max((square**2).sum(), 1e-300))
        unknown = _ALIKE / (rests_on**2 + _ALIKE)
        value = (1 - unknown) * value + unknown * max(value, most / units)
    return Variance(value, max(min(df, sampling.num_units - 1), 0.5), 1 / float((weights**2).sum()), units)


@dataclass(frozen=True)
class _Cells:
    """Parts (classes) around whose own mean an influence is centred, with the units that have images of them.

    Attributes:
        cell: (N,) part of each image.
        place: (N,) pair of part and unit of each image.
        of: (P,) part of each pair.
        held: (P,) share of the number that rests on each pair.
    """

    cell: np.ndarray
    place: np.ndarray
    of: np.ndarray
    held: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(parts,) units of each part."""
        return np.bincount(self.of)

    def centred(self, influence: np.ndarray, sampling: Sampling) -> np.ndarray:
        """(N,) the influence, larger where a part has so few units that its own mean hides what they vary by."""
        if sampling.stratum is not None:  # the number of images of each part was fixed
            images = np.bincount(self.cell)
            influence = influence - (np.bincount(self.cell, influence) / np.maximum(images, 1))[self.cell]
        counts = self.counts
        return influence * np.sqrt(counts / np.maximum(counts - 1, 1))[self.cell]

    def floor(self, influence: np.ndarray, hits: np.ndarray | None, most: float) -> float:
        """What is added so that a part of a handful of units varies no less than it may.

        Five images that are all right vary by nothing, and say little. Their rate counts as if one more image had been
        right and one more wrong (Laplace); where the number is no rate, an image of theirs varies as one at its value.
        """
        counts = self.counts
        own = np.bincount(self.of, np.bincount(self.place, influence) ** 2, minlength=len(counts))
        one = np.full(len(counts), most)
        if hits is not None:
            images = np.bincount(self.cell, minlength=len(counts))
            rate = (np.bincount(self.cell, hits, minlength=len(counts)) + 1) / (images + 2)
            one = rate * (1 - rate)
        usual = one * np.bincount(self.of, self.held**2, minlength=len(counts))
        return float(np.maximum(usual - own, 0)[(counts > 0) & (counts < FEW_UNITS)].sum())

    @property
    def degrees(self) -> float:
        """Satterthwaite's degrees of freedom if all images varied alike: few where a small part weighs much."""
        total, square = np.bincount(self.of, self.held), np.bincount(self.of, self.held**2)
        used = square > 0
        effective = total[used] ** 2 / square[used]  # units of each part, as if they were of one size
        parts = square[used]
        return float(parts.sum() ** 2 / (parts**2 / np.maximum(effective - 1, 0.5)).sum())


def _cells(estimate: Estimate, sampling: Sampling) -> _Cells | None:
    """The parts of a number: its own, or the classes whose number of images the study fixed."""
    cell = sampling.stratum if estimate.cell is None else estimate.cell
    if cell is None:
        return None
    pairs, place = np.unique(cell.astype(np.int64) * sampling.num_units + sampling.unit, return_inverse=True)
    return _Cells(cell, place, pairs // sampling.num_units, np.bincount(place, estimate.shares))


def measured(
    estimate: Estimate, sampling: Sampling, *, scale: tuple[float, float] = (0.0, 1.0), note: str = ""
) -> Measurement:
    """Puts an interval around an estimate.

    Args:
        estimate: over the images of `sampling`.
        sampling: how they were drawn.
        scale: lowest and highest value there can be.
        note: what to know when reading it, besides the estimate's own.

    Raises:
        DataError: the scale is empty, or the value lies outside it.
    """
    low, high = scale
    value, n = float(estimate.value), len(estimate.influence) if estimate.n is None else estimate.n
    if not (low < high and low - 1e-9 <= value <= high + 1e-9):
        raise DataError(f"a number on the scale {low:g} to {high:g} was expected, got {value:g}")
    few = too_few(sampling)
    notes = "; ".join(filter(None, (estimate.note, note, few)))
    if few:
        return Measurement(value, n, None, notes)
    rate, reach = float(np.clip((value - low) / (high - low), 0, 1)), high - low
    bernoulli = rate * (1 - rate)
    found = variance(estimate, sampling, bernoulli * reach**2)
    drawn = found.value / reach**2
    equal = estimate.hits is not None and estimate.weights is None
    if (
        equal and not sampling.clustered and sampling.stratum is None
    ):  # images are independent, and a share of them has Wilson's own interval
        spread: Spread = RateSpread(rate, float(n), float(n))
    elif drawn > 1e-15 and bernoulli > 1e-12:
        most = found.trials if equal and sampling.stratum is None else float("inf")
        spread = RateSpread(rate, min(bernoulli / drawn, most), most, found.df)
    else:
        # Nothing varies, so nothing tells how alike a unit's images are: each is one draw that could have come out
        # otherwise. With parts of their own (classes) the smallest of them still limits what is known.
        spread = RateSpread(rate, found.units, found.units, None if estimate.cell is None else found.df)
    return Measurement(value, n, spread if scale == (0.0, 1.0) else ScaledSpread(spread, low, high), notes)


def changed(
    after: Estimate, before: Estimate, sampling: Sampling, *, scale: tuple[float, float] = (0.0, 1.0), note: str = ""
) -> Measurement:
    """The paired change from one estimate to another on the same images.

    Args:
        after: of the judged model.
        before: of the model it is compared with.
        sampling: how the images were drawn.
        scale: lowest and highest value that either can have.
        note: what to know when reading it.
    """
    reach, n = scale[1] - scale[0], len(after.influence) if after.n is None else after.n
    value = float(after.value - before.value)
    few = too_few(sampling)
    notes = "; ".join(filter(None, (after.note, note, few)))
    if few:
        return Measurement(value, n, None, notes)
    difference = Estimate(value, after.influence - before.influence, after.weights, after.cell)
    if after.hits is None or before.hits is None:
        found = variance(difference, sampling, reach**2)
        error = float(np.sqrt(found.value))
        return Measurement(value, n, ScoreSpread(value, error, found.units, found.df, (-reach, reach)), notes)
    weights = after.shares
    gained = float(weights[after.hits & ~before.hits].sum())
    lost = float(weights[before.hits & ~after.hits].sum())
    one = max(gained + lost - (gained - lost) ** 2, 0.0)
    found = variance(difference, sampling, one)
    if after.weights is None and not sampling.clustered and sampling.stratum is None:
        spread = PairedSpread(gained, lost, float(n), float(n))
    elif found.value > 1e-15 and one > 1e-12:
        most = found.trials if after.weights is None and sampling.stratum is None else float("inf")
        spread = PairedSpread(gained, lost, min(one / found.value, most), most, found.df)
    else:
        spread = PairedSpread(gained, lost, found.units, found.units, None if after.cell is None else found.df)
    return Measurement(value, n, spread, notes)


def share(hits: np.ndarray) -> Estimate:
    """Share of the images for which `hits` (N,) bool holds."""
    value = float(hits.mean())
    return Estimate(value, (hits - value) / len(hits), hits=hits)


def mean(values: np.ndarray) -> Estimate:
    """Mean of (N,) numbers."""
    value = float(values.mean(dtype=np.float64))
    return Estimate(value, (values - value) / len(values))


def mean_of(
    values: np.ndarray,
    sampling: Sampling | Sequence[str] | np.ndarray | None = None,
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
        sampling: how the images were drawn, or N unit ids where they are not independent.
        low: low end of the numbers' scale.
        high: high end of it.
        note: what to know when reading the mean.
    """
    if len(values) == 0:
        return Measurement(None, 0, note="no images")
    drawn = sampling if isinstance(sampling, Sampling) else Sampling.of(len(values), sampling)
    return measured((share if values.dtype == bool else mean)(values), drawn, scale=(low, high), note=note)


def linearised(
    value: float,
    influence: np.ndarray,
    sampling: Sampling | Sequence[str] | np.ndarray | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    n: int | None = None,
    note: str = "",
) -> Measurement:
    """A number with its uncertainty from the influences of the images behind it; the arguments are as in `Estimate`."""
    drawn = sampling if isinstance(sampling, Sampling) else Sampling.of(len(influence), sampling)
    estimate = Estimate(value, influence - influence.mean(), n=n)
    return measured(estimate, drawn, scale=(low, high), note=note)
