"""Each class against the rest, group by group: is it given, and found, at equal rates? Names are fairlearn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptclip.gate_rules import ARGMAX
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import gap_test, holm
from adaptclip.metrics.judged import Sampling
from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.reports.numbers import MIN_GROUP, number
from adaptclip.types import Predictions

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
