"""Two-sided outcomes, such as malignant or not: how many of either side are found, overall and in each group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptclip.evaluation.grouping import group_rows, listed
from adaptclip.evaluation.measuring import sampling_of
from adaptclip.evaluation.outcomes import measure_outcome, two_sided
from adaptclip.gate_rules import Outcome
from adaptclip.metrics import OUTCOME_GROUP_METRICS, find_metric
from adaptclip.metrics.estimates import Comparison
from adaptclip.metrics.gaps import largest_difference
from adaptclip.metrics.metric import MIN_OUTCOMES
from adaptclip.reports.numbers import comparison, gap_of_means, number
from adaptclip.types import Predictions


def outcome_overall(
    predictions: Predictions,
    baseline: Predictions | None,
    outcome: Outcome,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses an outcome on all images.

    Returns:
        JSON-able dict: "name", "level", "positive", "threshold", "rule" (in words), "classes" (those that are
        positive), "num_positive", "num_negative", "metrics" (name -> `Metric.told`), and each of them compared.
    """
    labels = two_sided(predictions, outcome).labels
    values = predictions.class_names if outcome.level is None else predictions.levels[outcome.level]
    classes = [name for name, value in zip(predictions.class_names, values, strict=True) if value in outcome.positive]
    measured = measure_outcome(predictions, baseline, outcome, draws=draws, seed=seed)[0]
    return {
        **_names(outcome),
        "threshold": outcome.threshold,
        "rule": outcome.rule_words,
        "prevalence": outcome.prevalence,
        "metrics": {name: find_metric(name).told() for name in measured},
        "classes": classes,
        "num_positive": int(labels.sum()),
        "num_negative": int(len(labels) - labels.sum()),
        **{metric: comparison(compared, confidence) for metric, compared in measured.items()},
    }


def _names(outcome: Outcome) -> dict[str, Any]:
    return {"name": outcome.name, "level": outcome.level, "positive": " or ".join(outcome.positive)}


def group_outcome(
    predictions: Predictions,
    baseline: Predictions | None,
    attribute: str,
    outcome: Outcome,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    min_group: int = 30,
) -> dict[str, Any]:
    """Assesses an outcome in every group of an attribute.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        attribute: name of a group column or an intersection.
        outcome: the two-sided question.
        confidence: level of the intervals.
        draws: bootstrap draws and deals of the permutation tests.
        seed: of both.
        min_group: groups of an intersection with fewer images are left out of the rows.

    Returns:
        JSON-able dict: "name", "level", "positive"; "rows" per group with "n", "num_positive", "num_negative" and
        "sensitivity", "specificity", "selection_rate", "auc" compared; "sensitivity_gap" and "specificity_gap"
        (`gap_of_means`); fairlearn's "demographic_parity_difference", "demographic_parity_ratio",
        "equal_opportunity_difference" and "equalized_odds_difference" over the groups with at least MIN_OUTCOMES
        positive and negative images; "left_out", the others; "note".
    """
    judged = two_sided(predictions, outcome)
    by_group = group_rows(predictions, attribute)
    if attribute not in predictions.groups:
        by_group = {name: rows for name, rows in by_group.items() if len(rows) >= min_group}
    measured = measure_outcome(
        predictions, baseline, outcome, list(by_group.values()), metrics=OUTCOME_GROUP_METRICS, draws=draws, seed=seed
    )
    rows = [
        {
            "group": name,
            "n": len(positions),
            "num_positive": int(judged.labels[positions].sum()),
            "num_negative": int((judged.labels[positions] == 0).sum()),
            **{metric: comparison(compared, confidence) for metric, compared in found.items()},
        }
        for (name, positions), found in zip(by_group.items(), measured, strict=True)
    ]
    kept = [row["group"] for row in rows if min(row["num_positive"], row["num_negative"]) >= MIN_OUTCOMES]
    left_out = [row["group"] for row in rows if row["group"] not in kept]
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    note = f"groups without {MIN_OUTCOMES} positive and {MIN_OUTCOMES} negative images are not in the differences"
    return {
        **_names(outcome),
        "rows": rows,
        "sensitivity_gap": _side_gap(judged, by_group, 1, "sensitivity", settings),
        "specificity_gap": _side_gap(judged, by_group, 0, "specificity", settings),
        **_fairlearn_differences(judged, {name: by_group[name] for name in kept}),
        "intervals": _intervals([m for name, m in zip(by_group, measured, strict=True) if name in kept], confidence),
        "left_out": left_out,
        "note": f"{note}: {listed(left_out)}" if left_out else "",
    }


def _intervals(groups: Sequence[Mapping[str, Comparison]], confidence: float) -> dict[str, dict[str, Any]]:
    """The differences in both error rates with intervals; those of the false positive rate are the specificity's."""
    found, false = ([group[name].model for group in groups] for name in ("sensitivity", "specificity"))
    return {
        "equal_opportunity_difference": number(largest_difference([found]), confidence),
        "equalized_odds_difference": number(largest_difference([found, false]), confidence),
    }


def _side_gap(
    judged: Predictions, by_group: dict[str, np.ndarray], side: int, what: str, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The gap of the accuracy on one side of an outcome between the groups that have MIN_OUTCOMES images of it."""
    if not by_group or (judged.asked and judged.asked.undecided):
        return None
    rows = np.concatenate(list(by_group.values()))
    code = np.repeat(np.arange(len(by_group)), [len(positions) for positions in by_group.values()])
    on_side = judged.labels[rows] == side
    rows, code = rows[on_side], code[on_side]
    right = judged.pred[rows] == judged.labels[rows]
    return gap_of_means(
        right, code, list(by_group), sampling_of(judged, rows), what=what, min_group=MIN_OUTCOMES, **settings
    )[0]


def _fairlearn_differences(judged: Predictions, by_group: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The four differences as fairlearn defines them; None with fewer than two groups."""
    names = ("demographic_parity_difference", "demographic_parity_ratio", "equal_opportunity_difference",
             "equalized_odds_difference")  # fmt: skip
    if len(by_group) < 2 or (judged.asked and judged.asked.undecided):
        return dict.fromkeys(names, None)
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate

    rows = np.concatenate(list(by_group.values()))
    sensitive = np.repeat(list(by_group), [len(positions) for positions in by_group.values()])
    rates = {"selection": selection_rate, "tpr": true_positive_rate, "fpr": false_positive_rate}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ratio of two zeros, which is checked below
        frame = MetricFrame(
            metrics=rates, y_true=judged.labels[rows], y_pred=judged.pred[rows], sensitive_features=sensitive
        )
        # Columns of a table, of which the stubs know only that they may be anything.
        difference: Any = frame.difference(method="between_groups")
        ratio: Any = frame.ratio()
    tpr, fpr = float(difference["tpr"]), float(difference["fpr"])
    values = (float(difference["selection"]), float(ratio["selection"]), tpr, max(tpr, fpr))
    return {name: value if np.isfinite(value) else None for name, value in zip(names, values, strict=True)}
