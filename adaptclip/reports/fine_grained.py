"""How well a model tells classes apart: top-k, what it takes for what, levels of a taxonomy, severity of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.evaluation.measuring import judged, measure, sampling_of
from adaptclip.evaluation.outcomes import coarsen
from adaptclip.metrics.estimates import Measurement, linearised, mean_of
from adaptclip.metrics.f1 import MACRO_F1
from adaptclip.metrics.rates import ACCURACY, top_k
from adaptclip.metrics.taxonomy import ancestor_heights, least_severe
from adaptclip.metrics.worst_decile import WORST_DECILE, pick_worst
from adaptclip.reports.numbers import comparison, number
from adaptclip.types import Predictions

TOP_K = (1, 3, 5)

MAX_CONFUSIONS = 12
"""Confused pairs that a report lists."""

MAX_EXAMPLES = 3
"""Images that a report names of each confused pair."""

MAX_MATRIX_CLASSES = 25
"""Up to this many classes the whole confusion matrix is part of the report."""

MAX_SEVERITY_CLASSES = 4000
"""Above this many classes no matrix of common ancestors is built."""


def fine_grained_report(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    hard_pairs: Sequence[tuple[str, str]] = (),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses how finely a model distinguishes.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        hard_pairs: pairs of class names that are known to be hard, of the card.
        confidence: level of all two-sided intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict with numbers and comparisons as in `build_report`: "overall" (metric -> comparison: top-k
        accuracies, macro-F1, the worst tenth of the classes), "metrics" (name -> `Metric.told`), "worst_classes" (those
        with the lowest accuracy, "classes", of how many, "of", and their accuracy on the images that picked them,
        "as_chosen"), "confusions" (list), "matrix", "hard_pairs" (list), "levels" (list), "severity" (None without a
        taxonomy).

    Raises:
        DataError: a hard pair names an unknown class.
    """
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    both = (predictions,) if baseline is None else (predictions, baseline)
    asked = [k for k in TOP_K if k < len(predictions.class_names) and k <= (predictions.ranked or k)]
    metrics = [*(ACCURACY if k == 1 else top_k(k) for k in asked), MACRO_F1, WORST_DECILE]
    compared = measure(predictions, baseline, metrics=metrics, draws=draws, seed=seed)
    return {
        "overall": {name: comparison(found, confidence) for name, found in compared.items()},
        "metrics": {metric.name: metric.told() for metric in metrics},
        "worst_classes": _worst_classes(predictions),
        "confusions": _confusions(predictions, confidence),
        "matrix": _matrix(predictions),
        "hard_pairs": [_hard_pair(predictions, baseline, pair, settings) for pair in hard_pairs],
        "levels": [_level(predictions, baseline, level, settings) for level in predictions.levels],
        "severity": _severity(both, confidence),
    }


def example_ids(fine: Mapping[str, Any]) -> list[str]:
    """Row ids of the images that a fine-grained report names as examples of confusions."""
    return [example["id"] for pair in fine["confusions"] for example in pair["examples"]]


def _worst_classes(predictions: Predictions) -> dict[str, Any]:
    """The tenth of the classes with the lowest accuracy; how low it truly is, the metric of that name says."""
    picked = pick_worst(judged(predictions))
    names = [predictions.class_names[i] for i in picked.classes]
    return {"classes": names, "of": len(picked.of), "as_chosen": picked.accuracy}


def _confusions(predictions: Predictions, confidence: float) -> list[dict[str, Any]]:
    """The directed pairs of classes that are confused most, by number of images and then by rate."""
    size = len(predictions.class_names)
    predicted = predictions.pred
    wrong = np.flatnonzero(predicted != predictions.labels)
    pairs, counts = np.unique(predictions.labels[wrong] * size + predicted[wrong], return_counts=True)
    true, other = np.divmod(pairs, size)
    sizes = np.bincount(predictions.labels, minlength=size)
    order = np.lexsort((pairs, -counts / sizes[true], -counts))[:MAX_CONFUSIONS]
    rows, sampling = [], sampling_of(predictions)
    for i in order:
        of_class = np.flatnonzero(predictions.labels == true[i])
        taken = predicted[of_class] == other[i]
        images = of_class[taken]
        sure_first = images[np.argsort(-predictions.probs[images, other[i]], kind="stable")][:MAX_EXAMPLES]
        rows.append(
            {
                "true": predictions.class_names[true[i]],
                "predicted": predictions.class_names[other[i]],
                "count": int(counts[i]),
                "back": int(((predictions.labels == other[i]) & (predicted == true[i])).sum()),
                "rate": number(mean_of(taken, sampling.take(of_class)), confidence),
                "examples": [
                    {
                        "id": predictions.ids[j],
                        "confidence": float(predictions.probs[j, other[i]]) if predictions.confident else None,
                    }
                    for j in sure_first
                ],
            }
        )
    return rows


def _matrix(predictions: Predictions) -> list[list[int]] | None:
    """Images by true class (row) and predicted class; None with more than MAX_MATRIX_CLASSES."""
    size = len(predictions.class_names)
    if size > MAX_MATRIX_CLASSES:
        return None
    counts = np.bincount(predictions.labels * size + predictions.pred, minlength=size * size)
    return counts.reshape(size, size).tolist()


def _hard_pair(
    predictions: Predictions, baseline: Predictions | None, pair: tuple[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Accuracy on the images of two classes when only the two are asked about."""
    for name in pair:
        if name not in predictions.class_names:
            raise DataError(f"hard pair {list(pair)}: no class {name!r}. {did_you_mean(name, predictions.class_names)}")
    if pair[0] == pair[1]:
        raise DataError(f"hard pair {list(pair)} names one class twice; it needs two")
    ids = [predictions.class_names.index(name) for name in pair]
    rows = np.flatnonzero(np.isin(predictions.labels, ids))
    kept = [None if p is None else _only(p, rows, ids) for p in (predictions, baseline)]
    confidence = settings["confidence"]
    assert kept[0] is not None
    measured = measure(
        kept[0], kept[1], metrics=("mean_per_class_accuracy",), draws=settings["draws"], seed=settings["seed"]
    )
    inside = np.isin(predictions.pred[rows], ids)
    return {
        "pair": list(pair),
        "n": [int((predictions.labels == i).sum()) for i in ids],
        "accuracy": comparison(measured["mean_per_class_accuracy"], confidence),
        "within_pair": float(inside.mean()) if len(rows) else None,
    }


def _only(predictions: Predictions, rows: np.ndarray, classes: list[int]) -> Predictions:
    """Predictions of the images at `rows` among two classes."""
    two = predictions.probs[rows][:, classes].astype(np.float64)
    total = two.sum(axis=1, keepdims=True)
    two = np.divide(two, total, out=np.full_like(two, 0.5), where=total > 0)
    return Predictions(
        tuple(predictions.ids[i] for i in rows),
        (predictions.labels[rows] == classes[1]).astype(np.int64),
        two.astype(np.float32),
        tuple(predictions.class_names[c] for c in classes),
        clusters=None if predictions.clusters is None else tuple(predictions.clusters[i] for i in rows),
        fixed_classes=predictions.fixed_classes,
    )


def _level(
    predictions: Predictions, baseline: Predictions | None, level: str, settings: dict[str, Any]
) -> dict[str, Any]:
    coarse = coarsen(predictions, level)
    base = None if baseline is None else coarsen(replace(baseline, levels=predictions.levels), level)
    metrics = ("accuracy", "mean_per_class_accuracy")
    measured = measure(coarse, base, metrics=metrics, draws=settings["draws"], seed=settings["seed"])
    return {
        "level": level,
        "num_names": len(coarse.class_names),
        **{metric: comparison(compared, settings["confidence"]) for metric, compared in measured.items()},
    }


def _severity(both: Sequence[Predictions], confidence: float) -> dict[str, Any] | None:
    """Mean height of the lowest common ancestor over the mistakes, and what deciding by severity would change."""
    first = both[0]
    size = len(first.class_names)
    if not first.levels or size > MAX_SEVERITY_CLASSES:
        return None
    heights = ancestor_heights(first.levels, size)
    top = len(first.levels) + 1
    names = ["the class itself", *reversed(first.levels), "only the root"]
    reached = heights[first.labels, first.pred]
    wrong = int((reached > 0).sum())
    cautious = least_severe(first.probs, heights)
    return {
        "max_height": top,
        "mistakes": _mistakes([p.pred for p in both], first, heights, top, confidence),
        "distribution": [
            {
                "height": h,
                "shared": names[h],
                "count": int((reached == h).sum()),
                "share": int((reached == h).sum()) / wrong if wrong else None,
            }
            for h in range(1, top + 1)
        ],
        "least_severe": {
            "accuracy": number(mean_of(cautious == first.labels, sampling_of(first)), confidence),
            "mistakes": _mistakes([cautious], first, heights, top, confidence)["model"],
            "height_of_all": number(_height_of_all(cautious, first, heights, top), confidence),
            "decisions_changed": int((cautious != first.pred).sum()),
        },
        "height_of_all": number(_height_of_all(first.pred, first, heights, top), confidence),
    }


def _mistakes(
    decided: list[np.ndarray], predictions: Predictions, heights: np.ndarray, top: int, confidence: float
) -> dict[str, Any]:
    """Mean height over the mistakes; without a change, as two models' mistakes are of different images."""
    numbers = [number(_mean_height(pred, predictions, heights, top), confidence) for pred in decided]
    return {"model": numbers[0], "zero_shot": numbers[1] if len(numbers) > 1 else None, "change": None}


def _mean_height(decided: np.ndarray, predictions: Predictions, heights: np.ndarray, top: int) -> Measurement:
    reached = heights[predictions.labels, decided].astype(np.float64)
    wrong = reached > 0
    count = int(wrong.sum())
    if count == 0:
        return Measurement(None, 0, note="there are no mistakes")
    mean = float(reached[wrong].mean())
    influence = np.where(wrong, reached - mean, 0.0) / count
    rows = np.flatnonzero(wrong)
    return linearised(mean, influence[rows], sampling_of(predictions, rows), low=1.0, high=float(top))


def _height_of_all(decided: np.ndarray, predictions: Predictions, heights: np.ndarray, top: int) -> Measurement:
    return mean_of(heights[predictions.labels, decided].astype(np.float64), sampling_of(predictions), high=float(top))
