# SPDX-License-Identifier: Apache-2.0
"""Confidence bounds of rates, of paired changes of rates, and of the calibration error.

What is used where:

- a rate of independent images: Wilson's score interval, or the exact Clopper-Pearson bound where a wrong "yes" must be
  limited for certain (gates);
- everything else that is smooth (rates of clustered images, means of the classes' rates, F1, AUC, Brier score): the
  same formulas with an *effective* number of images, the variance p(1-p) of one image divided by the number's own
  (Korn & Graubard 1998; Dean & Pagano 2015), which `metrics.estimates` finds;
- a change of a rate on the same images: Tango's score interval for paired proportions (Tango 1998), which stays honest
  when no image changes; effective numbers as above. Other changes: Student's t on the linearised variance;
- the calibration error and its change: a bootstrap that allows for the estimate's upward bias (`CalibrationParts`);
- a difference between two independent sets of images: each one's own bounds put together (`DifferenceSpread`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import betaincinv, ndtri, stdtrit

from adaptclip.errors import DataError

Side = Literal["low", "high"]


def normal_quantile(alpha: float) -> float:
    """Value that a standard normal variable exceeds with probability `alpha`.

    Taken from scipy.special, as is Student's: the checks of scipy.stats cost more than all else about an interval, of
    which a report has thousands.
    """
    return -float(ndtri(alpha))


def student_quantile(alpha: float, df: float) -> float:
    """Value that a variable of Student's distribution with `df` degrees of freedom exceeds with probability `alpha`."""
    return -float(stdtrit(df, alpha))


def wilson_bound(rate: float, n: float, side: Side, alpha: float) -> float:
    """One-sided Wilson score bound of a rate (Wilson 1927), 0 to 1.

    Args:
        rate: observed rate, 0 to 1.
        n: number of independent images; need not be whole (effective number).
        side: which bound.
        alpha: probability that the true rate lies beyond the bound, 0 to 0.5.
    """
    z = normal_quantile(alpha)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    if side == "low":
        return float(max(centre - half, 0.0)) if rate > 0 else 0.0
    return float(min(centre + half, 1.0)) if rate < 1 else 1.0


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval of `correct` out of `n` independent images.

    Raises:
        DataError: n is zero, or correct is not within 0..n.
    """
    if not 0 <= correct <= n or n == 0:
        raise DataError(f"an interval needs 0 <= correct <= n and n > 0, got correct={correct}, n={n}")
    alpha = (1 - confidence) / 2
    return wilson_bound(correct / n, n, "low", alpha), wilson_bound(correct / n, n, "high", alpha)


def exact_bound(rate: float, n: float, side: Side, alpha: float) -> float:
    """One-sided Clopper-Pearson bound of a rate: wrong with probability at most `alpha`, whatever the true rate.

    Arguments as for `wilson_bound`; with an effective n this is Korn & Graubard's bound for surveys.
    """
    count = rate * n
    if side == "low":
        return float(betaincinv(count, n - count + 1, alpha)) if count > 0 else 0.0
    return 1 - float(betaincinv(n - count, count + 1, alpha)) if count < n else 1.0


def tango_bound(gained: float, lost: float, n: float, side: Side, alpha: float) -> float:
    """One-sided score bound of a change of a rate on the same images (Tango 1998), -1 to 1.

    Its level holds well but not exactly: in simulations a 5 % bound missed in 3 to 6 %, and in up to 8 % where the
    truth is a handful of losses without a single gain.

    Args:
        gained: share of the images wrong before and right after, 0 to 1.
        lost: share of the images right before and wrong after, 0 to 1.
        n: number of independent images; need not be whole.
        side: which bound of gained - lost.
        alpha: probability that the true change lies beyond the bound, 0 to 0.5.
    """
    if side == "high":
        return -tango_bound(lost, gained, n, "low", alpha)
    z, change = normal_quantile(alpha), gained - lost

    def excess(delta: float) -> float:
        # q: the likeliest share of losses if the true change were delta (the positive root of Tango's equation 6).
        b, c = (2 - change) * delta - gained - lost, -lost * delta * (1 - delta)
        q = (np.sqrt(max(b**2 - 8 * c, 0.0)) - b) / 4
        return change - delta - z * np.sqrt(max(2 * q + delta * (1 - delta), 0.0) / n)

    # Where no image changed, excess is zero at the estimate itself too; the bound is the root below it.
    top = change - 1e-9
    if top <= -1 or excess(top) >= 0:
        return float(np.clip(change, -1, 1))
    if excess(-1.0) <= 0:
        return -1.0  # nearly all were lost: the root is the end itself, which rounding puts outside
    return float(root_scalar(excess, bracket=(-1.0, top), method="brentq", xtol=1e-10).root)


class Spread(Protocol):
    """How uncertain an estimate is: gives a bound at any level."""

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        ...

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """One-sided bound that the truth lies beyond with probability `alpha`."""
        ...


def _sized(size: float, cap: float, df: float | None, alpha: float) -> float:
    """Shrinks an effective number, at most `cap`, for the degrees of freedom of its variance (Korn & Graubard 1998)."""
    return min(cap, size) * (1.0 if df is None else (normal_quantile(alpha) / student_quantile(alpha, df)) ** 2)


@dataclass(frozen=True)
class RateSpread:
    """Uncertainty of a rate.

    Attributes:
        rate: the estimate, 0 to 1.
        size: effective number of images.
        cap: most images that `size` may stand for.
        df: degrees of freedom of the variance behind `size`; None where none was needed.
    """

    rate: float
    size: float
    cap: float
    df: float | None = None

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "wilson" if self.df is None else "wilson, effective n by linearisation"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Wilson's bound, or Clopper-Pearson's where `exact`."""
        return (exact_bound if exact else wilson_bound)(
            self.rate, _sized(self.size, self.cap, self.df, alpha), side, alpha
        )


@dataclass(frozen=True)
class PairedSpread:
    """Uncertainty of a change of a rate on the same images; `size`, `cap`, `df` as in RateSpread.

    Attributes:
        gained: share wrong before and right after.
        lost: share right before and wrong after.
    """

    gained: float
    lost: float
    size: float
    cap: float
    df: float | None = None

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "tango" if self.df is None else "tango, effective n by linearisation"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Tango's score bound; where `exact`, not nearer than Student's t gives, as skewed changes ask for."""
        size = _sized(self.size, self.cap, self.df, alpha)
        bound = tango_bound(self.gained, self.lost, size, side, alpha)
        if not exact:
            return bound
        change = self.gained - self.lost
        half = normal_quantile(alpha) * float(np.sqrt(max(self.gained + self.lost - change**2, 0.0) / size))
        return max(min(bound, change - half), -1.0) if side == "low" else min(max(bound, change + half), 1.0)


@dataclass(frozen=True)
class ScoreSpread:
    """Uncertainty of a mean score or of a change of one.

    Attributes:
        value: the estimate.
        error: its standard error.
        units: independent units behind it, which is what a change of exactly nothing leaves uncertain.
        df: degrees of freedom of the error.
        limits: lowest and highest value there can be.
    """

    value: float
    error: float
    units: float
    df: float
    limits: tuple[float, float]

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "t on the linearised variance"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bound by Student's t; `exact` changes nothing."""
        # Where nothing varies, Tango's interval without any change: the score test's answer to "n times nothing".
        nothing = normal_quantile(alpha) ** 2
        half = max(student_quantile(alpha, self.df) * self.error, nothing / (self.units + nothing))
        raw = self.value - half if side == "low" else self.value + half
        return float(np.clip(raw, *self.limits))


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


@dataclass(frozen=True)
class DifferenceSpread:
    """Uncertainty of a difference, from the bounds of its two sides (MOVER: Newcombe 1998, Zou & Donner 2008).

    The two have to be independent, or positively correlated (groups that share patients), which makes the bound wide.

    Attributes:
        first: estimate and its uncertainty.
        second: what is subtracted.
    """

    first: tuple[float, Spread]
    second: tuple[float, Spread]

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "newcombe, square-and-add"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bound of the difference; `exact` takes the sides' bounds that hold their level for certain."""
        (a, spread_a), (b, spread_b) = self.first, self.second
        other: Side = "high" if side == "low" else "low"
        of_a, of_b = spread_a.bound(side, alpha, exact=exact), spread_b.bound(other, alpha, exact=exact)
        distance = float(np.hypot(a - of_a, b - of_b))
        return a - b - distance if side == "low" else a - b + distance


@dataclass(frozen=True)
class CalibrationParts:
    """The signed parts of one model's calibration error: its absolute values add up to it.

    Attributes:
        observed: (bins,) share of the bin times (accuracy - mean confidence).
        drawn: (R, bins) the same on resamples.
    """

    observed: np.ndarray
    drawn: np.ndarray

    def errors(self, *, biased: bool) -> np.ndarray:
        """Returns (R,) estimate minus truth, as resampling would have it.

        Absolute values make the estimate too high, by an amount that depends on the true parts: not at all where they
        are far from zero, most where they are zero. Taking the observed parts for the true ones understates it, so
        parts within 2.5 standard errors of zero count as zero (thresholded bootstrap, Chatterjee & Lahiri 2011).

        Args:
            biased: allow for the upward bias (for lower bounds), or assume none (for upper bounds).
        """
        noise = self.drawn - self.observed
        if not biased:
            # A part of exactly zero may be of either sign; then the noise itself is what is not known.
            return noise @ np.where(self.observed >= 0, 1.0, -1.0)
        truth = np.where(np.abs(self.observed) > 2.5 * noise.std(axis=0), self.observed, 0.0)
        return np.abs(truth + noise).sum(axis=1) - np.abs(truth).sum()


@dataclass(frozen=True)
class CalibrationSpread:
    """Uncertainty of a calibration error, or of its change.

    Attributes:
        model: parts of the judged model.
        baseline: parts of the model it is compared with, on the same resamples; None for the error itself.
        uniform_units: number of units where all images of a model are right (or all wrong), else 0. Resamples then
            know no errors, so the bound gives way by the error rate that so many units cannot exclude.
    """

    model: CalibrationParts
    baseline: CalibrationParts | None = None
    uniform_units: int = 0

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "thresholded bootstrap"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bootstrap bound that errs on the wide side; `exact` changes nothing."""
        low = side == "low"
        value, errors, least = np.abs(self.model.observed).sum(), self.model.errors(biased=low), 0.0
        if self.baseline is not None:
            value -= np.abs(self.baseline.observed).sum()
            errors = errors - self.baseline.errors(biased=not low)
            least = -1.0
        unseen = 1 - wilson_bound(1.0, self.uniform_units, "low", alpha) if self.uniform_units else 0.0
        raw = value - np.quantile(errors, 1 - alpha if low else alpha) + (-unseen if low else unseen)
        return float(np.clip(raw, least, 1.0))
