# SPDX-License-Identifier: Apache-2.0
"""The report of a run: overall, per class and per group, each number with its n and an interval or a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.errors import DataError, agree, did_you_mean
from adaptclip.gate_rules import BETWEEN
from adaptclip.metrics import GENERAL_METRICS, LABELS_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.progress import progress_bar
from adaptclip.reports.bias import group_table
from adaptclip.reports.blocks import comparison, number
from adaptclip.reports.calibration import calibration_report
from adaptclip.reports.findings import class_rows, findings_by_group, findings_report
from adaptclip.reports.fine_grained import fine_grained_report
from adaptclip.reports.measuring import align, measure, sampling_of
from adaptclip.reports.multi_label import multi_label_report
from adaptclip.reports.outcomes import outcome_overall
from adaptclip.reports.shift import base_new, class_changes, domain_shift
from adaptclip.reports.slices import slice_report
from adaptclip.training.thresholds import Thresholds, even_thresholds

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

FORMAT_VERSION = 1


def build_report(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    groups: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
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
        thresholds: how those of images that may show several classes were chosen; None where that is not known.
        metrics: of your own, reported beside GENERAL_METRICS and in groups (`Metric.of`).
        confidence: level of all two-sided intervals, between 0.5 and 1.
        draws: bootstrap draws, at least 1,000.
        seed: of the bootstrap; the same predictions and seed give the same report.

    Returns:
        JSON-able dict. A number is {"value", "low", "high", "n", "method", "note"}; a comparison is {"model",
        "zero_shot", "change"} of numbers. Keys: "format_version", "confidence", "num_images", "num_classes",
        "num_clusters", "sampling" ("unit", "num_units", "classes": "random" or "fixed", and the "name" of the clusters
        where it is known), "absent_classes",
        "metrics" (name -> `Metric.info`), "overall" (name of a metric -> comparison),
        "per_class" (list), "findings" (`findings_report`; None where images have one class each),
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
                has = did_you_mean(part, predictions.groups, lead="The predictions have")
                raise DataError(f"unknown group attribute {part!r}. {has}")
    base = None if baseline is None else align(predictions, baseline)
    shown = [*map(find_metric, LABELS_METRICS if predictions.several else GENERAL_METRICS), *metrics]
    overall = measure(predictions, base, metrics=shown, draws=draws, seed=seed)
    absent = np.flatnonzero(predictions.shown_counts == 0)
    clusters = None if predictions.clusters is None else len(set(predictions.clusters))
    progress = progress_bar(attributes, desc="report", unit="attribute", leave=False)
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    return {
        "format_version": FORMAT_VERSION,
        "confidence": confidence,
        "num_images": len(predictions),
        "num_classes": len(predictions.class_names),
        "num_clusters": clusters,
        "sampling": _sampling(predictions, clusters),
        "absent_classes": [predictions.class_names[i] for i in absent],
        "metrics": {metric.name: metric.info() for metric in shown},
        "overall": {metric: comparison(compared, confidence) for metric, compared in overall.items()},
        "per_class": class_rows(predictions) if predictions.several else _class_rows(predictions, confidence),
        "findings": findings_report(predictions, base, thresholds, **settings) if predictions.several else None,
        "outcomes": [outcome_overall(predictions, base, outcome, **settings) for outcome in predictions.outcomes],
        "groups": {
            name: findings_by_group(predictions, base, name, **settings)
            if predictions.several
            else group_table(predictions, base, name, metrics=metrics, **settings)
            for name in progress
        },
        "cautions": _cautions(predictions, len(absent), attributes, clusters),
        "notes_on_input": list(predictions.notes),
    }


def _sampling(predictions: Predictions, clusters: int | None) -> dict[str, Any]:
    unit, num = ("image", len(predictions)) if clusters is None else ("cluster", clusters)
    named = {"name": predictions.cluster_name} if predictions.cluster_name else {}
    fixed = predictions.fixed_classes and not predictions.several
    return {"unit": unit, "num_units": num, **named, "classes": "fixed" if fixed else "random"}


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


def _cautions(predictions: Predictions, num_absent: int, attributes: list[str], clusters: int | None) -> list[str]:
    num_classes, cautions = len(predictions.class_names), []
    if num_absent:
        cautions.append(
            f"{num_absent} of {num_classes} classes {agree(num_absent, 'has', 'have')} no test images: nothing is "
            f"known about {agree(num_absent, 'it, and it is', 'them, and they are')} left out of the mean per class"
        )
    if num_classes < 2 and not predictions.several:
        cautions.append("there is a single class, so that every answer is right: nothing is assessed")
    if not attributes:
        cautions.append("no groups were reported: without group columns, differences between groups cannot be assessed")
    if clusters is not None:
        cautions.append(f"the images come from {clusters:,} clusters, which are the unit of all intervals")
    return cautions


def full_report(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    validation: Predictions | None = None,
    validation_used_for: str = "nothing",
    source: Predictions | None = None,
    new_classes: tuple[Predictions, Predictions] | None = None,
    hard_pairs: Sequence[tuple[str, str]] = (),
    groups: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    metrics: Sequence[Metric] = (),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses predictions in every way that they allow.

    Args:
        predictions: the judged (adapted) model.
        baseline: zero-shot predictions of the same images in any order, or None.
        validation: the judged model on images that are neither trained on nor judged: a temperature and sets of classes
            are fitted on them, and slices that nobody named are looked for among them.
        validation_used_for: what else these images chose, in words.
        source: the judged model on the domain it was adapted to, where `predictions` are of another.
        new_classes: (adapted, zero-shot) predictions of classes that were not learnt, judged among themselves; a
            baseline is needed with them.
        hard_pairs: pairs of class names that are known to be hard.
        groups: attributes to report; None reports all there are.
        thresholds: of the single classes, chosen on other images; None takes 0.5 for predictions that need them.
        metrics: of your own (`Metric.of`), reported beside those of the package.
        confidence: level of all two-sided intervals, between 0.5 and 1.
        draws: bootstrap draws, at least 1,000.
        seed: of everything drawn; the same predictions and seed give the same report.

    Returns:
        JSON-able dict: what `build_report` gives, and "fine_grained", "calibration" (None without probabilities),
        "slices" (None without validation images), "shift" (None without a baseline and a source) and "multi_label"
        (None without probabilities of single classes). Where images may show several classes all of these are None, as
        they are of images with one, and "findings" holds what there is.

    Raises:
        DataError: no images, other images in the baseline, images of the test among those of the validation, or an
            unknown name.
    """
    options: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    if predictions.several and predictions.thresholds is None and thresholds is not None:
        predictions = replace(predictions, thresholds=thresholds.values)
    report = build_report(predictions, baseline, groups=groups, thresholds=thresholds, metrics=metrics, **options)
    if predictions.several:
        return report | dict.fromkeys(("fine_grained", "calibration", "slices", "shift", "multi_label"))
    base = None if baseline is None else align(predictions, baseline)
    report["fine_grained"] = fine_grained_report(predictions, base, hard_pairs=hard_pairs, **options)
    # A file may hold decisions without probabilities; then nothing is known of confidence, and the report says so.
    report["calibration"] = (
        calibration_report(predictions, validation, validation_used_for=validation_used_for, **options)
        if predictions.confident
        else None
    )
    report["slices"] = slice_report(predictions, validation, **options)
    shift: dict[str, Any] = {} if base is None else class_changes(predictions, base, **options)
    if new_classes is not None:
        if base is None:
            raise DataError("base and new classes are compared with zero-shot, and no baseline was given")
        shift["base_new"] = base_new((predictions, base), new_classes, **options)
    if source is not None:
        shift["domains"] = domain_shift(predictions, source, **options)
    report["shift"] = shift or None
    report["multi_label"] = None
    if predictions.sigmoid is not None:
        used = thresholds or even_thresholds(predictions.class_names)
        report["multi_label"] = multi_label_report(predictions, used, list(report["groups"]), confidence=confidence)
    return report
