"""How a model does on each group of an attribute, with intervals, and how adaptation changed that."""

from __future__ import annotations

from typing import Any

from adaptclip.evaluation.estimates import Comparison, Measurement, group_rows, measure
from adaptclip.evaluation.metrics import absent_classes
from adaptclip.types import Predictions

GROUP_METRICS = ("accuracy", "mean_per_class_accuracy", "ece")

SMALL_GROUP = 100
"""Below this many images a group's accuracy is known to no better than about 8 points: a caution is given."""

GAP_NOTE = (
    "no interval: noise alone makes the difference between the best and the worst of several groups positive, so its "
    "bootstrap interval would leave out zero even for equal groups"
)


def number(measurement: Measurement, confidence: float) -> dict[str, Any]:
    """Turns a measurement into a JSON-able dict: value, low, high, n, method, note; absent ones are None or ""."""
    low, high = measurement.interval(confidence) or (None, None)
    method = measurement.spread.method if measurement.spread else None
    return {
        "value": measurement.value,
        "low": low,
        "high": high,
        "n": measurement.n,
        "method": method,
        "note": measurement.note,
    }


def comparison(compared: Comparison, confidence: float) -> dict[str, Any]:
    """Turns a comparison into {"model", "zero_shot", "change"}; the latter two None without a baseline."""
    parts = {"model": compared.model, "zero_shot": compared.baseline, "change": compared.change}
    return {name: None if part is None else number(part, confidence) for name, part in parts.items()}


def group_table(
    predictions: Predictions,
    baseline: Predictions | None,
    attribute: str,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses every group of one attribute.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        attribute: name of a group column.
        confidence: level of the two-sided intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "rows" (per group: name, n, classes present, each metric compared), "worst_group",
        "gap" (max-min accuracy) and "cautions".

    Raises:
        DataError: the predictions have no such attribute.
    """
    rows = []
    for group, positions in group_rows(predictions, attribute).items():
        measured = measure(
            predictions, baseline, metrics=GROUP_METRICS, rows=positions, full_bins=True, draws=draws, seed=seed
        )
        absent = absent_classes(predictions.labels[positions], len(predictions.class_names))
        rows.append(
            {
                "group": group,
                "n": len(positions),
                "classes_present": len(predictions.class_names) - len(absent),
                **{metric: comparison(compared, confidence) for metric, compared in measured.items()},
            }
        )
    return {"rows": rows, **_extremes(rows), "cautions": _cautions(attribute, rows)}


def _extremes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"worst_group": None, "gap": None}
    ordered = sorted(rows, key=lambda row: row["accuracy"]["model"]["value"])
    worst, best = ordered[0], ordered[-1]
    gap = {
        "definition": "max-min accuracy over the groups",
        "value": best["accuracy"]["model"]["value"] - worst["accuracy"]["model"]["value"],
        "best_group": best["group"],
        "worst_group": worst["group"],
        "n": sum(row["n"] for row in rows),
        "note": GAP_NOTE,
    }
    return {"worst_group": {"group": worst["group"], **worst["accuracy"]["model"]}, "gap": gap}


def _cautions(attribute: str, rows: list[dict[str, Any]]) -> list[str]:
    if len(rows) < 2:
        return [f"{attribute} has {len(rows)} group(s): there is nothing to compare"]
    small = [f"{row['group']} ({row['n']})" for row in rows if row["n"] < SMALL_GROUP]
    if not small:
        return []
    return [f"groups of fewer than {SMALL_GROUP} images say little, and widen the max-min gap: {', '.join(small)}"]
