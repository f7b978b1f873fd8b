# SPDX-License-Identifier: Apache-2.0
"""What adaptation changed for the worse, and what another set of classes or images makes of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import Comparison, Measurement
from adaptclip.metrics.gaps import holm
from adaptclip.reports.blocks import comparison, number
from adaptclip.reports.measuring import difference, harmonic, measure, sampling_of, sign_test

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

_METRICS = ("accuracy", "mean_per_class_accuracy")


def class_changes(
    predictions: Predictions,
    baseline: Predictions,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Change of each class's accuracy against zero-shot, on the same images.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned.
        confidence: level of the two-sided intervals; 1 - confidence is the level of the tests, Holm-corrected over
            the classes.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "classes" (per class: "class", "n", "change" (number), "p_value", "p_holm", "direction":
        "worse", "better" or "" where the data cannot tell), most negative change first; "worse" and "better" (names);
        "num_lower" (classes with a lower accuracy, shown or not), "tested".
    """
    now, before = predictions.pred == predictions.labels, baseline.pred == predictions.labels
    order = np.argsort(predictions.labels, kind="stable")
    sizes = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    rows = []
    for name, positions in zip(predictions.class_names, np.split(order, np.cumsum(sizes)[:-1]), strict=True):
        if len(positions) == 0:
            continue
        measured = measure(predictions, baseline, metrics=("accuracy",), rows=positions, draws=draws, seed=seed)
        change = measured["accuracy"].change
        assert change is not None
        p_value = sign_test(now[positions], before[positions], sampling_of(predictions, positions).unit)
        rows.append({"class": name, "n": len(positions), "change": number(change, confidence), "p_value": p_value})
    adjusted = holm([row["p_value"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = float(p)
        shown = p < 1 - confidence
        row["direction"] = ("worse" if row["change"]["value"] < 0 else "better") if shown else ""
    rows.sort(key=lambda row: row["change"]["value"])
    return {
        "classes": rows,
        "tested": len(rows),
        "worse": [row["class"] for row in rows if row["direction"] == "worse"],
        "better": [row["class"] for row in rows if row["direction"] == "better"],
        "num_lower": sum(row["change"]["value"] < 0 for row in rows),
    }


def base_new(
    base: tuple[Predictions, Predictions],
    new: tuple[Predictions, Predictions],
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Base-to-new generalisation: classes that were learnt, classes known by name only, and their harmonic mean.

    Args:
        base: (adapted, zero-shot) predictions of the base classes' images among the base classes.
        new: the same of the new classes.
        confidence: level of the intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "base", "new" and "harmonic_mean", each a comparison.

    Raises:
        DataError: base and new classes overlap.
    """
    both = set(base[0].class_names) & set(new[0].class_names)
    if both:
        raise DataError(f"base and new classes share {len(both)} classes, for example {min(both)!r}; divide them")
    options: dict[str, Any] = {"metrics": ("accuracy",), "draws": draws, "seed": seed}
    parts = [measure(*pair, **options)["accuracy"] for pair in (base, new)]
    old = [p.baseline for p in parts]
    assert old[0] is not None
    assert old[1] is not None
    means = harmonic(parts[0].model, parts[1].model), harmonic(old[0], old[1])
    values = [mean.value or 0.0 for mean in means]
    note = "no interval: a function of two paired rates"
    change = Measurement(values[0] - values[1], means[0].n, note=note)
    return {
        "base": comparison(parts[0], confidence),
        "new": comparison(parts[1], confidence),
        "harmonic_mean": comparison(Comparison(means[0], means[1], change), confidence),
    }


def domain_shift(
    target: Predictions,
    source: Predictions,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The same model on images of another domain.

    Args:
        target: predictions on the domain where the model is to be used.
        source: predictions on the domain it was adapted to; other images, the same classes.
        confidence: level of the intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: metric -> {"source", "target", "change"} of numbers; the change is of independent images.

    Raises:
        DataError: other classes, or shared images.
    """
    if source.class_names != target.class_names:
        raise DataError("source and target predictions have different class names; compare one model on both")
    shared = set(source.ids) & set(target.ids)
    if shared:
        raise DataError(f"{len(shared)} images are in both domains, for example {min(shared)!r}; they must not overlap")
    options: dict[str, Any] = {"metrics": (*_METRICS, "ece"), "draws": draws, "seed": seed}
    here, there = measure(target, **options), measure(source, **options)
    return {
        metric: {
            "source": number(there[metric].model, confidence),
            "target": number(here[metric].model, confidence),
            "change": number(difference(here[metric].model, there[metric].model), confidence),
        }
        for metric in here
    }
