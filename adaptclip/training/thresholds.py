# SPDX-License-Identifier: Apache-2.0
"""The probability from which a class is named, for each class by itself, chosen on validation images.

Never choose it on images that are then judged: such a threshold flatters every rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adaptclip.errors import DataError

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

RuleKind = Literal["f1", "sensitivity", "fixed"]


@dataclass(frozen=True)
class ThresholdRule:
    """How the probability from which a class is named is chosen, for each class by itself.

    Attributes:
        kind: "f1" is best on the validation images, "sensitivity" finds a wanted share of the positive ones, "fixed" is
            a number.
        value: the wanted sensitivity, above 0 to 1, or the number, 0 to 1; not used by "f1".
    """

    kind: RuleKind = "f1"
    value: float = 0.5

    def __str__(self) -> str:
        return {"f1": "f1", "sensitivity": f"sensitivity={self.value:g}", "fixed": f"{self.value:g}"}[self.kind]


FALLBACK = 0.5
"""Threshold of a class that the validation images say nothing of."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of C classes, and what they were chosen on.

    Attributes:
        rule: in words, as in `--objective sigmoid:RULE`.
        values: (C,) float64, 0 to 1; a class is named where its probability is at least this.
        num_images: validation images.
        positives: (C,) int64, images of each class among them (those known to show it).
        fallbacks: classes left at FALLBACK, because no validation image is known to show it, or none not to.
    """

    rule: str
    values: np.ndarray
    num_images: int
    positives: np.ndarray
    fallbacks: tuple[str, ...] = ()

    @property
    def is_chosen(self) -> bool:
        """Whether validation images chose them; a number for all classes was only stated."""
        return self.num_images > 0 and (self.rule == "f1" or self.rule.startswith("sensitivity="))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: "rule", "values", "num_images", "positives", "fallbacks"."""
        listed = {"values": self.values.tolist(), "positives": self.positives.tolist()}
        return {**vars(self), **listed, "fallbacks": list(self.fallbacks)}

    @classmethod
    def from_dict(cls, info: Mapping[str, Any]) -> Thresholds:
        """Undoes `to_dict`."""
        arrays = {"values": np.array(info["values"], float), "positives": np.array(info["positives"], np.int64)}
        return cls(**{**info, **arrays, "fallbacks": tuple(info["fallbacks"])})


def even_thresholds(class_names: Sequence[str]) -> Thresholds:
    """Returns FALLBACK for every class, chosen on no image."""
    return choose_thresholds(None, class_names, ThresholdRule("fixed", FALLBACK))


def choose_thresholds(validation: Predictions | None, class_names: Sequence[str], rule: ThresholdRule) -> Thresholds:
    """Chooses a threshold for each class on the validation images.

    Args:
        validation: the judged model on images neither trained on nor judged, with the probabilities of the single
            classes; None where there are none, and every class falls back.
        class_names: C names.
        rule: what a threshold is to do.

    Raises:
        DataError: the predictions lack the probabilities of the single classes, or are of other classes.
    """
    num_classes, shown, absent = len(class_names), None, None
    if validation is None or len(validation) == 0:
        positives, images = np.zeros(num_classes, np.int64), 0
    elif validation.sigmoid is None or validation.class_names != tuple(class_names):
        raise DataError("thresholds are chosen on the sigmoid probabilities of these classes, which are not there")
    else:
        shown, absent = _sides(validation)
        positives, images = shown.sum(axis=0), len(validation)
    if rule.kind == "fixed":
        return Thresholds(str(rule), np.full(num_classes, rule.value), images, positives)
    values = np.full(num_classes, FALLBACK)
    usable = np.zeros(num_classes, bool)
    if shown is not None and absent is not None and validation is not None and validation.sigmoid is not None:
        usable = np.any(shown, axis=0) & np.any(absent, axis=0)
        if usable.any():
            known = shown[:, usable] | absent[:, usable]
            values[usable] = best_thresholds(validation.sigmoid[:, usable], shown[:, usable], rule, known)
    left = tuple(name for name, fits in zip(class_names, usable, strict=True) if not fits)
    return Thresholds(str(rule), values, images, positives, left)


def _sides(validation: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) bool, which classes the images are known to show, and which not to."""
    if validation.positive is None:
        shown = validation.labels[:, None] == np.arange(len(validation.class_names))
        return shown, ~shown
    return validation.positive, ~validation.positive if validation.known is None else (
        validation.known & ~validation.positive
    )


def best_thresholds(
    probs: np.ndarray, positive: np.ndarray, rule: ThresholdRule, known: np.ndarray | None = None
) -> np.ndarray:
    """Best threshold of each class: half way between the lowest probability that is named and the next below it.

    "f1" takes the highest F1, and of equal ones the highest threshold; "sensitivity" the highest threshold at which the
    wanted share of the positive images is named. Images of equal probability are named together. Below the lowest
    probability the next one is 0.

    Args:
        probs: (N, C) probabilities, 0 to 1.
        positive: (N, C) bool; every class has one that is and one that is not.
        rule: "f1" or "sensitivity".
        known: (N, C) bool, False where it is not known whether the image is one: it counts nowhere for that class. None
            where all is known.

    Returns:
        (C,) float64.
    """
    if known is not None and not known.all():
        columns = [(probs[own, c], positive[own, c]) for c, own in enumerate(known.T)]
        return np.array([best_thresholds(p[:, None], shown[:, None], rule)[0] for p, shown in columns])
    order = np.argsort(-probs, axis=0, kind="stable")
    falling = np.take_along_axis(probs, order, axis=0).astype(np.float64)
    hits = np.cumsum(np.take_along_axis(positive, order, axis=0), axis=0)
    named = np.arange(1, len(probs) + 1)[:, None]
    below = np.vstack([falling[1:], np.zeros(probs.shape[1])])
    # A cut within equal probabilities cannot be made; one below the last is made even where that is 0.
    possible = falling > below
    possible[-1] = True
    if rule.kind == "f1":
        score = np.where(possible, 2 * hits / (named + hits[-1]), -1.0)
        best = score.argmax(axis=0)  # the first of equal ones is the highest threshold
    else:
        wanted = np.ceil(rule.value * hits[-1] - 1e-9)
        best = (possible & (hits >= wanted)).argmax(axis=0)
    column = np.arange(probs.shape[1])
    return (falling[best, column] + below[best, column]) / 2
