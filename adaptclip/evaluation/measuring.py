"""Metrics of predictions with their uncertainty: alone, and paired with a baseline on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptclip.evaluation.grouping import encode
from adaptclip.metrics import GENERAL_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import Comparison, Measurement
from adaptclip.metrics.judged import Judged, Marks, Sampling
from adaptclip.metrics.metric import Drawing
from adaptclip.types import Predictions


def sampling_of(predictions: Predictions, rows: np.ndarray | None = None) -> Sampling:
    """How the images of predictions, or those at `rows`, were drawn.

    Args:
        predictions: their clusters, where given, are the units; their classes are strata where the study fixed them.
        rows: positions of the images; None is all.
    """
    clusters = None if predictions.clusters is None else encode(predictions.clusters)[1]
    whole = Sampling(
        np.arange(len(predictions)) if clusters is None else clusters,
        (predictions.labels if predictions.strata is None else predictions.strata)
        if predictions.fixed_classes
        else None,
    )
    return whole if rows is None else whole.take(rows)


def marks_of(predictions: Predictions) -> Marks | None:
    """Yes or no for each class, where the model answers so."""
    probs = predictions.sigmoid
    if probs is None:
        return None
    positive = predictions.positive
    if positive is None:
        positive = predictions.labels[:, None] == np.arange(len(predictions.class_names))
    least = predictions.thresholds
    return Marks(probs, positive, probs >= (0.5 if least is None else least))


def judged(predictions: Predictions, rows: np.ndarray | None = None) -> Judged:
    """What metrics see of predictions, or of those at `rows`."""
    everything = Judged(
        predictions.labels, predictions.probs, sampling_of(predictions), predictions.ranked, predictions.confident,
        decided=predictions.decided, prevalence=predictions.asked and predictions.asked.prevalence,
        threshold=predictions.asked and predictions.asked.threshold,
        undecided=predictions.asked.undecided if predictions.asked else "", marks=marks_of(predictions),
    )  # fmt: skip
    return everything if rows is None else everything.take(rows)


def measure(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    metrics: Sequence[Metric | str] = GENERAL_METRICS,
    rows: np.ndarray | None = None,
    full_bins: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Measures metrics with their uncertainty.

    Args:
        predictions: the judged model; its clusters, where given, are the unit of resampling.
        baseline: the model to compare with, aligned (see `grouping.align`).
        metrics: metrics or their names.
        rows: positions of the images to judge; None judges all.
        full_bins: leave `ece` out where the bins are thinly filled (for groups).
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        Name of the metric -> comparison. Nothing in it is NaN: what cannot be computed is None with a note.

    Raises:
        DataError: there is no metric of that name.
    """
    both = [judged(one, rows) for one in (predictions, baseline) if one is not None]
    drawing = Drawing(draws, seed, full_bins)
    found: dict[str, Comparison] = {}
    for metric in map(find_metric, metrics):
        if len(both[0]) == 0:
            none = Measurement(None, 0, note="no images")
            found[metric.name] = Comparison(none, *((none, none) if baseline is not None else ()))
            continue
        found[metric.name] = metric.compare(both[0], both[1] if len(both) > 1 else None, drawing)
    return found
