# SPDX-License-Identifier: Apache-2.0
"""Differences between groups against what noise alone would make of them.

The largest of several groups' rates minus the smallest is never negative, so that equal groups show a gap too, the
larger the more and the smaller they are; its bootstrap interval leaves out zero whatever the truth. Here the gap is
compared with its distribution where all groups have one mean. Where images are independent, group labels are dealt out
anew (a permutation test). Where they come in clusters that would test more than the means: labels that are dealt out to
whole clusters make every group vary alike, and groups whose clusters are more alike within, or fewer, would raise
alarms with equal means. So there every group keeps the uncertainty of its own mean (Welch 1951; cluster-robust), with
Student's t for its degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from adaptclip.metrics.estimates import Measurement, mean, share, variance
from adaptclip.metrics.intervals import Side, Spread
from adaptclip.metrics.judged import Sampling
from adaptclip.seeding import numpy_generator


def pair_bounds(
    values: Sequence[float], spreads: Sequence[Spread], side: Side, alpha: float, *, exact: bool = False
) -> np.ndarray:
    """One-sided bounds of all differences between G independent numbers (square-and-add, `DifferenceSpread`).

    Args:
        values: G numbers.
        spreads: their uncertainties.
        side: which bound.
        alpha: probability that a true difference lies beyond its bound.
        exact: take the bounds that hold their level for certain.

    Returns:
        (G, G) bound of number i minus number j; the diagonal is 0.
    """
    known = np.array(values, dtype=float)
    low, high = (np.array([s.bound(end, alpha, exact=exact) for s in spreads]) for end in ("low", "high"))
    difference, down, up = known[:, None] - known, known - low, high - known
    if side == "low":
        bounds = difference - np.hypot(down[:, None], up[None, :])
    else:
        bounds = difference + np.hypot(up[:, None], down[None, :])
    np.fill_diagonal(bounds, 0.0)
    return bounds


def largest_difference(families: Sequence[Sequence[Measurement]]) -> Measurement:
    """The largest difference between two groups, in the one of several numbers in which it is largest.

    A bootstrap of the max-min would never leave out 0. Here the upper end is the largest upper bound of any pair (if
    the truth is larger, one pair's own bound is wrong), and the lower end the largest lower bound, Bonferroni-corrected
    over all ordered pairs and numbers.

    Args:
        families: for each number (such as true and false positive rate) its measurement in every group.
    """
    values = [[m.value for m in groups if m.value is not None] for groups in families]
    n = sum(m.n for groups in families for m in groups)
    if any(len(v) < 2 or len(v) < len(g) for v, g in zip(values, families, strict=True)):
        return Measurement(None, n, note="two groups with a value are needed")
    value = max(max(v) - min(v) for v in values)
    spreads = [[m.spread for m in groups if m.spread is not None] for groups in families]
    if any(len(s) < len(v) for s, v in zip(spreads, values, strict=True)):
        return Measurement(value, n, note="no interval: a group of them has none")
    return Measurement(value, n, _LargestSpread(values, spreads))


@dataclass(frozen=True)
class _LargestSpread:
    values: Sequence[Sequence[float]]
    spreads: Sequence[Sequence[Spread]]

    @property
    def method(self) -> str:
        return "simultaneous bounds of all pairs of groups"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        pairs = sum(len(v) * (len(v) - 1) for v in self.values)
        level = alpha / pairs if side == "low" else alpha
        both = zip(self.values, self.spreads, strict=True)
        found = max(float(pair_bounds(v, s, side, level, exact=exact).max()) for v, s in both)
        return float(np.clip(found, 0.0, 1.0))


@dataclass(frozen=True)
class GapTest:
    """A max-min gap of group means and what noise alone would give.

    Attributes:
        value: largest minus smallest group mean.
        best: position of the group with the largest mean.
        worst: position of the group with the smallest mean.
        p_value: probability of a gap at least as large if all groups had the same mean.
        null_quantile: gap that noise alone stays within, with the asked probability.
        rest: (G,) each group's mean minus that of all other images.
        rest_p: (G,) two-sided p-value of each, not corrected for their number.
        below_p: (G,) one-sided p-value that each is lower than the others, not corrected.
        method: how the null distribution was found, in words.
    """

    value: float
    best: int
    worst: int
    p_value: float
    null_quantile: float
    rest: np.ndarray
    rest_p: np.ndarray
    below_p: np.ndarray
    method: str


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns p-values corrected for their number by Holm's step-down method (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def gap_test(
    values: np.ndarray,
    group: np.ndarray,
    sampling: Sampling | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> GapTest:
    """Tests whether group means differ by more than chance.

    Args:
        values: (N,) what is averaged, for example whether an image is right.
        group: (N,) group of each image, 0 to G - 1; every group has an image, and G is at least 2.
        sampling: how the images were drawn; None where they are independent.
        draws: random deals R.
        seed: of the deals.
        confidence: level of `null_quantile`.
    """
    values = np.asarray(values, dtype=float)
    sizes = np.bincount(group)
    means = np.bincount(group, values) / sizes
    rng = numpy_generator(seed, "permutation")
    null, method = _null_means(values, group, sampling or Sampling.of(len(values)), draws, rng)
    gaps = null.max(axis=1) - null.min(axis=1)
    gap = float(means.max() - means.min())
    rest, null_rest = _against_rest(means, sizes), _against_rest(null, sizes)
    # Ties count against the finding; sums in another order differ in the last digits.
    reached = (gaps >= gap - 1e-9).sum()
    rest_reached = (np.abs(null_rest) >= np.abs(rest) - 1e-9).sum(axis=0)
    below = (null_rest <= rest + 1e-9).sum(axis=0)
    return GapTest(
        value=gap,
        best=int(means.argmax()),
        worst=int(means.argmin()),
        p_value=float((1 + reached) / (1 + draws)),
        null_quantile=float(np.quantile(gaps, confidence)),
        rest=rest,
        rest_p=(1 + rest_reached) / (1 + draws),
        below_p=(1 + below) / (1 + draws),
        method=method,
    )


def _against_rest(means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(..., G) mean of each group minus that of all others."""
    sums = means * sizes
    return means - (sums.sum(axis=-1, keepdims=True) - sums) / (sizes.sum() - sizes)


def _null_means(
    values: np.ndarray, group: np.ndarray, sampling: Sampling, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """(R, G) group means where all groups have one mean, and in words how they were found."""
    sizes = np.bincount(group)
    if sampling.clustered:
        means = _own_noise(values, group, sampling, draws, rng)
        return means, f"each group's own variance over {sampling.num_units:,} clusters, {draws:,} draws"
    words = f"permutation of {len(values):,} images, {draws:,} draws"
    if bool(((values == 0) | (values == 1)).all()):
        # Dealing labels out to right and wrong images is drawing without replacement: no need to deal one by one.
        right = rng.multivariate_hypergeometric(sizes, int(values.sum()), size=draws, method="marginals")
        return right / sizes, words
    dealt = np.stack([np.bincount(group, rng.permutation(values)) for _ in range(draws)])
    return dealt / sizes, words


def _own_noise(
    values: np.ndarray, group: np.ndarray, sampling: Sampling, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """(R, G) means around the common one that vary as the groups' own do, jointly where they share clusters."""
    num_groups, overall = int(group.max()) + 1, float(values.mean())
    spread, degrees = np.zeros(num_groups), np.zeros(num_groups)
    binary = bool(((values == 0) | (values == 1)).all())
    most = float(values.var())
    for g in range(num_groups):
        rows = np.flatnonzero(group == g)
        own = sampling.take(rows)
        found = variance((share if binary else mean)(values[rows] == 1 if binary else values[rows]), own, most)
        # A group in which nothing varies has shown no noise; that is no proof that it has none.
        spread[g] = np.sqrt(found.value if found.value > 1e-15 else most / found.units)
        degrees[g] = found.df
    correlation = _correlation(values, group, sampling, num_groups)
    steps = rng.multivariate_normal(np.zeros(num_groups), correlation, size=draws, method="eigh")
    scale = np.sqrt(degrees / rng.chisquare(degrees, size=(draws, num_groups)))
    return overall + steps * scale * spread


def _correlation(values: np.ndarray, group: np.ndarray, sampling: Sampling, num_groups: int) -> np.ndarray:
    """(G, G) correlation of the group means that comes from clusters with images in several groups."""
    rest = values - (np.bincount(group, values) / np.bincount(group))[group]
    cells, place = np.unique(sampling.unit * num_groups + group, return_inverse=True)
    unit, of = np.divmod(cells, num_groups)
    parts = np.bincount(place, rest)
    if len(np.unique(unit)) == len(cells):  # every cluster lies in one group
        return np.eye(num_groups)
    table = csr_matrix((parts, (unit, of)), shape=(sampling.num_units, num_groups))
    covariance = (table.T @ table).toarray()
    root = np.sqrt(np.diag(covariance))
    return np.divide(covariance, np.outer(root, root), out=np.eye(num_groups), where=np.outer(root, root) > 0)
