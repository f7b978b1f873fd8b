# SPDX-License-Identifier: Apache-2.0
"""What the methods share that compute on the whole support set at once: its checks, and the choice on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import ConfigError, DataError
from adaptclip.methods.base import check_features

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.types import Features


@dataclass(frozen=True)
class Choice:
    """Hyper-parameters chosen on validation images, and how clear the choice was.

    Attributes:
        values: name -> chosen value.
        accuracy: share of validation images that they classify rightly, 0 to 1; of images that may show several classes
            the mean area under the ROC curve of the classes.
        loss: their mean cross-entropy in nats.
        grid: name -> lowest candidate, highest candidate and number of different ones.
        num_images: validation images.
        num_tried: candidates on the grid.
        num_tied: candidates of that accuracy, the chosen one included; many mean that the images decide little.
        of_classes: whether it is that area.
    """

    values: dict[str, float]
    accuracy: float
    loss: float
    grid: dict[str, tuple[float, float, int]]
    num_images: int
    num_tried: int
    num_tied: int
    of_classes: bool = False

    def info(self) -> dict[str, Any]:
        """Returns what to tell of it: "chosen" and "validation_used_for"."""
        return {"chosen": dict(self.values), "validation_used_for": self.describe()}

    def describe(self) -> str:
        """Says among what was chosen, and by how many images, for a report."""
        ranges = [f"{name} {low:g} to {high:g} ({count})" for name, (low, high, count) in self.grid.items()]
        reached = f"reached by {self.num_tied} of {self.num_tried}; of these"
        if self.of_classes:
            what = f"mean AUC of the classes on {self.num_images} images ({self.accuracy:.3f}, {reached} the first)"
        else:
            share = f"{100 * self.accuracy:.1f} %"
            what = f"accuracy on {self.num_images} images ({share}, {reached} the lowest cross-entropy)"
        return f"{' × '.join(ranges)}: the highest {what}"


def mean_auc(logits: Tensor, positive: Tensor, known: Tensor | None) -> float:
    """Mean over the classes of the area under the ROC curve, from ranks; equal logits count half.

    Args:
        logits: (N, C).
        positive: (N, C) bool, whether an image shows the class.
        known: (N, C) bool, whether that is known; None where all is.

    Returns:
        0 to 1; 0.5 where no class has images with and without it.
    """
    from scipy.stats import rankdata

    areas = []
    for c in range(logits.shape[1]):
        rows = slice(None) if known is None else known[:, c]
        scores, shown = logits[rows, c].numpy(), positive[rows, c].numpy()
        count = int(shown.sum())
        if 0 < count < len(shown):
            above = float(rankdata(scores)[shown].sum()) - count * (count + 1) / 2
            areas.append(above / (count * (len(shown) - count)))
    return float(np.mean(areas)) if areas else 0.5


def binary_loss(logits: Tensor, positive: Tensor, known: Tensor | None) -> float:
    """Mean binary cross-entropy of (N, C) logits in nats, over all pairs of image and class that are known."""
    losses = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return float(losses.mean() if known is None else losses[known].mean())


def choose_by_auc(
    candidates: Iterable[tuple[dict[str, float], Tensor]], positive: Tensor, known: Tensor | None
) -> Choice:
    """Takes the candidate with the highest mean area under the ROC curve (`mean_auc`), the first among equals.

    A bias for each class changes nothing of it, and so can be set afterwards.

    Args:
        candidates: pairs of hyper-parameters and the (N, C) logits they give.
        positive: (N, C) bool, N at least 1.
        known: (N, C) bool, whether that is known; None where all is.

    Raises:
        ConfigError: there is no candidate.
    """
    score = partial(mean_auc, positive=positive, known=known)
    return _choose(candidates, score, lambda logits: 0.0, len(positive), of_classes=True)


def choose_by_accuracy(candidates: Iterable[tuple[dict[str, float], Tensor]], labels: Tensor) -> Choice:
    """Takes the candidate with the highest accuracy; among equals the lowest mean cross-entropy, then the first.

    A few validation images give few different accuracies, so many candidates tie. The published searches keep the
    first they meet; the cross-entropy is a finer judgement by the same images.

    Args:
        candidates: pairs of hyper-parameters and the (N, C) logits they give.
        labels: (N,) class ids, N at least 1.

    Raises:
        ConfigError: there is no candidate.
    """
    return _choose(
        candidates, lambda logits: int((logits.argmax(dim=1) == labels).sum()) / len(labels),
        lambda logits: float(F.cross_entropy(logits, labels)), len(labels),
    )  # fmt: skip


def _choose(
    candidates: Iterable[tuple[dict[str, float], Tensor]],
    score_of: Callable[[Tensor], float],
    loss_of: Callable[[Tensor], float],
    num_images: int,
    *,
    of_classes: bool = False,
) -> Choice:
    best: tuple[float, float, dict[str, float]] | None = None
    seen: dict[str, set[float]] = {}
    tried = tied = 0
    for values, logits in candidates:
        tried += 1
        for name, value in values.items():
            seen.setdefault(name, set()).add(value)
        score = score_of(logits)
        if best is not None and score < best[0]:
            continue
        loss = loss_of(logits)
        if best is None or score > best[0]:
            best, tied = (score, loss, values), 1
        else:
            best, tied = (score, loss, values) if loss < best[1] else best, tied + 1
    if best is None:
        raise ConfigError("the grid of candidates is empty; give at least one value of each hyper-parameter")
    score, loss, values = best
    grid = {name: (min(found), max(found), len(found)) for name, found in seen.items()}
    return Choice(values, score, loss, grid, num_images, tried, tied, of_classes)


def support_rows(features: Features, encoder: ClipBackbone, num_classes: int) -> tuple[Tensor, Tensor]:
    """Checks training features and returns them in double precision, for closed forms.

    Args:
        features: of the training images, (V, N, D).
        encoder: the model that should have made them.
        num_classes: C.

    Returns:
        (V, N, D) float64 on the CPU, and the (N,) labels.

    Raises:
        DataError: there are no images, a label is out of range, or the features come from another backbone.
    """
    check_features(features, encoder)
    if len(features) == 0:
        raise DataError("there are no training images to fit on; draw at least one (shots of the split)")
    low, high = int(features.labels.min()), int(features.labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"training labels run from {low} to {high}; with {num_classes} classes 0..{num_classes - 1}")
    return features.values.detach().cpu().double(), features.labels.cpu()


def validation_rows(features: Features, encoder: ClipBackbone, num_classes: int) -> tuple[Tensor, Tensor]:
    """Checks validation features and returns them in double precision.

    Args:
        features: of the validation images, (1, N, D), evaluation transform.
        encoder: the model that should have made them.
        num_classes: C.

    Returns:
        (N, D) float64 on the CPU, and the (N,) labels.

    Raises:
        DataError: there are no images, there are augmented views, a label is out of range, or the features come from
            another backbone.
    """
    if len(features) == 0:
        raise DataError(
            "there are no validation images to choose hyper-parameters on; keep some (val_shots of the split, or a "
            "validation part in the card), or keep the paper's fixed values and do not call `choose`"
        )
    values, labels = support_rows(features, encoder, num_classes)
    if len(values) != 1:
        raise DataError(
            f"hyper-parameters are chosen on the evaluation transform, one view per image; got {len(values)} views"
        )
    return values[0], labels


def check_factor(name: str, value: float) -> float:
    """Returns a hyper-parameter as a float. Raises ConfigError unless it is finite and at least 0."""
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name} must be a finite number from 0 up, got {value}")
    return float(value)


def class_means(rows: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the (C, D) class means of (R, D) rows, zero for a class without rows, and the (C,) numbers of rows."""
    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, rows.shape[1], dtype=rows.dtype).index_add_(0, labels, rows)
    return sums / counts.clamp(min=1)[:, None], counts
