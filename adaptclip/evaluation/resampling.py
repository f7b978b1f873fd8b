"""A vectorised bootstrap with clusters as the unit of resampling, stratified by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, hstack

from adaptclip.errors import DataError
from adaptclip.evaluation.metrics import Cells
from adaptclip.seeding import numpy_generator

MIN_DRAWS = 1000
"""Fewest bootstrap draws that are accepted."""

NORMAL_UNITS = 20_000
"""Beyond this many units a resample's sums are drawn from the normal distribution that they tend to: the same spread to
within Monte-Carlo error, in a time that does not grow with the units."""

NORMAL_SUMS = 1_000
"""Most sums that are drawn together in this way; with more (thousands of classes) units are drawn one by one."""

_CHUNK = 4_000_000
"""Weights held at once, draws x units: 32 MB."""


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
        name -> R values, shaped as the metric's `combine` says.

    Raises:
        DataError: too few draws, or a single unit.
    """
    if draws < MIN_DRAWS or plan.df < 1:
        raise DataError(
            f"a bootstrap needs at least {MIN_DRAWS} draws and two units, got {draws} draws of {plan.num_units} unit(s)"
        )
    rng = numpy_generator(seed, "bootstrap")
    if plan.num_units > NORMAL_UNITS and 2 * sum(cells.num_cells for cells in metrics.values()) <= NORMAL_SUMS:
        return _normal_draws(plan, metrics, rng, draws)
    recompute = {name: _by_unit(cells, plan) for name, cells in metrics.items()}
    widest = max([plan.num_units, *(cells.num_cells for cells in metrics.values())])
    step = max(1, _CHUNK // widest)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for start in range(0, draws, step):
        weights = _draw_weights(plan, rng, min(step, draws - start))
        for name, function in recompute.items():
            parts[name].append(function(weights))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _normal_draws(
    plan: ResamplingPlan, metrics: Mapping[str, Cells], rng: np.random.Generator, draws: int
) -> dict[str, np.ndarray]:
    """The metrics on sums drawn jointly from the normal distribution of a stratified resample's sums."""
    unit_sums = hstack([table for cells in metrics.values() for table in _tables(cells, plan)], format="csr")
    sizes = np.bincount(plan.stratum).astype(float)
    factor = sizes / np.maximum(sizes - 1, 1)
    member = csr_matrix((np.ones(plan.num_units), (plan.stratum, np.arange(plan.num_units))))
    of_strata = (member @ unit_sums).toarray()
    scaled = unit_sums.multiply(np.sqrt(factor)[plan.stratum][:, None]).tocsr()
    covariance = (scaled.T @ scaled).toarray() - of_strata.T @ (of_strata * (factor / sizes)[:, None])
    variances, directions = np.linalg.eigh(covariance)
    steps = rng.normal(size=(draws, len(variances))) * np.sqrt(np.maximum(variances, 0))
    drawn = of_strata.sum(axis=0) + steps @ directions.T
    found: dict[str, np.ndarray] = {}
    for name, cells in metrics.items():
        sums, weights, drawn = np.split(drawn, [cells.num_cells, 2 * cells.num_cells], axis=1)
        found[name] = cells.combine(sums, np.maximum(weights, 0))
    return found


def _tables(cells: Cells, plan: ResamplingPlan) -> tuple[csr_matrix, csr_matrix]:
    """(U, cells) sums of values and numbers of images of each unit."""
    shape, where = (plan.num_units, cells.num_cells), (plan.unit, cells.cell)
    return csr_matrix((cells.values, where), shape=shape), csr_matrix((np.ones(len(cells.values)), where), shape=shape)


def _by_unit(cells: Cells, plan: ResamplingPlan) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the metric as a function of unit weights (R, U): images are summed within units once, beforehand."""
    sums, sizes = _tables(cells, plan)
    return lambda weights: cells.combine(weights @ sums, weights @ sizes)
