"""Metrics of a set of predictions with their uncertainty: alone, and paired with a baseline on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.evaluation.grouping import encode
from adaptclip.evaluation.influence import Linearised, brier_score, macro_auc, variance
from adaptclip.evaluation.intervals import (
    CalibrationParts,
    CalibrationSpread,
    PairedSpread,
    RateSpread,
    ScoreSpread,
    Side,
    Spread,
)
from adaptclip.evaluation.metrics import (
    LINEARISED,
    METRIC_FUNCTIONS,
    absent_classes,
    confidence_bins,
    correct,
    metric_cells,
    topk_correct,
)
from adaptclip.evaluation.resampling import ResamplingPlan, bootstrap, plan_resampling
from adaptclip.gate_rules import GENERAL_METRICS
from adaptclip.types import Predictions

MIN_CLUSTERS = 10
"""Fewer clusters than this say too little about clusters not seen: no interval is given."""

MIN_IMAGES_PER_BIN = 50
"""A group's calibration error is given only with this many images per occupied confidence bin, on average."""


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
class _Sample:
    """The judged rows. `probs` holds one array for the model and, where there is one, a second for the baseline."""

    labels: np.ndarray
    probs: tuple[np.ndarray, ...]
    plan: ResamplingPlan
    clustered: bool
    num_classes: int
    ranked: int | None
    confident: bool

    @property
    def n(self) -> int:
        return len(self.labels)


def measure(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    metrics: Sequence[str] = GENERAL_METRICS,
    rows: np.ndarray | None = None,
    full_bins: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Measures metrics with their uncertainty.

    Args:
        predictions: the judged model; its clusters, where given, are the unit of resampling.
        baseline: the model to compare with, aligned (see `grouping.align`).
        metrics: names from GENERAL_METRICS.
        rows: positions of the images to judge; None judges all.
        full_bins: leave `ece` out where the bins are thinly filled (for groups).
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        metric -> comparison. Nothing in it is NaN: what cannot be computed is None with a note.
    """
    sample = _take(predictions, baseline, rows)
    if sample.n == 0:
        none = Measurement(None, 0, note="no images")
        return {m: Comparison(none, *((none, none) if baseline is not None else ())) for m in metrics}
    # Few clusters, or a single image: no resampling, and each measurement says why.
    resampled = [m for m in metrics if _undefined(m, sample) == "" and _needs_draws(m, sample)]
    parts = {f"{m}/{i}": metric_cells(m, p, sample.labels) for m in resampled for i, p in enumerate(sample.probs)}
    can_draw = parts and sample.plan.df > 0 and not _too_few_clusters(sample)
    drawn = bootstrap(sample.plan, parts, draws=draws, seed=seed) if can_draw else {}
    return {m: _compare(m, sample, [drawn.get(f"{m}/{i}") for i in range(2)], full_bins) for m in metrics}


def few_clusters(units: int) -> str:
    """Says why a number of so few clusters has no interval."""
    return f"no interval: {units} cluster{'s' * (units != 1)}, and at least {MIN_CLUSTERS} are needed"


def _take(predictions: Predictions, baseline: Predictions | None, rows: np.ndarray | None) -> _Sample:
    keep = np.arange(len(predictions)) if rows is None else rows
    both = (predictions,) if baseline is None else (predictions, baseline)
    clusters = None if predictions.clusters is None else encode(predictions.clusters)[1][keep]
    if clusters is not None and len(np.unique(clusters)) == len(keep):
        clusters = None  # clusters of one image are independent images, and need no resampling
    labels = predictions.labels[keep]
    plan = plan_resampling(labels, clusters) if len(keep) else ResamplingPlan(np.zeros(0, int), np.zeros(0, int))
    probs = tuple(p.probs if rows is None else p.probs[keep] for p in both)
    ranked = min((p.ranked for p in both if p.ranked is not None), default=None)
    confident = all(p.confident for p in both)
    return _Sample(labels, probs, plan, clusters is not None, len(predictions.class_names), ranked, confident)


def _needs_draws(metric: str, sample: _Sample) -> bool:
    return metric not in LINEARISED and (sample.clustered or metric in ("ece", "mean_per_class_accuracy"))


def _too_few_clusters(sample: _Sample) -> str:
    units = sample.plan.num_units
    if not sample.clustered or units >= MIN_CLUSTERS:
        return ""
    return few_clusters(units)


def _undefined(metric: str, sample: _Sample) -> str:
    if metric not in METRIC_FUNCTIONS:
        raise DataError(f"unknown metric {metric!r}. {did_you_mean(metric, METRIC_FUNCTIONS)}")
    if metric == "top5_accuracy" and sample.num_classes <= 5:
        return f"top-5 accuracy says nothing about {sample.num_classes} classes"
    if metric == "top5_accuracy" and sample.ranked is not None and sample.ranked < 5:
        return f"the predictions rank only {sample.ranked} of the classes"
    if metric in LINEARISED and (sample.ranked is not None or not sample.confident):
        return "the predictions do not hold the probabilities of all classes"
    if metric == "ece" and not sample.confident:
        return "the predictions hold no probabilities"
    if metric == "macro_auc" and len(np.unique(sample.labels)) < 2:
        return "AUC needs images of two classes"
    return ""


def _thin_bins(probs: np.ndarray) -> str:
    bins = len(np.unique(confidence_bins(probs)))
    if len(probs) >= MIN_IMAGES_PER_BIN * bins:
        return ""
    return f"{len(probs)} images for {bins} confidence bins; {MIN_IMAGES_PER_BIN} per bin are needed"


def _compare(metric: str, sample: _Sample, draws: list[np.ndarray | None], full_bins: bool) -> Comparison:
    reasons = [
        _undefined(metric, sample) or (_thin_bins(probs) if full_bins and metric == "ece" else "")
        for probs in sample.probs
    ]
    single = [
        Measurement(None, sample.n, note=reason) if reason else _single(metric, sample, i, draws[i])
        for i, reason in enumerate(reasons)
    ]
    if len(single) == 1:
        return Comparison(single[0])
    reason = reasons[0] or reasons[1]
    change = Measurement(None, sample.n, note=reason) if reason else _change(metric, sample, draws)
    return Comparison(single[0], single[1], change)


def _single(metric: str, sample: _Sample, which: int, draws: np.ndarray | None) -> Measurement:
    if metric in LINEARISED:
        return _score(metric, sample, (_linearise(metric, sample, which),))
    probs = sample.probs[which]
    value = METRIC_FUNCTIONS[metric](probs, sample.labels)
    notes = [_absent(sample)] if metric == "mean_per_class_accuracy" else []
    spread: Spread | None = None
    if _too_few_clusters(sample):
        notes.append(_too_few_clusters(sample))
    elif metric != "ece":
        spread = RateSpread(value, *_size(metric, sample, value * (1 - value), draws))
    elif draws is not None:
        spread = CalibrationSpread(_parts(sample, which, draws), None, _uniform_units(sample))
    else:
        notes.append("no interval: a single image cannot be resampled")
    return Measurement(value, sample.n, spread, "; ".join(filter(None, notes)))


def _change(metric: str, sample: _Sample, draws: list[np.ndarray | None]) -> Measurement:
    if metric in LINEARISED:
        return _score(metric, sample, (_linearise(metric, sample, 0), _linearise(metric, sample, 1)))
    probs, base = sample.probs
    value = METRIC_FUNCTIONS[metric](probs, sample.labels) - METRIC_FUNCTIONS[metric](base, sample.labels)
    if _too_few_clusters(sample):
        return Measurement(value, sample.n, note=_too_few_clusters(sample))
    drawn, drawn_before = draws
    if metric == "ece":
        if drawn is None or drawn_before is None:
            return Measurement(value, sample.n, note="no interval: a single image cannot be resampled")
        parts = _parts(sample, 0, drawn), _parts(sample, 1, drawn_before)
        return Measurement(value, sample.n, CalibrationSpread(*parts, _uniform_units(sample)))
    difference = None if drawn is None or drawn_before is None else drawn - drawn_before
    hits = topk_correct if metric == "top5_accuracy" else lambda p, y, k: correct(p, y)
    now, before = hits(probs, sample.labels, 5), hits(base, sample.labels, 5)
    gained, lost = _rate(metric, sample, now & ~before), _rate(metric, sample, before & ~now)
    spread = PairedSpread(gained, lost, *_size(metric, sample, gained + lost - (gained - lost) ** 2, difference))
    return Measurement(value, sample.n, spread, _absent(sample) if metric == "mean_per_class_accuracy" else "")


def _linearise(metric: str, sample: _Sample, which: int) -> Linearised:
    found = (brier_score if metric == "brier" else macro_auc)(sample.probs[which], sample.labels)
    assert found is not None  # _undefined has left out images of a single class
    return found


def _score(metric: str, sample: _Sample, parts: Sequence[Linearised]) -> Measurement:
    """One linearised metric, or the paired change of the first part against the second."""
    value, influence = parts[0].value, parts[0].influence
    for before in parts[1:]:
        value, influence = value - before.value, influence - before.influence
    units = sample.plan.num_units
    if reason := _too_few_clusters(sample) or ("no interval: a single image" if units < 2 else ""):
        return Measurement(value, sample.n, note=reason)
    drawn, note = variance(influence, sample.plan.unit), ""
    if metric == "macro_auc":
        counts = np.bincount(sample.labels)
        counts = counts[counts > 0]
        units = max(int(units / sample.n * len(counts) ** 2 / (1 / counts).sum()), 1)
        drawn = max(drawn, parts[0].least if len(parts) == 1 else 0.0)
        note = _absent(sample)
    if len(parts) == 1 and metric == "macro_auc":
        # Without a single wrong pair the variance is zero; then each positive image counts as one trial.
        size = value * (1 - value) / drawn if drawn > 1e-12 and value < 1 else float(units)
        return Measurement(value, sample.n, RateSpread(value, size, float("inf"), None), note)
    reach = 2.0 if metric == "brier" else 1.0
    limits = (0.0, reach) if len(parts) == 1 else (-reach, reach)
    return Measurement(value, sample.n, ScoreSpread(value, float(np.sqrt(drawn)), units, limits), note)


def _parts(sample: _Sample, which: int, draws: np.ndarray) -> CalibrationParts:
    cells = metric_cells("ece", sample.probs[which], sample.labels)
    return CalibrationParts(np.bincount(cells.cell, cells.values, minlength=cells.num_cells) / sample.n, draws)


def _rate(metric: str, sample: _Sample, hit: np.ndarray) -> float:
    """Share of the images, or mean of the classes' shares, for which `hit` holds."""
    if metric != "mean_per_class_accuracy":
        return float(hit.mean())
    _, cell, counts = np.unique(sample.labels, return_inverse=True, return_counts=True)
    return float((np.bincount(cell, hit) / counts).mean())


def _size(metric: str, sample: _Sample, variance: float, draws: np.ndarray | None) -> tuple[float, float, int | None]:
    """Effective number of images, its cap and degrees of freedom, for RateSpread and PairedSpread.

    Args:
        metric: name of a rate.
        sample: the judged images.
        variance: of one independent image, p(1-p) or its paired counterpart.
        draws: (R,) the estimate on resamples; None where the images are independent and the rate is a plain share.
    """
    counts = np.bincount(sample.labels)
    counts = counts[counts > 0]
    per_class = metric == "mean_per_class_accuracy"
    # K classes of n_k images of equal variance: the mean of their rates varies as that of K^2 / sum(1/n_k) images.
    cap = float(len(counts) ** 2 / (1 / counts).sum()) if per_class else float(sample.n)
    if draws is None:
        return cap, cap, None
    drawn = float(draws.var(ddof=1))
    if drawn > 1e-12 and variance > 1e-12:
        return variance / drawn, cap, sample.plan.df
    # Nothing varies, so nothing tells how alike a cluster's images are: count each cluster as one image.
    return cap * sample.plan.num_units / sample.n, cap, None


def _absent(sample: _Sample) -> str:
    absent = len(absent_classes(sample.labels, sample.num_classes))
    return (
        f"{absent} of {sample.num_classes} classes have no images here and are left out of the mean" if absent else ""
    )


def _uniform_units(sample: _Sample) -> int:
    right = [correct(probs, sample.labels) for probs in sample.probs]
    return sample.plan.num_units if any(r.all() or not r.any() for r in right) else 0
