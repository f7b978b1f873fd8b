"""Differences between groups against what noise alone would make of them.

The largest of several groups' rates minus the smallest is never negative, so that equal groups show a gap too, the
larger the more and the smaller they are; its bootstrap interval leaves out zero whatever the truth. Here the gap is
compared with its distribution where the group makes no difference: group labels are dealt out anew, with whole clusters
as the unit (a cluster with several groups deals its labels out among its own images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptclip.seeding import numpy_generator

MOST_UNITS = 20_000
"""Beyond this many units the permutation distribution is replaced by the normal one that it tends to."""

_CHUNK = 4_000_000
"""Group labels held at once, draws x units."""


@dataclass(frozen=True)
class GapTest:
    """A max-min gap of group means and what noise alone would give.

    Attributes:
        value: largest minus smallest group mean.
        best: position of the group with the largest mean.
        worst: position of the group with the smallest mean.
        p_value: probability of a gap at least as large if the group made no difference.
        null_quantile: gap that noise alone stays within, with the asked probability.
        rest: (G,) each group's mean minus that of all other images.
        rest_p: (G,) two-sided p-value of each, not corrected for their number.
        method: how the null distribution was found, in words.
    """

    value: float
    best: int
    worst: int
    p_value: float
    null_quantile: float
    rest: np.ndarray
    rest_p: np.ndarray
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
    clusters: np.ndarray | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> GapTest:
    """Tests whether group means differ by more than chance.

    Args:
        values: (N,) what is averaged, for example whether an image is right.
        group: (N,) group of each image, 0 to G - 1; every group has an image, and G is at least 2.
        clusters: (N,) cluster of each image, 0 to U - 1, or None where images are independent.
        draws: random deals R.
        seed: of the deals.
        confidence: level of `null_quantile`.
    """
    values = np.asarray(values, dtype=float)
    sizes = np.bincount(group)
    means = np.bincount(group, values) / sizes
    rng = numpy_generator(seed, "permutation")
    null, method = _null_means(values, group, clusters, draws, rng)
    gaps = null.max(axis=1) - null.min(axis=1)
    gap = float(means.max() - means.min())
    rest, null_rest = _against_rest(means, sizes), _against_rest(null, sizes)
    # Ties count against the finding; sums in another order differ in the last digits.
    reached = (gaps >= gap - 1e-9).sum()
    rest_reached = (np.abs(null_rest) >= np.abs(rest) - 1e-9).sum(axis=0)
    return GapTest(
        value=gap,
        best=int(means.argmax()),
        worst=int(means.argmin()),
        p_value=float((1 + reached) / (1 + draws)),
        null_quantile=float(np.quantile(gaps, confidence)),
        rest=rest,
        rest_p=(1 + rest_reached) / (1 + draws),
        method=method,
    )


def _against_rest(means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(..., G) mean of each group minus that of all others."""
    sums = means * sizes
    return means - (sums.sum(axis=-1, keepdims=True) - sums) / (sizes.sum() - sizes)


def _null_means(
    values: np.ndarray, group: np.ndarray, clusters: np.ndarray | None, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """(R, G) group means where the group makes no difference, and in words how they were found."""
    sizes = np.bincount(group)
    binary = bool(((values == 0) | (values == 1)).all())
    if clusters is None and binary:
        # Dealing labels out to right and wrong images is drawing without replacement: no need to deal one by one.
        right = rng.multivariate_hypergeometric(sizes, int(values.sum()), size=draws, method="marginals")
        return right / sizes, f"permutation of {len(values):,} images, {draws:,} draws"
    unit = np.arange(len(values)) if clusters is None else clusters
    num_units = int(unit.max()) + 1
    words = f"{num_units:,} {'images' if clusters is None else 'clusters'}"
    if num_units > MOST_UNITS:
        return _normal_means(values, group, unit, draws, rng), f"normal approximation over {words}, {draws:,} draws"
    return _dealt_means(values, group, unit, draws, rng), f"permutation of {words}, {draws:,} draws"


def _normal_means(
    values: np.ndarray, group: np.ndarray, unit: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Group means that vary as the sums of their units' deviations do, all around one mean."""
    num_groups, deviation = int(group.max()) + 1, values - values.mean()
    cell = np.unique(unit * num_groups + group, return_inverse=True)[1]
    squares = np.bincount(cell, deviation) ** 2
    # Under the null every image is as noisy as any other, whichever its group.
    share = np.bincount(group) * squares.sum() / len(values)
    return rng.normal(size=(draws, num_groups)) * np.sqrt(share) / np.bincount(group)


def _dealt_means(
    values: np.ndarray, group: np.ndarray, unit: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Group means with the labels dealt out `draws` times: to whole units, and within units of several groups."""
    num_groups = int(group.max()) + 1
    lowest, highest = (np.full(int(unit.max()) + 1, fill) for fill in (num_groups, -1))
    np.minimum.at(lowest, unit, group)
    np.maximum.at(highest, unit, group)
    mixed = (lowest != highest)[unit]
    whole = np.flatnonzero(lowest == highest)
    sums, sizes = np.bincount(unit, values)[whole], np.bincount(unit)[whole].astype(float)
    out_sums, out_sizes = np.zeros((2, draws, num_groups))
    step = max(1, _CHUNK // len(values))
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        count = rows.stop - rows.start
        if len(whole):
            dealt = rng.permuted(np.tile(lowest[whole].astype(np.int16), (count, 1)), axis=1)
            _add(out_sums[rows], out_sizes[rows], dealt, sums, sizes)
        if mixed.any():
            order = np.argsort(unit[mixed] + rng.random((count, int(mixed.sum()))), axis=1)
            place = np.argsort(unit[mixed], kind="stable")
            dealt = np.empty(order.shape, np.int16)
            dealt[:, place] = group[mixed][order]
            _add(out_sums[rows], out_sizes[rows], dealt, values[mixed], np.ones(int(mixed.sum())))
    return np.divide(out_sums, out_sizes, out=np.full_like(out_sums, values.mean()), where=out_sizes > 0)


def _add(out_sums: np.ndarray, out_sizes: np.ndarray, dealt: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
    """Adds what each group got in each deal."""
    both = np.stack([sums, sizes], axis=1)
    for g in range(out_sums.shape[1]):
        got = (dealt == g) @ both
        out_sums[:, g] += got[:, 0]
        out_sizes[:, g] += got[:, 1]
