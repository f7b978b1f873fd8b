"""Rates of decisions: accuracy, top-k, the mean of the classes' accuracies, and the rates of a two-sided outcome."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from adaptclip.errors import DataError, agree
from adaptclip.metrics.estimates import Estimate, share
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, MIN_IMAGES, MIN_OUTCOMES, Metric, Support


def topk_correct(probs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns (N,) bool: the true class is among the k most probable; lower class ids win ties, as for answers.

    scikit-learn's `top_k_accuracy_score` lets the highest id win, so that its top-1 differs from the accuracy where
    probabilities are tied; hence the own rank.

    Raises:
        DataError: k is not within 1..C-1 (with k = C every model is right).
    """
    num_classes = probs.shape[1]
    if not 1 <= k < num_classes:
        raise DataError(
            f"top-{k} accuracy says nothing about {num_classes} classes: k must lie within 1..{num_classes - 1}"
        )
    own = np.take_along_axis(probs, labels[:, None], axis=1)
    ahead = (probs > own) | ((probs == own) & (np.arange(num_classes) < labels[:, None]))
    return ahead.sum(axis=1) < k


def absent_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the ids of the classes without images."""
    return np.setdiff1d(np.arange(num_classes), labels)


def absent_words(judged: Judged) -> str:
    """What a mean over the classes leaves out, or ""."""
    absent = int((judged.counts == 0).sum())
    verbs = agree(absent, "has no images here and is", "have no images here and are")
    return f"{absent} of {judged.num_classes} classes {verbs} left out of the mean" if absent else ""


def class_weights(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N,) weights with which every class that has images counts alike; they add up to 1."""
    return 1 / (counts[labels] * (counts > 0).sum())


def mean_of_classes(judged: Judged) -> Estimate:
    """Unweighted mean of the accuracies of the classes that have images (balanced accuracy), 0 to 1.

    Classes without images are left out of the mean: nothing is known about them.
    """
    weights = class_weights(judged.labels, judged.counts)
    right = np.bincount(judged.labels, judged.right, minlength=judged.num_classes)
    rates = right / np.maximum(judged.counts, 1)
    influence = weights * (judged.right - rates[judged.labels])
    value = float(rates[judged.counts > 0].mean())
    return Estimate(value, influence, weights, judged.labels, judged.right, note=absent_words(judged))


def classes_support(judged: Judged) -> tuple[Support, ...]:
    """All images as far as the classes share them evenly, and those of the smallest class of all that there are."""
    counts, present = judged.counts, judged.counts[judged.counts > 0]
    worth = int(len(present) ** 2 / (1 / present).sum()) if len(present) else 0
    return (
        Support(worth, "evenly spread images", MIN_IMAGES),
        Support(int(counts.min()) if len(counts) else 0, "images of the smallest class", MIN_CLASS_IMAGES),
    )


def _top_k_undefined(k: int, judged: Judged) -> str:
    if judged.num_classes <= k:
        return f"top-{k} accuracy says nothing about {judged.num_classes} classes"
    if judged.ranked is not None and judged.ranked < k:
        return f"the predictions rank only {judged.ranked} of the classes"
    return ""


def top_k(k: int) -> Metric:
    """Share of images whose true class is among the k most probable."""
    return Metric(
        f"top{k}_accuracy", f"top-{k} accuracy", f"top-{k} accuracy",
        lambda judged: share(topk_correct(judged.probs, judged.labels, k)),
        undefined=partial(_top_k_undefined, k), least_classes=k + 1, is_general=True, hub="accuracy",
    )  # fmt: skip


ACCURACY = Metric(
    "accuracy", "accuracy", "accuracy", lambda judged: share(judged.right), decides=True,
    values=lambda judged: judged.right.astype(np.float64), is_general=True, in_groups=True, hub="accuracy",
)  # fmt: skip

MEAN_PER_CLASS = Metric(
    "mean_per_class_accuracy", "mean accuracy per class", "mean per class", mean_of_classes, decides=True,
    over_classes=True, support=classes_support, is_general=True, in_groups=True, hub="accuracy",
)  # fmt: skip

TOP5 = top_k(5)


def _rate(
    name: str,
    words: str,
    short: str,
    side: int | None,
    answer: int,
    better: str,
    shown: bool = False,
) -> Metric:
    """A rate of a two-sided outcome.

    Args:
        name: key.
        words: in sentences.
        short: in the heads of columns.
        side: of the images it is about: 1 positive, 0 negative, None any.
        answer: which answer it counts.
        better: which way is better.
        shown: whether reports show it of every declared outcome.
    """
    about = {1: "positive ", 0: "negative ", None: ""}[side]
    selects: Callable[[Judged], np.ndarray] | None = None if side is None else (lambda judged: judged.labels == side)
    return Metric(
        name, words, short, lambda judged: share(judged.answer == answer), better=better,  # type: ignore[arg-type]
        of_outcome=True, sides=() if side is None else (side,), decides=True, selects=selects, about=about,
        support=lambda judged: (Support(len(judged), f"{about}images", MIN_OUTCOMES),),
        values=lambda judged: (judged.answer == answer).astype(np.float64), is_general=shown, in_groups=shown,
    )  # fmt: skip


OUTCOME_RATES = (
    _rate("sensitivity", "sensitivity", "sensitivity", 1, 1, "higher", shown=True),
    _rate("specificity", "specificity", "specificity", 0, 0, "higher", shown=True),
    _rate("tpr", "true positive rate", "TPR", 1, 1, "higher"),
    _rate("fpr", "false positive rate", "FPR", 0, 1, "lower"),
    _rate("fnr", "false negative rate", "FNR", 1, 0, "lower"),
    _rate("selection_rate", "selection rate", "selection rate", None, 1, "neither", shown=True),
)
"""Rates of a two-sided outcome; `tpr` is another name of sensitivity."""
