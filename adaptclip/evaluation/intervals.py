"""Confidence bounds of rates, of paired changes of rates, and of the calibration error.

What is used where:

- a rate of independent images: Wilson's score interval, or the exact Clopper-Pearson bound where a wrong "yes" must be
  limited for certain (gates);
- a rate of clustered images, and the mean of the classes' rates: the same formulas with an *effective* number of
  images, the variance p(1-p) of one image divided by the bootstrap variance (Korn & Graubard 1998; Dean & Pagano 2015).
  Percentiles of the bootstrap are not used for rates: near 0 and 1 they are too narrow, and empty when all is right;
- a change of a rate on the same images: Tango's score interval for paired proportions (Tango 1998), which stays honest
  when no image changes; effective numbers as above;
- the calibration error and its change: a bootstrap that allows for the estimate's upward bias (`CalibrationParts`);
- the Brier score, and changes of it and of the AUC: Student's t on the linearised variance (`ScoreSpread`); an AUC
  itself is bounded like a rate whose effective number of images gives the same variance;
- a difference between two independent sets of images: each one's own bounds put together (`DifferenceSpread`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.optimize import root_scalar
from scipy.stats import beta, norm, t

from adaptclip.errors import DataError

Side = Literal["low", "high"]


def wilson_bound(rate: float, n: float, side: Side, alpha: float) -> float:
    """One-sided Wilson score bound of a rate (Wilson 1927), 0 to 1.

    Args:
        rate: observed rate, 0 to 1.
        n: number of independent images; need not be whole (effective number).
        side: which bound.
        alpha: probability that the true rate lies beyond the bound, 0 to 0.5.
    """
    z = norm.isf(alpha)
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
        return float(beta.ppf(alpha, count, n - count + 1)) if count > 0 else 0.0
    return float(beta.isf(alpha, count + 1, n - count)) if count < n else 1.0


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
    z, change = norm.isf(alpha), gained - lost

    def excess(delta: float) -> float:
        # q: the likeliest share of losses if the true change were delta (the positive root of Tango's equation 6).
        b, c = (2 - change) * delta - gained - lost, -lost * delta * (1 - delta)
        q = (np.sqrt(max(b**2 - 8 * c, 0.0)) - b) / 4
        return change - delta - z * np.sqrt(max(2 * q + delta * (1 - delta), 0.0) / n)

    # Where no image changed, excess is zero at the estimate itself too; the bound is the root below it.
    top = change - 1e-9
    if top <= -1 or excess(top) >= 0:
        return float(np.clip(change, -1, 1))
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


def _sized(size: float, cap: float, df: int | None, alpha: float) -> float:
    """Shrinks an effective number for the degrees of freedom of its variance (Korn & Graubard 1998), up to `cap`."""
    return min(cap, size if df is None else size * float(norm.isf(alpha) / t.isf(alpha, df)) ** 2)


@dataclass(frozen=True)
class RateSpread:
    """Uncertainty of a rate.

    Attributes:
        rate: the estimate, 0 to 1.
        size: effective number of images.
        cap: most images that `size` may stand for.
        df: degrees of freedom of the variance behind `size`; None where none was needed.
        by: how that variance was found, for the report.
    """

    rate: float
    size: float
    cap: float
    df: int | None = None
    by: str = "bootstrap"

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "wilson" if self.df is None else f"wilson, effective n by {self.by}"

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
    df: int | None = None

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "tango" if self.df is None else "tango, effective n by bootstrap"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Tango's score bound; `exact` changes nothing."""
        return tango_bound(self.gained, self.lost, _sized(self.size, self.cap, self.df, alpha), side, alpha)


@dataclass(frozen=True)
class ScoreSpread:
    """Uncertainty of a mean score or of a change of one.

    Attributes:
        value: the estimate.
        error: its standard error.
        units: independent units behind it; also what a change of exactly nothing leaves uncertain.
        limits: lowest and highest value there can be.
    """

    value: float
    error: float
    units: int
    limits: tuple[float, float]

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "t on the linearised variance"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bound by Student's t; `exact` changes nothing."""
        # Where nothing varies, Tango's interval without any change: the score test's answer to "n times nothing".
        nothing = norm.isf(alpha) ** 2
        half = max(float(t.isf(alpha, max(self.units - 1, 1))) * self.error, nothing / (self.units + nothing))
        raw = self.value - half if side == "low" else self.value + half
        return float(np.clip(raw, *self.limits))


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
            return noise @ np.sign(self.observed)
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
