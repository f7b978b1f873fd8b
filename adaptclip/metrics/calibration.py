"""Whether probabilities mean what they say: the calibration error (ECE) and proper scores."""

from __future__ import annotations

import numpy as np

from adaptclip.metrics.estimates import Comparison, Estimate, Measurement, few_clusters, mean, too_few
from adaptclip.metrics.intervals import CalibrationParts, CalibrationSpread
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import Drawing, Metric
from adaptclip.metrics.resampling import bootstrap_sums

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


def ece(judged: Judged, bins: int = ECE_BINS) -> Estimate:
    """Expected calibration error of the most probable class, 0 to 1, with equal-width bins.

    Mean over the images of |accuracy - mean confidence| of the image's bin (Guo et al. 2017, eq. 3). The influence
    takes the sign of every bin as given; the interval comes from `_compare_ece`.
    """
    surplus, cell = ece_parts(judged, bins)
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


def _thin_bins(judged: Judged) -> str:
    bins = len(np.unique(confidence_bins(judged.top)))
    if len(judged) >= MIN_IMAGES_PER_BIN * bins:
        return ""
    return f"{len(judged)} images for {bins} confidence bins; {MIN_IMAGES_PER_BIN} per bin are needed"


def _uniform_units(both: list[Judged]) -> int:
    """Units where all answers of a model are right, or all wrong, so that resamples know no others; else 0."""
    uniform = any(one.right.all() or not one.right.any() for one in both)
    return both[0].sampling.num_units if uniform else 0


def _compare_ece(judged: Judged, baseline: Judged | None, drawing: Drawing) -> Comparison:
    """The calibration error by the thresholded bootstrap, alone and paired."""
    both = [judged] if baseline is None else [judged, baseline]
    sampling, n = judged.sampling, len(judged)
    thin = [_thin_bins(one) if drawing.full_bins else "" for one in both]
    few = too_few(sampling)
    if not few and len(sampling.strata) - len(np.unique(sampling.strata)) < 1:
        few = few_clusters(sampling.num_units)
    cut = [ece_parts(one) for one in both]
    values = [ece(one).value for one in both]
    parts: list[CalibrationParts] = []
    if not few and not all(thin):
        drawn = bootstrap_sums([(*part, ECE_BINS) for part in cut], sampling, draws=drawing.draws, seed=drawing.seed)
        parts = [
            CalibrationParts(np.bincount(cell, surplus, minlength=ECE_BINS) / n, one)
            for (surplus, cell), one in zip(cut, drawn, strict=True)
        ]

    def one(value: float, reason: str, *chosen: CalibrationParts, of: list[Judged]) -> Measurement:
        if reason:
            return Measurement(None, n, note=reason)
        if few:
            return Measurement(value, n, note=few)
        return Measurement(value, n, CalibrationSpread(*chosen, uniform_units=_uniform_units(of)))

    single = [one(values[i], thin[i], *parts[i : i + 1], of=[both[i]]) for i in range(len(both))]
    if baseline is None:
        return Comparison(single[0])
    reason = thin[0] or thin[1]
    return Comparison(single[0], single[1], one(values[0] - values[1], reason, *parts, of=both))


ECE = Metric(
    "ece", "calibration error (ECE)", "ECE", ece, better="lower", undefined=_no_probabilities,
    measure_with=_compare_ece, is_general=True, in_groups=True, hub="ece",
)  # fmt: skip

BRIER = Metric(
    "brier", "Brier score", "Brier", lambda judged: mean(brier_values(judged.probs, judged.labels)), better="lower",
    scale=(0.0, 2.0), per_cent=False, undefined=_not_all_probabilities, is_general=True, in_groups=True,
    hub="brier",
)  # fmt: skip
