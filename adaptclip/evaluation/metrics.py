"""Metrics of a classifier: accuracy, mean per-class accuracy, top-k accuracy, calibration error, Brier score and AUC.

The rates and the calibration error can be written with sums over cells of images (all images, the images of one class,
the images of one confidence bin). `Cells` holds an image's value and cell, so that a bootstrap can recompute a metric
for thousands of weightings of the images with one matrix product. The others are in `evaluation.influence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.metrics import accuracy_score, recall_score

from adaptclip.errors import DataError
from adaptclip.evaluation.influence import brier_score, macro_auc
from adaptclip.gate_rules import LOWER_IS_BETTER as LOWER_IS_BETTER

ECE_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017 use the same number)."""

LINEARISED = frozenset({"brier", "macro_auc"})
"""Metrics whose uncertainty comes from the influence of each image, see `evaluation.influence`."""


def _require_rows(labels: np.ndarray, metric: str) -> None:
    if len(labels) == 0:
        raise DataError(f"{metric} needs at least one image, got none")


def correct(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (N,) bool: the most probable class is the true one; the lowest class id wins a tie.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
    """
    return probs.argmax(axis=1) == labels


def topk_correct(probs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns (N,) bool: the true class is among the k most probable; lower class ids win ties, as in `correct`.

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


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose most probable class is the true one, 0 to 1.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Raises:
        DataError: there are no images.
    """
    _require_rows(labels, "accuracy")
    return float(accuracy_score(labels, probs.argmax(axis=1)))


def mean_per_class_accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of the accuracies of the classes that have images (balanced accuracy), 0 to 1.

    Classes without images are left out of the mean: nothing is known about them. `absent_classes` counts them.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Raises:
        DataError: there are no images.
    """
    _require_rows(labels, "mean per-class accuracy")
    # Macro recall over the present labels is balanced accuracy without its warning about absent classes.
    return float(recall_score(labels, probs.argmax(axis=1), labels=np.unique(labels), average="macro"))


def absent_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the ids of the classes without images."""
    return np.setdiff1d(np.arange(num_classes), labels)


def topk_accuracy(probs: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of images whose true class is among the k most probable, 0 to 1.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
        k: 1 to C - 1.

    Raises:
        DataError: there are no images, or k does not fit the number of classes.
    """
    _require_rows(labels, f"top-{k} accuracy")
    return float(topk_correct(probs, labels, k).mean())


def confidence_bins(probs: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Returns (N,) the bin of each row's highest probability; bin b covers (b/bins, (b+1)/bins]."""
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return np.digitize(probs.max(axis=1).astype(np.float64), edges, right=True)


def ece(probs: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the most probable class, 0 to 1, with equal-width bins.

    Mean over the images of |accuracy - mean confidence| of the image's bin (Guo et al. 2017, eq. 3).

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
        bins: number of equal-width bins over 0 to 1.

    Raises:
        DataError: there are no images.
    """
    _require_rows(labels, "calibration error")
    surplus = correct(probs, labels) - probs.max(axis=1).astype(np.float64)
    return float(np.abs(np.bincount(confidence_bins(probs, bins), surplus, minlength=bins)).sum() / len(labels))


def brier(probs: np.ndarray, labels: np.ndarray) -> float:
    """Brier score: mean squared error of all classes' probabilities, summed over the classes, 0 to 2 (Brier 1950).

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Raises:
        DataError: there are no images.
    """
    _require_rows(labels, "the Brier score")
    return brier_score(probs, labels).value


def macro_one_vs_rest_auc(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes present of the area under the ROC curve of the class against the rest, 0 to 1.

    Args:
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.

    Raises:
        DataError: there are no images, or all are of one class.
    """
    _require_rows(labels, "AUC")
    found = macro_auc(probs, labels)
    if found is None:
        raise DataError("AUC needs images of two classes, got one class only")
    return found.value


METRIC_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "mean_per_class_accuracy": mean_per_class_accuracy,
    "top5_accuracy": partial(topk_accuracy, k=5),
    "ece": ece,
    "brier": brier,
    "macro_auc": macro_one_vs_rest_auc,
}
"""Metric of any classifier (GENERAL_METRICS) -> function of probabilities (N, C) and labels (N,)."""

METRIC_WORDS = {
    "accuracy": "accuracy",
    "mean_per_class_accuracy": "mean accuracy per class",
    "top5_accuracy": "top-5 accuracy",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "macro_auc": "AUC (mean of the classes)",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "tpr": "true positive rate",
    "fpr": "false positive rate",
    "fnr": "false negative rate",
    "selection_rate": "selection rate",
    "auc": "AUC",
}
"""Metric name -> how it is called in tables and sentences."""

METRIC_SHORT = METRIC_WORDS | {"mean_per_class_accuracy": "mean per class", "ece": "ECE", "brier": "Brier"}
METRIC_SHORT |= {"macro_auc": "AUC", "tpr": "TPR", "fpr": "FPR", "fnr": "FNR"}
"""The same for the heads of narrow columns."""


@dataclass(frozen=True)
class Cells:
    """A metric taken apart into sums over cells of images.

    Attributes:
        values: (N,) float64 contribution of each image: right or not for rates; right minus confidence for `ece`.
        cell: (N,) the cell each image counts in.
        num_cells: number of cells.
        combine: sums and weights per cell, each (R, num_cells), to (R,) values of the metric; for `ece` to its (R,
            num_cells) signed parts, whose absolute values add up to it.
    """

    values: np.ndarray
    cell: np.ndarray
    num_cells: int
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _mean_of_cells(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    present = weights > 0
    ratios = np.divide(sums, weights, out=np.zeros_like(sums), where=present)
    return ratios.sum(axis=1) / present.sum(axis=1)


def _parts_of_cells(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return sums / weights.sum(axis=1, keepdims=True)


def metric_cells(metric: str, probs: np.ndarray, labels: np.ndarray) -> Cells:
    """Takes a metric apart; with every weight 1 the cells give METRIC_FUNCTIONS[metric] back.

    Args:
        metric: one of METRIC_FUNCTIONS.
        probs: (N, C) class probabilities.
        labels: (N,) true class ids.
    """
    if metric == "ece":
        surplus = correct(probs, labels) - probs.max(axis=1).astype(np.float64)
        return Cells(surplus, confidence_bins(probs), ECE_BINS, _parts_of_cells)
    if metric == "mean_per_class_accuracy":
        present, cell = np.unique(labels, return_inverse=True)
        return Cells(correct(probs, labels).astype(np.float64), cell, len(present), _mean_of_cells)
    right = topk_correct(probs, labels, 5) if metric == "top5_accuracy" else correct(probs, labels)
    return Cells(right.astype(np.float64), np.zeros(len(labels), np.int64), 1, _mean_of_cells)
