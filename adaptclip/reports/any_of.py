# SPDX-License-Identifier: Apache-2.0
"""Outcomes of images that may show several classes, or none: any of some classes, where that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adaptclip.gate_rules import ARGMAX, Outcome
from adaptclip.metrics.judged import Marks

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

_MOST_SHOWN = 5
"""So many thresholds of an outcome stand in a sentence."""


def marks_of(predictions: Predictions) -> Marks | None:
    """Yes or no for each class, where the model answers so."""
    probs = predictions.sigmoid
    if probs is None:
        return None
    positive = predictions.positive
    if positive is None:
        positive = predictions.labels[:, None] == np.arange(len(predictions.class_names))
    least = predictions.thresholds
    named = probs >= (0.5 if least is None else least)
    return Marks(probs, positive, named, predictions.known, predictions.several)


def any_of(predictions: Predictions, outcome: Outcome, classes: np.ndarray) -> Predictions:
    """Two sides of images that may show several classes: any of `classes` (ids), or none of them; see `two_sided`."""
    marks = marks_of(predictions)
    assert marks is not None  # `Predictions` has seen to that
    rows = np.flatnonzero(_told(marks, classes))
    given = marks.probs[np.ix_(rows, classes)].max(axis=1)
    side = marks.named[np.ix_(rows, classes)].any(axis=1)
    if outcome.threshold is not None:
        side = given.astype(np.float64) > outcome.threshold
    elif outcome.rule == ARGMAX:  # what a false alarm weighs (net benefit) follows from the threshold that decides
        least = predictions.thresholds
        used = np.unique(np.array([0.5]) if least is None else least[classes])
        if len(used) == 1 and 0 < used[0] < 1:
            outcome = outcome.model_copy(update={"threshold": float(used[0])})
    return replace(
        predictions,
        ids=tuple(predictions.ids[i] for i in rows),
        labels=marks.positive[np.ix_(rows, classes)].any(axis=1).astype(np.int64),
        probs=np.stack([1 - given, given], axis=1).astype(np.float32),
        class_names=(f"not {outcome.name}", outcome.name),
        groups={name: tuple(column[i] for i in rows) for name, column in predictions.groups.items()},
        clusters=None if predictions.clusters is None else tuple(predictions.clusters[i] for i in rows),
        files=None if predictions.files is None else tuple(predictions.files[i] for i in rows),
        features=None if predictions.features is None else predictions.features[rows],
        decided=side.astype(np.int64), asked=outcome, levels={}, outcomes=(), sigmoid=None, positive=None, known=None,
        thresholds=None, fixed_classes=False, strata=None, ranked=None,
    )  # fmt: skip


def _told(marks: Marks, classes: np.ndarray) -> np.ndarray:
    """(N,) bool, whether it is known if an image shows any of `classes` (ids)."""
    return np.any(marks.positive[:, classes], axis=1) | np.all(marks.certain[:, classes], axis=1)


def rows_asked(predictions: Predictions, outcome: Outcome) -> np.ndarray | None:
    """Positions of the images that `two_sided` has a row for; None where those are all."""
    marks = marks_of(predictions) if predictions.known is not None else None
    if marks is None:
        return None
    values = predictions.class_names if outcome.level is None else predictions.levels[outcome.level]
    told = _told(marks, np.flatnonzero(np.isin(np.asarray(values, dtype=str), outcome.positive)))
    return None if told.all() else np.flatnonzero(told)


def among(asked: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Where those of `rows` that are in `asked` (`rows_asked`) stand in it, in rising order of `rows`."""
    if asked is None:
        return rows
    place = np.searchsorted(asked, rows)
    there = np.minimum(place, len(asked) - 1) if len(asked) else place
    return place[asked[there] == rows] if len(asked) else np.zeros(0, np.int64)


def finding_outcome(predictions: Predictions, name: str) -> Outcome:
    """The outcome "shows the class `name`", as it is declared among the predictions' outcomes or without a rule."""
    declared = (o for o in predictions.outcomes if o.level is None and o.positive == (name,))
    return next(declared, Outcome(positive=(name,)))


def rule_words(predictions: Predictions, outcome: Outcome) -> str:
    """How an outcome of these predictions is decided, in words."""
    if not predictions.several or outcome.rule != ARGMAX:
        return outcome.rule_words
    least = predictions.thresholds
    values = predictions.class_names if outcome.level is None else predictions.levels[outcome.level]
    own = [0.5 if least is None else float(least[c]) for c, value in enumerate(values) if value in outcome.positive]
    shown = ", ".join(f"{value:.3g}" for value in own[:_MOST_SHOWN]) + ", …" * (len(own) > _MOST_SHOWN)
    return f"named from a probability of {shown}" + "; positive where any of them is named" * (len(own) > 1)
