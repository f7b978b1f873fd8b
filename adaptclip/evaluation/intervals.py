"""Confidence bounds: score intervals for rates and paired rates, and a stratified cluster bootstrap.

What is used where:

- a rate of independent images: Wilson's score interval, or the exact Clopper-Pearson bound where a wrong "yes" must be
  limited for certain (gates);
- a rate of clustered images, and the mean of the classes' rates: the same formulas with an *effective* number of
  images, the variance p(1-p) of one image divided by the bootstrap variance (Korn & Graubard 1998; Dean & Pagano 2015).
  Percentiles of the bootstrap are not used for rates: near 0 and 1 they are too narrow, and empty when all is right;
- a change of a rate on the same images: Tango's score interval for paired proportions (Tango 1998), which stays honest
  when no image changes; effective numbers as above;
- the calibration error and its change: the basic bootstrap interval, which undoes the upward bias that resampling adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.optimize import root_scalar
from scipy.sparse import csr_matrix
from scipy.stats import beta, norm, t

from adaptclip.errors import DataError
from adaptclip.evaluation.metrics import Cells
from adaptclip.seeding import numpy_generator

Side = Literal["low", "high"]

MIN_CLUSTERS = 10
"""Fewer clusters than this say too little about clusters not seen: no interval is given."""

MIN_DRAWS = 1000
"""Fewest bootstrap draws that are accepted."""

_CHUNK = 4_000_000
"""Weights held at once, (draws x units): 32 MB."""


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
        df: degrees of freedom of the bootstrap variance behind `size`; None where none was needed.
    """

    rate: float
    size: float
    cap: float
    df: int | None = None

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "wilson" if self.df is None else "wilson, effective n by bootstrap"

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
class DrawSpread:
    """Uncertainty of any estimate, by basic bootstrap (Davison & Hinkley 1997, eq. 5.6).

    Attributes:
        value: the estimate.
        draws: (R,) the estimate on R resamples.
        limits: range the quantity can take.
        uniform_units: number of units where all images of a model are right (or all wrong), else 0. Resamples then
            know no errors, so the bound gives way by the error rate that so many units cannot exclude.
    """

    value: float
    draws: np.ndarray
    limits: tuple[float, float]
    uniform_units: int = 0

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "basic bootstrap"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Basic bootstrap bound; `exact` changes nothing."""
        unseen = 1 - wilson_bound(1.0, self.uniform_units, "low", alpha) if self.uniform_units else 0.0
        if side == "low":
            raw = 2 * self.value - np.quantile(self.draws, 1 - alpha) - unseen
        else:
            raw = 2 * self.value - np.quantile(self.draws, alpha) + unseen
        return float(np.clip(raw, *self.limits))


@dataclass(frozen=True)
class ResamplingPlan:
    """What is resampled, and within which strata.

    Attributes:
        unit: (N,) the unit (cluster, or the image itself) of each image.
        stratum: (U,) the stratum of each unit; every stratum has at least two units unless there is only one unit.
    """

    unit: np.ndarray
    stratum: np.ndarray

    @property
    def num_units(self) -> int:
        """Number of units U."""
        return len(self.stratum)

    @property
    def df(self) -> int:
        """Degrees of freedom of a variance: units minus strata."""
        return self.num_units - len(np.unique(self.stratum))


def plan_resampling(labels: np.ndarray, clusters: np.ndarray | None) -> ResamplingPlan:
    """Strata are the classes; a cluster with several classes belongs to its most frequent one.

    A class with a single unit would add no variance at all, so such classes share one stratum ("collapsed strata",
    Cochran 1977, section 5A.12), which errs on the wide side.

    Args:
        labels: (N,) class ids.
        clusters: (N,) cluster ids, or None where images are independent.
    """
    if clusters is None:
        unit, stratum = np.arange(len(labels)), np.unique(labels, return_inverse=True)[1]
    else:
        unit = np.unique(clusters, return_inverse=True)[1]
        table = csr_matrix((np.ones(len(labels)), (unit, labels)))
        stratum = np.unique(np.asarray(table.argmax(axis=1)).ravel(), return_inverse=True)[1]
    stratum = stratum.copy()
    sizes = np.bincount(stratum)
    singles = np.flatnonzero(sizes == 1)
    if len(singles) == 1 and len(sizes) > 1:
        others = np.where(sizes == 1, sizes.max() + 1, sizes)
        stratum[stratum == singles[0]] = others.argmin()
    elif len(singles):
        stratum[np.isin(stratum, singles)] = singles[0]
    return ResamplingPlan(unit, np.unique(stratum, return_inverse=True)[1])


def _draw_weights(plan: ResamplingPlan, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Returns (draws, U) weights by Rao & Wu's (1988) rescaled bootstrap: m - 1 of a stratum's m units, times m/(m-1).

    The plain bootstrap of a stratum of m units has (m-1)/m of the right variance: half of it for two images a class.
    """
    order = np.argsort(plan.stratum, kind="stable")
    sizes = np.bincount(plan.stratum)
    starts = np.cumsum(sizes) - sizes
    low, width = np.repeat(starts, sizes - 1), np.repeat(sizes, sizes - 1)
    picks = low + (rng.random((draws, len(low))) * width).astype(np.int64)
    picks += np.arange(draws)[:, None] * plan.num_units
    counts = np.bincount(picks.ravel(), minlength=draws * plan.num_units).reshape(draws, -1)
    weights = np.empty(counts.shape)
    weights[:, order] = counts * np.repeat(sizes / np.maximum(sizes - 1, 1), sizes)
    return weights


def bootstrap(
    plan: ResamplingPlan, metrics: Mapping[str, Cells], *, draws: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Recomputes metrics on resamples of whole units, stratified as planned; the same resamples for every metric.

    Args:
        plan: what is resampled; needs two units or more.
        metrics: name -> the metric taken apart over the N images of the plan.
        draws: number of resamples R, at least MIN_DRAWS.
        seed: the draws depend on it and on nothing else.

    Returns:
        name -> (R,) values.

    Raises:
        DataError: too few draws, or a single unit.
    """
    if draws < MIN_DRAWS or plan.df < 1:
        raise DataError(
            f"a bootstrap needs at least {MIN_DRAWS} draws and two units, got {draws} draws of {plan.num_units} unit(s)"
        )
    rng = numpy_generator(seed, "bootstrap")
    recompute = {name: _by_unit(cells, plan) for name, cells in metrics.items()}
    widest = max([plan.num_units, *(cells.num_cells for cells in metrics.values())])
    step = max(1, _CHUNK // widest)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for start in range(0, draws, step):
        weights = _draw_weights(plan, rng, min(step, draws - start))
        for name, function in recompute.items():
            parts[name].append(function(weights))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _by_unit(cells: Cells, plan: ResamplingPlan) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the metric as a function of unit weights (R, U): images are summed within units once, beforehand."""
    shape, where = (plan.num_units, cells.num_cells), (plan.unit, cells.cell)
    sums = csr_matrix((cells.values, where), shape=shape)
    sizes = csr_matrix((np.ones(len(cells.values)), where), shape=shape)
    return lambda weights: cells.combine(weights @ sums, weights @ sizes)
