# SPDX-License-Identifier: Apache-2.0
"""Whether probabilities mean what they say: the calibration error (ECE) and proper scores.

The calibration error is no smooth function of sums, so its interval comes from a bootstrap of whole units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.sparse import csr_matrix, hstack

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import Comparison, Estimate, Measurement, few_clusters, mean, too_few
from adaptclip.metrics.intervals import CalibrationParts, CalibrationSpread
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Drawing, Metric
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


ECE_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017 use the same number)."""

MIN_IMAGES_PER_BIN = 50
"""A group's calibration error is given only with this many images per occupied confidence bin, on average."""

_SMALLEST = float(np.finfo(np.float32).tiny)


def confidence_bins(top: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Returns (N,) the bin of each image's confidence; bin b covers (b/bins, (b+1)/bins].

    Args:
        top: (N,) highest probability of each image.
        bins: number of equal-width bins over 0 to 1.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return np.digitize(top.astype(np.float64), edges, right=True)


def ece_parts(judged: Judged, bins: int = ECE_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N,) right minus confidence, and (N,) the bin of each image."""
    return judged.right - judged.top, confidence_bins(judged.top, bins)


def outcome_parts(judged: Judged, bins: int = ECE_BINS) -> tuple[np.ndarray, np.ndarray]:
    """The same of a two-sided outcome: whether an image is positive minus the probability that it is."""
    given = judged.probs[:, 1].astype(np.float64)
    return (judged.labels == 1) - given, confidence_bins(given, bins)


Parts = Callable[[Judged], tuple[np.ndarray, np.ndarray]]


def ece(judged: Judged, bins: int = ECE_BINS, parts: Parts = ece_parts) -> Estimate:
    """Expected calibration error of the most probable class, 0 to 1, with equal-width bins.

    Mean over the images of |accuracy - mean confidence| of the image's bin (Guo et al. 2017, eq. 3). The influence
    takes the sign of every bin as given; the interval comes from `_compare_ece`.

    Args:
        judged: the images.
        bins: number of equal-width bins.
        parts: what is compared in the bins; `outcome_parts` compares the probability of a positive image with its
            share.
    """
    surplus, cell = parts(judged)
    sums = np.bincount(cell, surplus, minlength=bins) / len(judged)
    signed = surplus * np.sign(sums)[cell]
    value = float(np.abs(sums).sum())
    return Estimate(value, (signed - value) / len(judged))


def brier_values(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (N,) squared distances of the probabilities from the truth, each 0 to 2 (Brier 1950).

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
    """
    own = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0].astype(np.float64)
    return np.einsum("nc,nc->n", probs, probs, dtype=np.float64) - 2 * own + 1


def log_loss_values(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (N,) negative logarithms of the true class's probability, in nats; a probability of 0 counts as 1e-38."""
    own = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0].astype(np.float64)
    return -np.log(np.maximum(own, _SMALLEST))


def _no_probabilities(judged: Judged) -> str:
    return "" if judged.confident else "the predictions hold no probabilities"


def _not_all_probabilities(judged: Judged) -> str:
    if judged.ranked is not None or not judged.confident:
        return "the predictions do not hold the probabilities of all classes"
    return ""


def _thin_bins(judged: Judged, parts: Parts) -> str:
    bins = len(np.unique(parts(judged)[1]))
    if len(judged) >= MIN_IMAGES_PER_BIN * bins:
        return ""
    return f"{len(judged)} images for {bins} confidence bins; {MIN_IMAGES_PER_BIN} per bin are needed"


def _uniform_units(both: list[Judged], parts: Parts) -> int:
    """Units where all answers of a model are right, or all wrong, so that resamples know no others; else 0."""
    hits = [one.right if parts is ece_parts else one.labels == 1 for one in both]
    uniform = any(one.all() or not one.any() for one in hits)
    return both[0].sampling.num_units if uniform else 0


def _compare_ece(judged: Judged, baseline: Judged | None, drawing: Drawing, *, parts: Parts = ece_parts) -> Comparison:
    """The calibration error by the thresholded bootstrap, alone and paired."""
    both = [judged] if baseline is None else [judged, baseline]
    sampling, n = judged.sampling, len(judged)
    thin = [_thin_bins(one, parts) if drawing.full_bins else "" for one in both]
    few = too_few(sampling)
    if not few and len(sampling.strata) - len(np.unique(sampling.strata)) < 1:
        few = few_clusters(sampling.num_units)
    cut = [parts(one) for one in both]
    values = [ece(one, parts=parts).value for one in both]
    found: list[CalibrationParts] = []
    if not few and not all(thin):
        drawn = bootstrap_sums([(*part, ECE_BINS) for part in cut], sampling, draws=drawing.draws, seed=drawing.seed)
        found = [
            CalibrationParts(np.bincount(cell, surplus, minlength=ECE_BINS) / n, one)
            for (surplus, cell), one in zip(cut, drawn, strict=True)
        ]

    def one(value: float, reason: str, *chosen: CalibrationParts, of: list[Judged]) -> Measurement:
        if reason:
            return Measurement(None, n, note=reason)
        if few:
            return Measurement(value, n, note=few)
        return Measurement(value, n, CalibrationSpread(*chosen, uniform_units=_uniform_units(of, parts)))

    single = [one(values[i], thin[i], *found[i : i + 1], of=[both[i]]) for i in range(len(both))]
    if baseline is None:
        return Comparison(single[0])
    reason = thin[0] or thin[1]
    return Comparison(single[0], single[1], one(values[0] - values[1], reason, *found, of=both))


ECE = Metric(
    "ece", "calibration error (ECE)", "ECE", ece, better="lower", undefined=_no_probabilities,
    measure_with=_compare_ece, is_general=True, in_groups=True, hub="ece", instead="outcome_ece, of one class",
)  # fmt: skip

BRIER = Metric(
    "brier", "Brier score", "Brier", lambda judged: mean(brier_values(judged.probs, judged.labels)), better="lower",
    scale=(0.0, 2.0), per_cent=False, undefined=_not_all_probabilities, is_general=True, in_groups=True,
    hub="brier", instead="outcome_brier, of one class",
)  # fmt: skip

OUTCOME_BRIER = Metric(
    "outcome_brier", "Brier score of yes or no", "Brier",
    lambda judged: mean((judged.probs[:, 1].astype(np.float64) - (judged.labels == 1)) ** 2), better="lower",
    per_cent=False, of_outcome=True, undefined=_not_all_probabilities,
    meaning="mean squared distance of the probability from 0 or 1, half of what `brier` counts over both sides",
)  # fmt: skip

OUTCOME_ECE = Metric(
    "outcome_ece", "calibration error of yes or no (ECE)", "ECE", partial(ece, parts=outcome_parts), better="lower",
    of_outcome=True, undefined=_not_all_probabilities, measure_with=partial(_compare_ece, parts=outcome_parts),
    meaning="how far the probability of the positive side is from the share of positive images, mean over the images",
)  # fmt: skip
