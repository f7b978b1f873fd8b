"""A vectorised bootstrap of whole units, for the calibration error, which is no smooth function of sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack

from adaptclip.errors import DataError
from adaptclip.metrics.judged import Sampling
from adaptclip.seeding import numpy_generator

MIN_DRAWS = 1000
"""Fewest bootstrap draws that are accepted."""

NORMAL_UNITS = 20_000
"""Beyond this many units a resample's sums are drawn from the normal distribution that they tend to: the same spread to
within Monte-Carlo error, in a time that does not grow with the units."""

_CHUNK = 4_000_000
"""Weights held at once, draws x units: 32 MB."""


def _draw_weights(stratum: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Returns (draws, U) weights by Rao & Wu's (1988) rescaled bootstrap: m - 1 of a stratum's m units, times m/(m-1).

    The plain bootstrap of a stratum of m units has (m-1)/m of the right variance: half of it for two images a class.
    """
    order = np.argsort(stratum, kind="stable")
    sizes, num_units = np.bincount(stratum), len(stratum)
    starts = np.cumsum(sizes) - sizes
    low, width = np.repeat(starts, sizes - 1), np.repeat(sizes, sizes - 1)
    picks = low + (rng.random((draws, len(low))) * width).astype(np.int64)
    picks += np.arange(draws)[:, None] * num_units
    counts = np.bincount(picks.ravel(), minlength=draws * num_units).reshape(draws, -1)
    weights = np.empty(counts.shape)
    weights[:, order] = counts * np.repeat(sizes / np.maximum(sizes - 1, 1), sizes)
    return weights


def bootstrap_sums(
    parts: Sequence[tuple[np.ndarray, np.ndarray, int]], sampling: Sampling, *, draws: int = 2000, seed: int = 0
) -> list[np.ndarray]:
    """Sums over cells of images, each divided by all images, on resamples of whole units.

    Args:
        parts: each (N,) values, (N,) the cell of each image, and the number of cells; all on the same resamples.
        sampling: how the images were drawn: which belong together, and within which classes their number was fixed.
        draws: number of resamples R, at least MIN_DRAWS.
        seed: the draws depend on it and on nothing else.

    Returns:
        One (R, cells) array for each part.

    Raises:
        DataError: too few draws, or a single unit.
    """
    stratum = sampling.strata
    if draws < MIN_DRAWS or sampling.num_units - len(np.unique(stratum)) < 1:
        raise DataError(
            f"a bootstrap needs at least {MIN_DRAWS} draws and two units, got {draws} draws of "
            f"{sampling.num_units} unit(s)"
        )
    rng = numpy_generator(seed, "bootstrap")
    ones = np.ones(len(sampling.unit))
    sizes = _table(ones, np.zeros(len(ones), np.int64), 1, sampling)
    sums = csr_matrix(hstack([*(_table(*part, sampling) for part in parts), sizes]))
    drawn = (_normal_sums if sampling.num_units > NORMAL_UNITS else _drawn_sums)(sums, stratum, rng, draws)
    shares = drawn[:, :-1] / np.maximum(drawn[:, -1:], 1e-300)
    return np.split(shares, np.cumsum([cells for *_, cells in parts])[:-1], axis=1)


def _table(values: np.ndarray, cell: np.ndarray, num_cells: int, sampling: Sampling) -> csr_matrix:
    """(U, cells) sums of the values of each unit."""
    return csr_matrix((values, (sampling.unit, cell)), shape=(sampling.num_units, num_cells))


def _drawn_sums(sums: csr_matrix, stratum: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The sums on units drawn one by one."""
    step = max(1, _CHUNK // len(stratum))
    chunks = [min(step, draws - start) for start in range(0, draws, step)]
    return np.concatenate([_draw_weights(stratum, rng, chunk) @ sums for chunk in chunks])


def _normal_sums(sums: csr_matrix, stratum: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The sums drawn jointly from the normal distribution of a (stratified) resample's sums."""
    sizes = np.bincount(stratum).astype(float)
    factor = sizes / np.maximum(sizes - 1, 1)
    member = csr_matrix((np.ones(len(stratum)), (stratum, np.arange(len(stratum)))))
    of_strata = csr_matrix(member @ sums).toarray()
    scaled = sums.multiply(np.sqrt(factor)[stratum][:, None]).tocsr()
    covariance = (scaled.T @ scaled).toarray() - of_strata.T @ (of_strata * (factor / sizes)[:, None])
    variances, directions = np.linalg.eigh(covariance)
    steps = rng.normal(size=(draws, len(variances))) * np.sqrt(np.maximum(variances, 0))
    return of_strata.sum(axis=0) + steps @ directions.T
