"""The whole report of a model: overall and by group, how finely it distinguishes, its confidence, what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptclip.errors import DataError
from adaptclip.evaluation.grouping import align
from adaptclip.evaluation.thresholds import Thresholds, even_thresholds
from adaptclip.metrics import Metric
from adaptclip.reports.calibration import calibration_report
from adaptclip.reports.fine_grained import fine_grained_report
from adaptclip.reports.multi_label import multi_label_report
from adaptclip.reports.shift import base_new, class_changes, domain_shift
from adaptclip.reports.slices import slice_report
from adaptclip.reports.summary import build_report
from adaptclip.types import Predictions


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
        (None without probabilities of single classes).

    Raises:
        DataError: no images, other images in the baseline, images of the test among those of the validation, or an
            unknown name.
    """
    options: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    report = build_report(predictions, baseline, groups=groups, metrics=metrics, **options)
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
