# SPDX-License-Identifier: Apache-2.0
"""Images that may show several classes, or none: each finding as a two-sided question, all together, and by group.

A finding is a class by itself. Every number of one is that of the outcome "shows it", on the images of which that is
known (`reports.measuring.two_sided`), so that gates, tables and sentences say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.gate_rules import ARGMAX, Outcome
from adaptclip.metrics import find_metric
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import holm
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, MIN_OUTCOMES
from adaptclip.reports.any_of import finding_outcome, marks_of, rule_words
from adaptclip.reports.blocks import MIN_GROUP, comparison, number
from adaptclip.reports.measuring import group_rows, listed, measure, measure_outcome, sampling_of, two_sided
from adaptclip.reports.outcomes import group_outcome

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Marks
    from adaptclip.predictions import Predictions
    from adaptclip.training.thresholds import Thresholds

PAIRED = ("auc", "average_precision", "sensitivity", "specificity", "ppv", "npv", "outcome_brier")
"""Metrics of every finding, compared with a baseline."""

ALONE = ("outcome_ece",)
"""Those that need a bootstrap, of the judged model alone."""

GROUP_SUMMARY = ("labels_macro_auc", "labels_macro_sensitivity", "labels_macro_specificity", "subset_accuracy")
"""What is said of all findings of a group together."""

MOST_PAIRS = 10
"""So many pairs of findings that are named together are listed."""


def findings_report(
    predictions: Predictions,
    baseline: Predictions | None,
    thresholds: Thresholds | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses every finding on all images.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        thresholds: how the predictions' thresholds were chosen; None where that is not known.
        confidence: level of the intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "rows" per finding, and "any" for all of them together, each with "class", "num_positive",
        "num_known", "prevalence", "threshold", "chosen_on" (validation images that show it; None where not known),
        "rule" (in words), "declared_rule" (whether it is that of a declared outcome), "enough" (whether MIN_OUTCOMES
        images are known to show it, and as many not to), each of PAIRED
        compared, ALONE as numbers, and "surplus" (mean probability minus share of images that show it);
        "thresholds" (`Thresholds.to_dict` or None), "shown_per_image", "named_per_image", "none_shown", "none_named",
        "unknown" (share of the pairs of image and class), "pairs" (`named_together`), "num_pairs".
    """
    marks = marks_of(predictions)
    assert marks is not None
    sampling = sampling_of(predictions)
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    rows = [_finding(predictions, baseline, c, thresholds, settings) for c in range(len(predictions.class_names))]
    everything = Outcome(positive=predictions.class_names)
    pairs = named_together(marks, predictions, confidence)
    certain = marks.certain.all(axis=1)
    return {
        "rows": rows,
        "any": _row(predictions, baseline, everything, settings) if len(rows) > 1 else None,
        "thresholds": thresholds and thresholds.to_dict(),
        "shown_per_image": float(marks.positive.sum() / max(marks.certain.sum(), 1) * len(rows)),
        "named_per_image": float(marks.named.sum(axis=1).mean()),
        "none_shown": number(
            mean_of(~np.any(marks.positive[certain], axis=1), sampling.take(np.flatnonzero(certain))), confidence
        ),
        "none_named": number(mean_of(~np.any(marks.named, axis=1), sampling), confidence),
        "unknown": float(1 - marks.certain.mean()),
        "pairs": pairs[:MOST_PAIRS],
        "num_pairs": len(rows) * (len(rows) - 1),
    }


def _finding(
    predictions: Predictions,
    baseline: Predictions | None,
    c: int,
    thresholds: Thresholds | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """One finding's row."""
    name = predictions.class_names[c]
    outcome = finding_outcome(predictions, name)
    least = 0.5 if predictions.thresholds is None else float(predictions.thresholds[c])
    own = outcome.rule == ARGMAX
    chosen = outcome.chosen_on
    if own and thresholds is not None and thresholds.is_chosen and name not in thresholds.fallbacks:
        chosen = int(thresholds.positives[c])
    row = _row(predictions, baseline, outcome, settings)
    threshold = least if own else outcome.threshold
    return {**row, "class": name, "threshold": threshold, "chosen_on": chosen, "declared_rule": not own}


def _row(
    predictions: Predictions, baseline: Predictions | None, outcome: Outcome, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of one outcome."""
    asked = two_sided(predictions, outcome)
    drawing = {"draws": settings["draws"], "seed": settings["seed"]}
    found = measure_outcome(predictions, baseline, outcome, metrics=PAIRED, **drawing)[0]
    alone = measure(asked, metrics=ALONE, **drawing)
    positive = int(asked.labels.sum())
    surplus = mean_of(asked.probs[:, 1].astype(np.float64) - asked.labels, sampling_of(asked), low=-1.0, high=1.0)
    return {
        "class": "any of them",
        "num_positive": positive,
        "num_known": len(asked),
        "prevalence": positive / len(asked) if len(asked) else None,
        "declared_prevalence": outcome.prevalence,
        "threshold": None,
        "chosen_on": None,
        "declared_rule": False,
        "rule": rule_words(predictions, outcome),
        "enough": min(positive, len(asked) - positive) >= MIN_OUTCOMES,
        **{name: comparison(compared, settings["confidence"]) for name, compared in found.items()},
        **{name: number(compared.model, settings["confidence"]) for name, compared in alone.items()},
        "surplus": number(surplus, settings["confidence"]),
    }


def named_together(marks: Marks, predictions: Predictions, confidence: float) -> list[dict[str, Any]]:
    """Findings that are named beside another one which is shown, without being shown themselves.

    Args:
        marks: what the images show and were said to show.
        predictions: their class names and sampling.
        confidence: level of the intervals.

    Returns:
        Largest excess first, each {"shown", "named", "n" (images that show the first and are known not to show the
        second), "share" (of those, where the second is named), "elsewhere" (the same of images that are known to show
        neither)}; pairs of MIN_CLASS_IMAGES images or more whose share is surely above that elsewhere.
    """
    sampling, names = sampling_of(predictions), predictions.class_names
    with_one, without = marks.positive.T.astype(np.float64), marks.absent.astype(np.float64)
    named, absent = (marks.absent & marks.named).astype(np.float64), marks.absent.T.astype(np.float64)
    images, wrong = with_one @ without, with_one @ named  # (C, C): the row is shown, the column is not
    others, wrong_there = absent @ without, absent @ named
    share = np.divide(wrong, images, out=np.zeros_like(wrong), where=images > 0)
    elsewhere = np.divide(wrong_there, others, out=np.ones_like(wrong), where=others > 0)
    excess = np.where((images >= MIN_CLASS_IMAGES) & (others >= MIN_CLASS_IMAGES), share - elsewhere, 0.0)
    np.fill_diagonal(excess, 0.0)
    found = []
    for a, b in (divmod(int(k), len(names)) for k in np.argsort(-excess, axis=None, kind="stable")):
        if excess[a, b] <= 0 or len(found) >= MOST_PAIRS:
            break
        rows = np.flatnonzero(marks.positive[:, a] & marks.absent[:, b])
        measured = number(mean_of(marks.named[rows, b], sampling.take(rows)), confidence)
        if measured["low"] is not None and measured["low"] > elsewhere[a, b]:
            found.append(
                {"shown": names[a], "named": names[b], "n": len(rows), "share": measured,
                 "elsewhere": float(elsewhere[a, b])}
            )  # fmt: skip
    return found


def findings_by_group(
    predictions: Predictions,
    baseline: Predictions | None,
    attribute: str,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    min_group: int = MIN_GROUP,
) -> dict[str, Any]:
    """Assesses every finding in every group of an attribute.

    Returns:
        JSON-able dict with the keys of `bias.group_table` that there are here: "rows" per group ("group", "n",
        "clusters", "large_enough", each of GROUP_SUMMARY compared), "outcomes" per finding (`group_outcome`, with
        "p_holm" in its "sensitivity_gap" and "specificity_gap", corrected for the findings), "intersection",
        "too_small", "min_group", "cautions", "metrics"; "worst_group" and "gap" are None, as no single number is of all
        findings.
    """
    crossed = attribute not in predictions.groups
    by_group = group_rows(predictions, attribute)
    small = [{"group": name, "n": len(rows)} for name, rows in by_group.items() if crossed and len(rows) < min_group]
    shown = {name: rows for name, rows in by_group.items() if not crossed or len(rows) >= min_group}
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed, "min_group": min_group}
    rows = []
    for name, positions in shown.items():
        found = measure(predictions, baseline, metrics=GROUP_SUMMARY, rows=positions, draws=draws, seed=seed)
        units = None if predictions.clusters is None else sampling_of(predictions, positions).num_units
        rows.append(
            {"group": name, "n": len(positions), "clusters": units, "large_enough": len(positions) >= min_group,
             "change_p": None, **{key: comparison(compared, confidence) for key, compared in found.items()}}
        )  # fmt: skip
    asked = [finding_outcome(predictions, name) for name in predictions.class_names]
    asked += [outcome for outcome in predictions.outcomes if outcome not in asked]
    outcomes = [group_outcome(predictions, baseline, attribute, outcome, **settings) for outcome in asked]
    for key in ("sensitivity_gap", "specificity_gap"):
        gaps = [outcome[key] for outcome in outcomes if outcome[key]]
        for gap, p in zip(gaps, holm([gap["p_value"] for gap in gaps]), strict=True):
            gap["p_holm"] = float(p)
    return {
        "rows": rows,
        "metrics": {name: find_metric(name).info() for name in GROUP_SUMMARY},
        "worst_group": None, "gap": None, "gap_zero_shot": None, "one_vs_rest": None, "es_accuracy": None,
        "outcomes": outcomes,
        "intersection": crossed, "too_small": small, "min_group": min_group,
        "cautions": _cautions(predictions, rows, small, outcomes, min_group),
    }  # fmt: skip


def _cautions(
    predictions: Predictions,
    rows: Sequence[Mapping[str, Any]],
    small: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Mapping[str, Any]],
    min_group: int,
) -> list[str]:
    if len(rows) < 2:
        return ["there is a single group, and nothing to compare"]
    said = []
    tiny = [f"{row['group']} ({row['n']})" for row in [*rows, *small] if row["n"] < min_group]
    if tiny:
        said.append(f"groups of fewer than {min_group} images take no part in gaps and tests: {listed(tiny)}")
    names = set(predictions.class_names)
    untold = [o["name"] for o in outcomes if o["sensitivity_gap"] is None and o["name"] in names]
    if untold:
        said.append(
            f"whether all groups are found as often is not known where fewer than two of them have {MIN_OUTCOMES} "
            f"images that show the finding: {listed(untold)}"
        )
    return said


def class_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """One row per class: images that show it, those of which it is known, and whether both sides are more than few."""
    marks = marks_of(predictions)
    assert marks is not None
    shown, absent = marks.positive.sum(axis=0), marks.absent.sum(axis=0)
    return [
        {"class": name, "n": int(shown[c]), "num_known": int(shown[c] + absent[c]),
         "sufficient": bool(min(shown[c], absent[c]) >= MIN_CLASS_IMAGES)}
        for c, name in enumerate(predictions.class_names)
    ]  # fmt: skip
