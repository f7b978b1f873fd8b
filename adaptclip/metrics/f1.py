"""Macro-F1: the mean of the classes' F1 scores."""

from __future__ import annotations

import numpy as np

from adaptclip.metrics.estimates import Estimate
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import Metric
from adaptclip.metrics.rates import class_weights, classes_support


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
    "macro_f1", "macro-F1", "macro-F1", macro_f1, over_classes=True, decides=True, support=classes_support, hub="f1"
)
