# SPDX-License-Identifier: Apache-2.0
"""Rates of decisions: accuracy, top-k, means over classes (F1 too), two-sided rates, severity by a taxonomy.

A node of a taxonomy is its path from the root, so that two departments that both have a "red" have two nodes of that
name. Heights count from the classes upwards: a class has height 0, the finest level 1, the coarsest K, the root K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        instead="labels_macro_average_precision",
    )  # fmt: skip


ACCURACY = Metric(
    "accuracy", "accuracy", "accuracy", lambda judged: share(judged.right), decides=True,
    values=lambda judged: judged.right.astype(np.float64), is_general=True, in_groups=True, hub="accuracy",
    instead="subset_accuracy",
)  # fmt: skip

MEAN_PER_CLASS = Metric(
    "mean_per_class_accuracy", "mean accuracy per class", "mean per class", mean_of_classes, decides=True,
    over_classes=True, support=classes_support, is_general=True, in_groups=True, hub="accuracy",
    instead="labels_macro_sensitivity",
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


def macro_f1_parts(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of the classes' F1 scores over the classes that occur as label or prediction, as scikit-learn does it.

    Args:
        predicted: (N,) class ids decided for; N is at least 1.
        labels: (N,) true class ids.

    Returns:
        The score, 0 to 1, and the (N,) influences of the images.
    """
    size = int(max(predicted.max(), labels.max())) + 1
    right = predicted == labels
    total = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)  # 2 TP + FP + FN
    f1 = 2 * np.bincount(labels[right], minlength=size) / np.maximum(total, 1)
    present = int((total > 0).sum())
    of_label, of_predicted = f1[labels] / total[labels], f1[predicted] / total[predicted]
    influence = (np.where(right, 2 / total[labels], 0.0) - of_label - of_predicted) / present
    return float(f1.sum() / present), influence


def macro_f1(judged: Judged) -> Estimate:
    """The score as an estimate: it rests on the classes alike, as the mean of their accuracies does."""
    value, influence = macro_f1_parts(judged.answer, judged.labels)
    weights = class_weights(judged.labels, judged.counts)
    return Estimate(value, influence, weights, judged.labels)


MACRO_F1 = Metric(
    "macro_f1",
    "macro-F1",
    "macro-F1",
    macro_f1,
    over_classes=True,
    decides=True,
    support=classes_support,
    hub="f1",
    instead="labels_macro_f1",
)


def _paths(levels: Mapping[str, Sequence[str]], num_classes: int) -> np.ndarray:
    """Returns (K, C) node ids by level, coarse to fine; equal ids mean equal paths from the root."""
    ids = np.zeros((len(levels), num_classes), dtype=np.int64)
    above = [()] * num_classes
    for k, names in enumerate(levels.values()):
        above = [(*path, name) for path, name in zip(above, names, strict=True)]
        order = {path: i for i, path in enumerate(sorted(set(above)))}
        ids[k] = [order[path] for path in above]
    return ids


def ancestor_heights(levels: Mapping[str, Sequence[str]], num_classes: int) -> np.ndarray:
    """Height of the lowest common ancestor of every two classes (Bertinetto et al. 2020, section 2).

    Args:
        levels: level name -> C names, coarse to fine; K levels, may be none.
        num_classes: C.

    Returns:
        (C, C) int16: 0 on the diagonal, 1 where the finest level is shared, K + 1 where only the root is.
    """
    heights = np.full((num_classes, num_classes), len(levels) + 1, dtype=np.int16)
    for ids in _paths(levels, num_classes):
        heights -= ids[:, None] == ids[None, :]
    np.fill_diagonal(heights, 0)
    return heights


def least_severe(probs: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Decides for the class of least expected severity instead of the most probable one (CRM, Karthik et al. 2021).

    Args:
        probs: (N, C) class probabilities.
        heights: (C, C) of `ancestor_heights`.

    Returns:
        (N,) int64 class ids; the lowest id wins a tie.
    """
    # Summed in float64: rounding must not decide between classes of equal expected severity.
    return (probs.astype(np.float64) @ heights.astype(np.float64)).round(9).argmin(axis=1)
