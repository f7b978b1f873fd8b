"""Coarser questions about the same predictions: a taxonomy level, or a two-sided outcome such as malignant or not.

Probabilities of the classes that belong together are summed. A metric of an outcome is then a plain rate of some of the
images: sensitivity is the accuracy on the positive ones. So every interval, pairing and resampling there is for the
accuracy serves these metrics too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.evaluation.estimates import Comparison, measure
from adaptclip.gate_rules import OUTCOME_METRICS, Outcome
from adaptclip.types import Predictions

_COUNTED: dict[str, tuple[int | None, int]] = {
    "sensitivity": (1, 1),
    "tpr": (1, 1),
    "fnr": (1, 0),
    "specificity": (0, 0),
    "fpr": (0, 1),
    "selection_rate": (None, 1),
}
"""Metric -> side (1 positive, 0 negative, None any) of the images it looks at, and the answer it counts."""


def coarsen(predictions: Predictions, level: str) -> Predictions:
    """Returns the predictions at a taxonomy level: the classes are its values, with the sum of their probabilities.

    Raises:
        DataError: there is no such level.
    """
    if level not in predictions.levels:
        has = did_you_mean(level, predictions.levels) if predictions.levels else "They have no taxonomy levels at all."
        raise DataError(f"these predictions have no taxonomy level {level!r}. {has}")
    names, index = np.unique(np.asarray(predictions.levels[level], dtype=str), return_inverse=True)
    return _merge(predictions, tuple(map(str, names)), index)


def two_sided(predictions: Predictions, outcome: Outcome) -> Predictions:
    """Returns the predictions as two classes, 0 for the negative and 1 for the positive side of an outcome.

    The answer is the more probable side. Another threshold is put in place by stretching the probabilities on both
    sides of it to 0.5, which keeps their order; calibration is then no longer theirs.

    Raises:
        DataError: the outcome does not fit the classes or levels.
    """
    checked = replace(predictions, outcomes=(outcome,))
    values = predictions.class_names if outcome.level is None else checked.levels[outcome.level]
    index = np.isin(np.asarray(values, dtype=str), outcome.positive).astype(np.int64)
    merged = _merge(predictions, (f"not {outcome.name}", outcome.name), index)
    if outcome.threshold == 0.5:
        return merged
    positive, t = merged.probs[:, 1].astype(np.float64), outcome.threshold
    stretched = np.where(positive <= t, positive * 0.5 / t, 0.5 + (positive - t) * 0.5 / (1 - t)).astype(np.float32)
    # Rounding must not put back on the threshold what lies just above it.
    above = np.nextafter(np.float32(0.5), np.float32(1))
    stretched = np.where(positive > t, np.maximum(stretched, above), np.minimum(stretched, np.float32(0.5)))
    return replace(merged, probs=np.stack([1 - stretched, stretched], axis=1))


def _merge(predictions: Predictions, names: tuple[str, ...], index: np.ndarray) -> Predictions:
    """Sums the probabilities of the classes with the same index; every name has a class."""
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(names)))
    # Summed in float64: rounding must not decide between sides that are equally probable.
    summed = np.add.reduceat(predictions.probs[:, order], starts, axis=1, dtype=np.float64)
    # Below the head of a ranking the rest is spread evenly, which says nothing of how it divides among the names.
    whole = predictions.confident and predictions.ranked is None
    return replace(
        predictions, labels=index[predictions.labels], probs=summed.astype(np.float32), class_names=names, levels={},
        outcomes=(), ranked=None if whole else 1, sigmoid=None,
    )  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is measured: a metric of GENERAL_METRICS on (some rows of) predictions that were made to fit it.

    Attributes:
        metric: what `measure` is asked for.
        predictions: the judged model.
        baseline: the reference, or None.
        rows: (N,) bool, the images that count.
    """

    metric: str
    predictions: Predictions
    baseline: Predictions | None
    rows: np.ndarray

    def measure(
        self, rows: np.ndarray | None = None, *, full_bins: bool = False, draws: int = 2000, seed: int = 0
    ) -> Comparison:
        """Measures it on `rows` (positions; None is all), with everything that `estimates.measure` knows."""
        keep = np.flatnonzero(self.rows) if rows is None else rows[self.rows[rows]]
        found = measure(
            self.predictions, self.baseline, metrics=(self.metric,), rows=keep, full_bins=full_bins, draws=draws,
            seed=seed,
        )  # fmt: skip
        return found[self.metric]

    def support(self, rows: np.ndarray | None = None) -> int:
        """Images that speak for the metric: of an AUC of two sides the fewer, otherwise all that count."""
        labels = self.predictions.labels[self.rows if rows is None else rows[self.rows[rows]]]
        if self.metric == "macro_auc" and len(self.predictions.class_names) == 2:
            return int(np.bincount(labels, minlength=2).min())
        return len(labels)


def ask(
    metric: str, predictions: Predictions, baseline: Predictions | None, level: str | None, outcome: Outcome | None
) -> Question:
    """Prepares a metric of METRICS.

    Args:
        metric: name of the metric.
        predictions: the judged model.
        baseline: the reference, aligned, or None.
        level: taxonomy level to judge at; None the classes.
        outcome: two-sided outcome, needed by OUTCOME_METRICS.

    Raises:
        DataError: the level or the outcome does not fit the predictions.
    """
    both = [p for p in (predictions, baseline) if p is not None]
    if outcome is not None:
        both = [two_sided(p, outcome) for p in both]
    elif level is not None:
        both = [coarsen(p, level) for p in both]
    rows = np.ones(len(predictions), bool)
    if metric in _COUNTED:
        side, counted = _COUNTED[metric]
        rows = rows if side is None else both[0].labels == side
        both = [replace(p, labels=np.full(len(p), counted, dtype=np.int64)) for p in both]
        metric = "accuracy"
    elif metric == "auc":
        metric = "macro_auc"
    return Question(metric, both[0], both[1] if len(both) > 1 else None, rows)


def measure_outcome(
    predictions: Predictions,
    baseline: Predictions | None,
    outcome: Outcome,
    groups: Sequence[np.ndarray | None] = (None,),
    *,
    metrics: Sequence[str] = ("sensitivity", "specificity", "selection_rate", "auc"),
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Comparison]]:
    """Measures several metrics of one outcome on several sets of images.

    Args:
        predictions: the judged model.
        baseline: the reference, aligned, or None.
        outcome: the two-sided question.
        groups: positions of the images of each set; None is all.
        metrics: names from OUTCOME_METRICS.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        For each set: metric -> comparison.
    """
    assert set(metrics) <= set(OUTCOME_METRICS)
    questions = {m: ask(m, predictions, baseline, outcome.level, outcome) for m in metrics}
    return [{m: q.measure(rows, draws=draws, seed=seed) for m, q in questions.items()} for rows in groups]


def threshold_for(metric: str, at_least: float, validation: Predictions, outcome: Outcome) -> float:
    """Chooses the threshold of an outcome on validation images: the one that gives the other side most.

    Never use it on images that are then judged: a threshold chosen on the evaluated set flatters every rate.

    Args:
        metric: "sensitivity" or "specificity", what is to be kept.
        at_least: the rate it shall have on the validation images, 0 to 1.
        validation: predictions of validation images.
        outcome: the two-sided question; its own threshold is not used.

    Returns:
        A threshold strictly between 0 and 1.

    Raises:
        DataError: another metric, or no validation image of that side.
    """
    if metric not in ("sensitivity", "specificity"):
        raise DataError(f"a threshold keeps sensitivity or specificity, not {metric!r}")
    merged = two_sided(validation, outcome.model_copy(update={"threshold": 0.5}))
    side = int(metric == "sensitivity")
    own = np.sort(merged.probs[merged.labels == side, 1].astype(np.float64))
    if not len(own):
        raise DataError(f"no validation image is {'positive' if side else 'negative'}: {outcome.name}")
    # Sensitivity: the (1 - s) n lowest positives may fall below. Specificity: the same from the top.
    allowed = int(np.floor((1 - at_least) * len(own) + 1e-9))
    if side:
        edge = own[allowed] if allowed < len(own) else 1.0
        return float(np.clip(np.nextafter(np.float32(edge), np.float32(0)), 1e-6, 1 - 1e-6))
    edge = own[len(own) - 1 - allowed] if allowed < len(own) else 0.0
    return float(np.clip(edge, 1e-6, 1 - 1e-6))
