"""Coarser questions about the same predictions: a taxonomy level, or a two-sided outcome such as malignant or not.

Probabilities of the classes that belong together are summed. The metrics of an outcome are metrics like any other, of
predictions with two classes (0 negative, 1 positive), of which each looks at the side that it is about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.evaluation.measuring import judged, measure
from adaptclip.gate_rules import ARGMAX, Outcome
from adaptclip.metrics import OUTCOME_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import Comparison
from adaptclip.metrics.metric import Support
from adaptclip.types import Predictions

_SIDES = {"sensitivity": 1, "specificity": 0}
"""What a threshold can be chosen to keep -> the side it is a rate of."""


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

    The outcome's rule decides which side is the answer: that of the most probable class, or a threshold of the summed
    probability. The probabilities stay what they are. Where the rule's threshold has not been chosen yet, metrics of
    decisions say so instead of giving a number (`Outcome.undecided`).

    Raises:
        DataError: the outcome does not fit the classes or levels.
    """
    checked = replace(predictions, outcomes=(outcome,))
    values = predictions.class_names if outcome.level is None else checked.levels[outcome.level]
    index = np.isin(np.asarray(values, dtype=str), outcome.positive).astype(np.int64)
    merged = _merge(predictions, (f"not {outcome.name}", outcome.name), index)
    side = index[predictions.pred]
    if outcome.threshold is not None:
        side = (merged.probs[:, 1].astype(np.float64) > outcome.threshold).astype(np.int64)
    return replace(merged, decided=side, asked=outcome)


def with_thresholds(predictions: Predictions, validation: Predictions | None) -> Predictions:
    """Chooses the thresholds that declared outcomes ask for (rule: sensitivity=0.95) on validation images.

    Args:
        predictions: the judged model on the test images.
        validation: the same model on images that are neither trained on nor judged; None where there are none.

    Returns:
        The predictions with outcomes whose thresholds are set; those that cannot be chosen stay without.
    """
    chosen = []
    for outcome in predictions.outcomes:
        keeps = outcome.keeps
        if keeps is not None and outcome.threshold is None and validation is not None and len(validation):
            # Without a validation image of that side there is none, and what is judged by it says so.
            with contextlib.suppress(DataError):
                found = threshold_for(*keeps, validation, outcome)
                images = int((two_sided(validation, outcome).labels == _SIDES[keeps[0]]).sum())
                outcome = outcome.model_copy(update={"threshold": found, "chosen_on": images})
        chosen.append(outcome)
    return replace(predictions, outcomes=tuple(chosen))


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
        outcomes=(), ranked=None if whole else 1, sigmoid=None, positive=None, thresholds=None, decided=None,
        strata=predictions.labels if predictions.strata is None else predictions.strata,
    )  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is measured: a metric on predictions that were made to fit it.

    Attributes:
        metric: the metric.
        predictions: the judged model.
        baseline: the reference, or None.
    """

    metric: Metric
    predictions: Predictions
    baseline: Predictions | None

    def measure(
        self, rows: np.ndarray | None = None, *, full_bins: bool = False, draws: int = 2000, seed: int = 0
    ) -> Comparison:
        """Measures it on `rows` (positions; None is all)."""
        found = measure(
            self.predictions, self.baseline, metrics=(self.metric,), rows=rows, full_bins=full_bins, draws=draws,
            seed=seed,
        )  # fmt: skip
        return found[self.metric.name]

    def supports(self, rows: np.ndarray | None = None) -> tuple[Support, ...]:
        """What the metric rests on."""
        return self.metric.supports(judged(self.predictions, rows))

    def units(self, rows: np.ndarray | None = None) -> int:
        """Number of units (clusters, or independent images) among the images that the metric is about."""
        return self.metric.chosen(judged(self.predictions, rows)).sampling.num_units


def ask(
    metric: Metric | str,
    predictions: Predictions,
    baseline: Predictions | None,
    level: str | None,
    outcome: Outcome | None,
) -> Question:
    """Prepares a metric.

    Args:
        metric: the metric or its name.
        predictions: the judged model.
        baseline: the reference, aligned, or None.
        level: taxonomy level to judge at; None the classes.
        outcome: two-sided outcome, needed by metrics of an outcome.

    Raises:
        DataError: the level or the outcome does not fit the predictions.
    """
    both = [p for p in (predictions, baseline) if p is not None]
    if outcome is not None:
        both = [two_sided(p, outcome) for p in both]
    elif level is not None:
        both = [coarsen(p, level) for p in both]
    return Question(find_metric(metric), both[0], both[1] if len(both) > 1 else None)


def measure_outcome(
    predictions: Predictions,
    baseline: Predictions | None,
    outcome: Outcome,
    groups: Sequence[np.ndarray | None] = (None,),
    *,
    metrics: Sequence[Metric | str] = OUTCOME_METRICS,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Comparison]]:
    """Measures several metrics of one outcome on several sets of images.

    Args:
        predictions: the judged model.
        baseline: the reference, aligned, or None.
        outcome: the two-sided question.
        groups: positions of the images of each set; None is all.
        metrics: metrics of an outcome.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        For each set: name of the metric -> comparison.
    """
    both = [None if p is None else two_sided(p, outcome) for p in (predictions, baseline)]
    assert both[0] is not None
    return [measure(both[0], both[1], metrics=metrics, rows=rows, draws=draws, seed=seed) for rows in groups]


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
    if metric not in _SIDES:
        raise DataError(f"a threshold keeps {' or '.join(_SIDES)}, not {metric!r}")
    merged = two_sided(validation, outcome.model_copy(update={"rule": ARGMAX, "threshold": None}))
    side = _SIDES[metric]
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
