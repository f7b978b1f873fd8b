"""The report of a run: overall, per class and per group, each number with its n and an interval or a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from adaptclip.errors import DataError, agree, did_you_mean
from adaptclip.evaluation.grouping import align
from adaptclip.evaluation.measuring import measure, sampling_of
from adaptclip.gate_rules import BETWEEN
from adaptclip.metrics import GENERAL_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.metrics.rates import absent_classes
from adaptclip.reports.bias import group_table
from adaptclip.reports.numbers import comparison, number
from adaptclip.reports.outcomes import outcome_overall
from adaptclip.types import Predictions

FORMAT_VERSION = 1


def build_report(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    groups: Sequence[str] | None = None,
    metrics: Sequence[Metric] = (),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses predictions, alone or against zero-shot predictions of the same images.

    Args:
        predictions: the judged (adapted) model.
        baseline: zero-shot predictions of the same images in any order, or None.
        groups: attributes to report; None reports all there are, and the declared intersections.
        metrics: of your own, reported beside GENERAL_METRICS and in groups (`Metric.of`).
        confidence: level of all two-sided intervals, between 0.5 and 1.
        draws: bootstrap draws, at least 1,000.
        seed: of the bootstrap; the same predictions and seed give the same report.

    Returns:
        JSON-able dict. A number is {"value", "low", "high", "n", "method", "note"}; a comparison is {"model",
        "zero_shot", "change"} of numbers. Keys: "format_version", "confidence", "num_images", "num_classes",
        "num_clusters", "sampling" ("unit", "num_units", "classes": "random" or "fixed"), "absent_classes",
        "metrics" (name -> `Metric.told`), "overall" (name of a metric -> comparison),
        "per_class" (list),
        "outcomes" (list of `outcome_overall`), "groups" (attribute -> table of `group_table`; an intersection is called
        "sex × age_group"), "cautions" and "notes_on_input" (lists of sentences).

    Raises:
        DataError: no images, an unknown attribute, or a baseline of other images.
    """
    if len(predictions) == 0:
        raise DataError("there is nothing to report: the predictions have no rows")
    if not 0.5 <= confidence < 1:
        raise DataError(f"confidence must lie within 0.5 and 1 (0.95 is usual), got {confidence}")
    crossed = [BETWEEN.join(names) for names in predictions.intersections]
    attributes = [*predictions.groups, *crossed] if groups is None else list(groups)
    for name in attributes:
        for part in [name] if name in predictions.groups else name.split(BETWEEN):
            if part not in predictions.groups:
                raise DataError(f"unknown group attribute {part!r}. {did_you_mean(part, predictions.groups)}")
    base = None if baseline is None else align(predictions, baseline)
    shown = [*map(find_metric, GENERAL_METRICS), *metrics]
    overall = measure(predictions, base, metrics=shown, draws=draws, seed=seed)
    absent = absent_classes(predictions.labels, len(predictions.class_names))
    clusters = None if predictions.clusters is None else len(set(predictions.clusters))
    progress = tqdm(attributes, desc="report", unit="attribute", disable=None, leave=False)
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    return {
        "format_version": FORMAT_VERSION,
        "confidence": confidence,
        "num_images": len(predictions),
        "num_classes": len(predictions.class_names),
        "num_clusters": clusters,
        "sampling": _sampling(predictions, clusters),
        "absent_classes": [predictions.class_names[i] for i in absent],
        "metrics": {metric.name: metric.told() for metric in shown},
        "overall": {metric: comparison(compared, confidence) for metric, compared in overall.items()},
        "per_class": _class_rows(predictions, confidence),
        "outcomes": [outcome_overall(predictions, base, outcome, **settings) for outcome in predictions.outcomes],
        "groups": {name: group_table(predictions, base, name, metrics=metrics, **settings) for name in progress},
        "cautions": _cautions(len(absent), len(predictions.class_names), attributes, clusters),
        "notes_on_input": list(predictions.notes),
    }


def _sampling(predictions: Predictions, clusters: int | None) -> dict[str, Any]:
    unit, num = ("image", len(predictions)) if clusters is None else ("cluster", clusters)
    return {"unit": unit, "num_units": num, "classes": "fixed" if predictions.fixed_classes else "random"}


def _class_rows(predictions: Predictions, confidence: float) -> list[dict[str, Any]]:
    """One row per class, in the order of the class ids: accuracy with interval, and whether its images suffice."""
    order = np.argsort(predictions.labels, kind="stable")
    sizes = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    right = predictions.pred == predictions.labels
    sampling = sampling_of(predictions)
    rows = []
    for name, positions in zip(predictions.class_names, np.split(order, np.cumsum(sizes)[:-1]), strict=True):
        accuracy = mean_of(right[positions], sampling.take(positions))
        enough = len(positions) >= MIN_CLASS_IMAGES
        rows.append(
            {"class": name, "n": len(positions), "accuracy": number(accuracy, confidence), "sufficient": enough}
        )
    return rows


def _cautions(num_absent: int, num_classes: int, attributes: list[str], clusters: int | None) -> list[str]:
    cautions = []
    if num_absent:
        cautions.append(
            f"{num_absent} of {num_classes} classes {agree(num_absent, 'has', 'have')} no test images: nothing is "
            f"known about {agree(num_absent, 'it, and it is', 'them, and they are')} left out of the mean per class"
        )
    if num_classes < 2:
        cautions.append("there is a single class, so that every answer is right: nothing is assessed")
    if not attributes:
        cautions.append("no groups were reported: without group columns, differences between groups cannot be assessed")
    if clusters is not None:
        cautions.append(f"the images come from {clusters:,} clusters, which are the unit of all intervals")
    return cautions
