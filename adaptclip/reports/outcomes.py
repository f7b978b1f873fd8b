# SPDX-License-Identifier: Apache-2.0
"""Two-sided questions, group by group: declared outcomes such as malignant or not, and each class against the rest.

Names are fairlearn's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.gate_rules import ARGMAX, Outcome
from adaptclip.metrics import OUTCOME_GROUP_METRICS, find_metric
from adaptclip.metrics.estimates import Comparison, mean_of
from adaptclip.metrics.gaps import gap_test, holm, largest_difference
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, MIN_OUTCOMES
from adaptclip.reports.any_of import among, rows_asked, rule_words
from adaptclip.reports.blocks import MIN_GROUP, comparison, gap_of_means, number
from adaptclip.reports.measuring import group_rows, listed, measure_outcome, sampling_of, two_sided

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Sampling
    from adaptclip.predictions import Predictions

MOST_CLASSES = 20
"""Classes that are listed, those with the largest difference of true positive rates first."""


def class_rates(
    labels: np.ndarray, pred: np.ndarray, code: np.ndarray, num_groups: int, num_classes: int
) -> np.ndarray:
    """Counts behind the rates of every class in every group.

    Args:
        labels: (N,) true class ids.
        pred: (N,) predicted class ids.
        code: (N,) group of each image.
        num_groups: G.
        num_classes: C.

    Returns:
        (4, G, C) images of the class, images predicted as it, of both at once, and images of the group.
    """
    shape = (num_groups, num_classes)

    def count(group: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.bincount(group * num_classes + of, minlength=num_groups * num_classes).reshape(shape)

    right = labels == pred
    sizes = np.bincount(code, minlength=num_groups)
    return np.stack([count(code, labels), count(code, pred), count(code[right], labels[right]),
                     np.broadcast_to(sizes[:, None], shape)])  # fmt: skip


def one_vs_rest(
    predictions: Predictions,
    names: Sequence[str],
    code: np.ndarray,
    sampling: Sampling,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    min_group: int = MIN_GROUP,
) -> dict[str, Any]:
    """Assesses every class against the rest in the groups of an attribute.

    Args:
        predictions: the judged model.
        names: the groups.
        code: (N,) group of each image, as a position in `names`.
        sampling: how the images were drawn.
        confidence: level of the intervals.
        draws: random deals of the permutation tests.
        seed: of the deals.
        min_group: images that a group needs to be compared.

    Returns:
        JSON-able dict: "classes" (MOST_CLASSES at most), each with "class", "n", the rates "selection_rate", "tpr",
        "fpr" (group -> number), "demographic_parity_difference", "demographic_parity_ratio",
        "equal_opportunity_difference", "equalized_odds_difference" (None where fewer than two groups can be compared),
        "p_value" of the true positive rates' gap and "p_holm" corrected for the classes tested;
        "num_left_out" and "note".
    """
    labels, pred = predictions.labels, predictions.pred
    counts = class_rates(labels, pred, code, len(names), len(predictions.class_names))
    large = counts[3, :, 0] >= min_group
    summary = _differences(counts, large)
    own = _own_rule(predictions)
    present: list[int] = [c for c in np.flatnonzero(counts[0].sum(axis=0) > 0).tolist() if c not in own]
    tested = [c for c in present if (large & (counts[0, :, c] >= MIN_CLASS_IMAGES)).sum() >= 2]
    p_values: dict[int, float] = {}
    for c in tested:
        kept = np.flatnonzero(large & (counts[0, :, c] >= MIN_CLASS_IMAGES))
        rows = np.flatnonzero((labels == c) & np.isin(code, kept))
        place = np.searchsorted(kept, code[rows])
        p_values[c] = gap_test(pred[rows] == c, place, sampling.take(rows), draws=draws, seed=seed).p_value
    corrected = dict(zip(tested, holm(list(p_values.values())), strict=True))
    size = summary["equal_opportunity_difference"]
    order = sorted(present, key=lambda c: -1.0 if np.isnan(size[c]) else size[c], reverse=True)
    classes = [
        {
            "class": predictions.class_names[c],
            "n": int(counts[0, :, c].sum()),
            **_rates(c, labels, pred, code, names, large, sampling, confidence),
            **{name: None if np.isnan(values[c]) else float(values[c]) for name, values in summary.items()},
            "p_value": p_values.get(c),
            "p_holm": None if c not in corrected else float(corrected[c]),
        }
        for c in order[:MOST_CLASSES]
    ]
    note = _note(min_group) + _own_words([predictions.class_names[c] for c in own])
    return {"classes": classes, "num_left_out": len(order) - len(classes), "note": note}


def _own_rule(predictions: Predictions) -> list[int]:
    """Classes that are a declared outcome with another rule than the most probable class."""
    declared = [o.positive[0] for o in predictions.outcomes if o.level is None and len(o.positive) == 1
                and o.rule != ARGMAX]  # fmt: skip
    return [predictions.class_names.index(name) for name in declared]


def _own_words(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"; by the most probable class. {', '.join(names)} {'has' if len(names) == 1 else 'have'} a decision rule of "
        "their own and stand among the declared outcomes"
    )


def _note(min_group: int) -> str:
    return (
        f"the gap is between groups with {MIN_CLASS_IMAGES} images of the class or more; of smaller ones the rate is "
        f"only shown (differences in other rates, in the JSON, are between groups of {min_group} images or more)"
    )


def _differences(counts: np.ndarray, large: np.ndarray) -> dict[str, np.ndarray]:
    """Differences of every class as fairlearn defines them, (C,) each; NaN with fewer than two groups."""
    of_class, given, both, sizes = counts.astype(float)

    def spread(rates: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low = np.where(usable, rates, np.inf).min(axis=0, initial=np.inf)
        high = np.where(usable, rates, -np.inf).max(axis=0, initial=-np.inf)
        enough = usable.sum(axis=0) >= 2
        return np.where(enough, low, np.nan), np.where(enough, high, np.nan), enough

    def rate(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    everywhere = np.broadcast_to(large[:, None], sizes.shape)
    low, high, _ = spread(rate(given, sizes), everywhere)
    tpr_low, tpr_high, _ = spread(rate(both, of_class), everywhere & (of_class >= MIN_CLASS_IMAGES))
    fpr_low, fpr_high, _ = spread(rate(given - both, sizes - of_class), everywhere & (sizes > of_class))
    ratio = np.divide(low, high, out=np.full_like(low, np.nan), where=high > 0)
    return {
        "demographic_parity_difference": high - low,
        "demographic_parity_ratio": ratio,
        "equal_opportunity_difference": tpr_high - tpr_low,
        "equalized_odds_difference": np.maximum(tpr_high - tpr_low, fpr_high - fpr_low),
    }


def _rates(
    c: int,
    labels: np.ndarray,
    pred: np.ndarray,
    code: np.ndarray,
    names: Sequence[str],
    large: np.ndarray,
    sampling: Sampling,
    confidence: float,
) -> dict[str, dict[str, Any]]:
    """The three rates of one class in every group that is large enough, with intervals."""
    found: dict[str, dict[str, Any]] = {"selection_rate": {}, "tpr": {}, "fpr": {}}
    for g in map(int, np.flatnonzero(large)):
        inside = code == g
        for metric, rows in (
            ("selection_rate", inside),
            ("tpr", inside & (labels == c)),
            ("fpr", inside & (labels != c)),
        ):
            found[metric][names[g]] = number(mean_of(pred[rows] == c, sampling.take(np.flatnonzero(rows))), confidence)
    return found


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
        positive), "num_positive", "num_negative", "metrics" (name -> `Metric.info`), and each of them compared.
    """
    labels = two_sided(predictions, outcome).labels
    values = predictions.class_names if outcome.level is None else predictions.levels[outcome.level]
    classes = [name for name, value in zip(predictions.class_names, values, strict=True) if value in outcome.positive]
    measured = measure_outcome(predictions, baseline, outcome, draws=draws, seed=seed)[0]
    return {
        **_names(outcome),
        "threshold": outcome.threshold,
        "rule": rule_words(predictions, outcome),
        "prevalence": outcome.prevalence,
        "metrics": {name: find_metric(name).info() for name in measured},
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
    judged, asked = two_sided(predictions, outcome), rows_asked(predictions, outcome)
    by_group = group_rows(predictions, attribute)
    if attribute not in predictions.groups:
        by_group = {name: rows for name, rows in by_group.items() if len(rows) >= min_group}
    measured = measure_outcome(
        predictions, baseline, outcome, list(by_group.values()), metrics=OUTCOME_GROUP_METRICS, draws=draws, seed=seed
    )
    by_group = {name: among(asked, rows) for name, rows in by_group.items()}
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
