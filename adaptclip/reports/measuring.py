# SPDX-License-Identifier: Apache-2.0
"""Metrics of predictions with their uncertainty: alone, by group, paired with a baseline, of a coarser question.

A coarser question is a taxonomy level or a two-sided outcome such as malignant or not. Probabilities of the classes
that belong together are summed. The metrics of an outcome are metrics like any other, of predictions with two classes
(0 negative, 1 positive), of which each looks at the side that it is about.

Where images may show several classes, every number of one class is that of an outcome: `two_sided`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from scipy.stats import binom

from adaptclip.errors import DataError, did_you_mean
from adaptclip.gate_rules import ARGMAX, BETWEEN, Outcome
from adaptclip.metrics import GENERAL_METRICS, OUTCOME_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import Comparison, Measurement
from adaptclip.metrics.intervals import DifferenceSpread, RateSpread
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Drawing, Support
from adaptclip.reports.any_of import among, any_of, marks_of, rows_asked

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions


class Grouped(Protocol):
    """What has groups, such as `Predictions`."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Attribute name -> N values."""
        ...


def listed(names: Iterable[str]) -> str:
    """Names in a row; between those of an intersection ("female, 60+"), which have commas of their own, semicolons."""
    named = list(map(str, names))
    return ("; " if any(", " in name for name in named) else ", ").join(named)


def align(predictions: Predictions, baseline: Predictions) -> Predictions:
    """Returns the baseline with its rows in the order of the predictions.

    Raises:
        DataError: the two do not judge the same images with the same labels and classes.
    """
    if predictions.class_names != baseline.class_names:
        raise DataError("predictions and baseline have different class names; compare models on the same classes")
    position = {row: i for i, row in enumerate(baseline.ids)}
    missing = [row for row in predictions.ids if row not in position]
    if missing or len(baseline) != len(predictions):
        example = f", for example {missing[0]!r}" if missing else ""
        raise DataError(
            f"a paired comparison needs the same images: {len(missing)} of {len(predictions)} are missing from the "
            f"baseline, which has {len(baseline)}{example}. Predict both models on the same split."
        )
    order = np.array([position[row] for row in predictions.ids], dtype=np.int64)
    different = int((_shown(baseline)[order] != _shown(predictions)).any(axis=1).sum())
    if different:
        raise DataError(f"{different} images have another label in the baseline; predict both models on the same data")
    if predictions.several and baseline.sigmoid is None:
        raise DataError(
            "the baseline has no probabilities of the single classes (sigmoid_CLASS), which images that may show "
            "several classes are judged by"
        )
    return replace(
        predictions, probs=baseline.probs[order], ranked=baseline.ranked, confident=baseline.confident,
        sigmoid=None if baseline.sigmoid is None else baseline.sigmoid[order], thresholds=baseline.thresholds,
    )  # fmt: skip


def _shown(predictions: Predictions) -> np.ndarray:
    """(N, 1 or C) what the images show: their class, or for each class 1, 0, or -1 where it is not known."""
    if predictions.positive is None:
        return predictions.labels[:, None]
    shown = predictions.positive.astype(np.int8)
    return shown if predictions.known is None else np.where(predictions.known, shown, np.int8(-1))


def group_values(predictions: Grouped, attribute: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of an attribute's groups, sorted, and (N,) the position of each image's group among them.

    An intersection, "sex × age_group", has groups such as "female, 60+". "unknown" is a group like any other.

    Raises:
        DataError: the predictions have no such attribute.
    """
    if attribute in predictions.groups:
        return encode(predictions.groups[attribute])
    parts = [group_values(predictions, name) for name in attribute.split(BETWEEN)] if BETWEEN in attribute else []
    if not parts:
        groups = did_you_mean(attribute, predictions.groups, lead="They have")
        has = groups if predictions.groups else "They have no group columns at all."
        raise DataError(f"these predictions have no group attribute {attribute!r}. {has}")
    sizes = [len(names) for names, _ in parts]
    crossed, codes = np.unique(np.ravel_multi_index([code for _, code in parts], sizes), return_inverse=True)
    indices = np.stack(np.unravel_index(crossed, sizes), axis=1)
    labels = [tuple(parts[k][0][i] for k, i in enumerate(row)) for row in indices]
    joined = tuple(map(", ".join, labels))
    if len(set(joined)) < len(joined):  # values with commas of their own
        joined = tuple(map(BETWEEN.join, labels))
    return joined, codes


def encode(values: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the distinct values, sorted, and (N,) the position of each row's among them."""
    encoded = pa.array(values, pa.string()).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return tuple(names[i] for i in order), rank[encoded.indices.to_numpy(zero_copy_only=False)]


def group_rows(predictions: Predictions, attribute: str) -> dict[str, np.ndarray]:
    """Returns group name -> row positions, names sorted; see `group_values`.

    Raises:
        DataError: the predictions have no such attribute.
    """
    names, code = group_values(predictions, attribute)
    order = np.argsort(code, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(code, minlength=len(names)))[:-1]) if names else []
    return dict(zip(names, parts, strict=True))


def sampling_of(predictions: Predictions, rows: np.ndarray | None = None) -> Sampling:
    """How the images of predictions, or those at `rows`, were drawn.

    Args:
        predictions: their clusters, where given, are the units; their classes are strata where the study fixed them.
        rows: positions of the images; None is all.
    """
    clusters = None if predictions.clusters is None else encode(predictions.clusters)[1]
    whole = Sampling(
        np.arange(len(predictions)) if clusters is None else clusters,
        (predictions.labels if predictions.strata is None else predictions.strata)
        if predictions.fixed_classes and not predictions.several  # a mix of sets of classes is met by chance
        else None,
    )
    return whole if rows is None else whole.take(rows)


def judged(predictions: Predictions, rows: np.ndarray | None = None) -> Judged:
    """What metrics see of predictions, or of those at `rows`."""
    everything = Judged(
        predictions.labels, predictions.probs, sampling_of(predictions), predictions.ranked, predictions.confident,
        decided=predictions.decided, prevalence=predictions.asked and predictions.asked.prevalence,
        threshold=predictions.asked and predictions.asked.threshold,
        undecided=predictions.asked.undecided if predictions.asked else "", marks=marks_of(predictions),
    )  # fmt: skip
    return everything if rows is None else everything.take(rows)


def measure(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    metrics: Sequence[Metric | str] = GENERAL_METRICS,
    rows: np.ndarray | None = None,
    full_bins: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Measures metrics with their uncertainty.

    Args:
        predictions: the judged model; its clusters, where given, are the unit of resampling.
        baseline: the model to compare with, aligned (see `grouping.align`).
        metrics: metrics or their names.
        rows: positions of the images to judge; None judges all.
        full_bins: leave `ece` out where the bins are thinly filled (for groups).
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        Name of the metric -> comparison. Nothing in it is NaN: what cannot be computed is None with a note.

    Raises:
        DataError: there is no metric of that name.
    """
    both = [judged(one, rows) for one in (predictions, baseline) if one is not None]
    drawing = Drawing(draws, seed, full_bins)
    found: dict[str, Comparison] = {}
    for metric in map(find_metric, metrics):
        if len(both[0]) == 0:
            none = Measurement(None, 0, note="no images")
            found[metric.name] = Comparison(none, *((none, none) if baseline is not None else ()))
            continue
        found[metric.name] = metric.compare(both[0], both[1] if len(both) > 1 else None, drawing)
    return found


def sign_test(after: np.ndarray, before: np.ndarray, clusters: Sequence[str] | np.ndarray | None = None) -> float:
    """Two-sided exact p-value that what was right before and after differs only by chance.

    Of independent images this is McNemar's exact test. Units of several images count once, by the sign of their net
    change.

    Args:
        after: (N,) bool, right now.
        before: (N,) bool, right before.
        clusters: N unit ids, or None where the images are independent.
    """
    change = after.astype(np.int64) - before.astype(np.int64)
    if clusters is not None and len(change):
        change = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], change)
    up, down = int((change > 0).sum()), int((change < 0).sum())
    return min(1.0, 2 * float(binom.cdf(min(up, down), up + down, 0.5)))


def difference(first: Measurement, second: Measurement) -> Measurement:
    """First minus second, of independent sets of images."""
    if first.value is None or second.value is None:
        return Measurement(None, first.n + second.n, note=first.note or second.note)
    value, n = first.value - second.value, first.n + second.n
    if first.spread is None or second.spread is None:
        return Measurement(value, n, note=first.note or second.note)
    return Measurement(value, n, DifferenceSpread((first.value, first.spread), (second.value, second.spread)))


def harmonic(first: Measurement, second: Measurement) -> Measurement:
    """Harmonic mean of two rates of independent sets of images; 0 where one is 0 (Xian et al. 2017).

    Its variance is linearised, with each rate's effective number of images.
    """
    n = first.n + second.n
    if first.value is None or second.value is None:
        return Measurement(None, n, note=first.note or second.note)
    a, b = first.value, second.value
    value = 2 * a * b / (a + b) if a + b > 0 else 0.0
    if not (isinstance(first.spread, RateSpread) and isinstance(second.spread, RateSpread)):
        return Measurement(value, n, note=first.note or second.note)
    if value in (0.0, 1.0):
        least = min(first.spread.size, second.spread.size)
        return Measurement(value, n, RateSpread(value, least, least))
    slopes = 2 * b**2 / (a + b) ** 2, 2 * a**2 / (a + b) ** 2
    parts = zip(slopes, (a, b), (first.spread.size, second.spread.size), strict=True)
    variance = sum(slope**2 * rate * (1 - rate) / size for slope, rate, size in parts)
    size = value * (1 - value) / variance
    degrees = [s.df for s in (first.spread, second.spread) if s.df is not None]
    return Measurement(value, n, RateSpread(value, size, float(n), min(degrees) if degrees else None))


NO_LEVELS = (
    "images may show several classes, or none, so that they have no single value of a taxonomy level; ask for "
    "one value (level: LEVEL, positive: VALUE)"
)

_SIDES = {"sensitivity": 1, "specificity": 0}
"""What a threshold can be chosen to keep -> the side it is a rate of."""


def coarsen(predictions: Predictions, level: str) -> Predictions:
    """Returns the predictions at a taxonomy level: the classes are its values, with the sum of their probabilities.

    Raises:
        DataError: there is no such level, or images may show several classes.
    """
    if predictions.several:
        raise DataError(NO_LEVELS)
    if level not in predictions.levels:
        levels = did_you_mean(level, predictions.levels, lead="They have")
        has = levels if predictions.levels else "They have no taxonomy levels at all."
        raise DataError(f"these predictions have no taxonomy level {level!r}. {has}")
    names, index = np.unique(np.asarray(predictions.levels[level], dtype=str), return_inverse=True)
    return _merge(predictions, tuple(map(str, names)), index)


def two_sided(predictions: Predictions, outcome: Outcome) -> Predictions:
    """Returns the predictions as two classes, 0 for the negative and 1 for the positive side of an outcome.

    The outcome's rule decides which side is the answer: that of the most probable class, or a threshold of the summed
    probability. The probabilities stay what they are. Where the rule's threshold has not been chosen yet, metrics of
    decisions say so instead of giving a number (`Outcome.undecided`).

    Where images may show several classes the answer is that on any of the outcome's classes: positive where one is
    shown, with the largest of their probabilities. Without a rule of its own an outcome is decided by the thresholds of
    its classes: positive where one is named. There is a row for every image of which the truth is known (`rows_asked`):
    one of the classes is shown, or it is known of all of them that they are not.

    Raises:
        DataError: the outcome does not fit the classes or levels.
    """
    outcome.check(predictions.class_names, predictions.levels, several=predictions.several)
    values = predictions.class_names if outcome.level is None else predictions.levels[outcome.level]
    index = np.isin(np.asarray(values, dtype=str), outcome.positive).astype(np.int64)
    if predictions.several:
        return any_of(predictions, outcome, np.flatnonzero(index))
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
        asked: positions of these images among those that the question was asked of, where they are not all of them.
    """

    metric: Metric
    predictions: Predictions
    baseline: Predictions | None
    asked: np.ndarray | None = None

    def measure(
        self, rows: np.ndarray | None = None, *, full_bins: bool = False, draws: int = 2000, seed: int = 0
    ) -> Comparison:
        """Measures it on `rows` (positions among all images; None is all)."""
        found = measure(
            self.predictions, self.baseline, metrics=(self.metric,), rows=self.own(rows), full_bins=full_bins,
            draws=draws, seed=seed,
        )  # fmt: skip
        return found[self.metric.name]

    def supports(self, rows: np.ndarray | None = None) -> tuple[Support, ...]:
        """What the metric rests on."""
        return self.metric.supports(self.images(rows))

    def units(self, rows: np.ndarray | None = None) -> int:
        """Number of units (clusters, or independent images) among the images that the metric is about."""
        return self.metric.chosen(self.images(rows)).sampling.num_units

    def images(self, rows: np.ndarray | None = None) -> Judged:
        """What the metric sees of `rows` (positions among all images; None is all)."""
        return judged(self.predictions, self.own(rows))

    def own(self, rows: np.ndarray | None) -> np.ndarray | None:
        """Positions among the question's images of `rows`, which are positions among all."""
        return None if rows is None else among(self.asked, rows)


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
    both, asked = [p for p in (predictions, baseline) if p is not None], None
    if outcome is not None:
        asked = rows_asked(predictions, outcome)
        both = [two_sided(p, outcome) for p in both]
    elif level is not None:
        both = [coarsen(p, level) for p in both]
    return Question(find_metric(metric), both[0], both[1] if len(both) > 1 else None, asked)


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
    asked = rows_asked(predictions, outcome)
    parts = [None if rows is None else among(asked, rows) for rows in groups]
    return [measure(both[0], both[1], metrics=metrics, rows=rows, draws=draws, seed=seed) for rows in parts]


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
