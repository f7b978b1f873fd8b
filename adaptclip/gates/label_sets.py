# SPDX-License-Identifier: Apache-2.0
"""What people hand to `judge` where an image may show several classes, or none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.prediction_files import shares


def shows_several(y_true: Any) -> bool:
    """Whether labels are sets of classes: a table with a column for each class, or a list of names for each image."""
    shape = getattr(y_true, "shape", None)
    if shape is not None and len(shape) == 2:
        return shape[1] > 1
    rows = y_true.tolist() if hasattr(y_true, "tolist") else y_true
    return any(isinstance(row, list | tuple | set | frozenset) and _is_set(row) for row in rows)


def _is_set(row: Any) -> bool:
    """Whether one entry of a list is a set of names, or a row of a table with two columns or more."""
    return all(isinstance(name, str) for name in row) or len(row) > 1


def label_sets(
    y_true: Any, names: tuple[str, ...] | None, shape: tuple[int, ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads sets of classes.

    Args:
        y_true: (N, C) 1, 0, and NaN or -1 where that is not known; or N lists of names.
        names: C class names in the order of the probabilities' columns, or None.
        shape: (N, C) of the probabilities.

    Returns:
        Fields of `Predictions`: "labels", "positive" and "known"; and the class names.

    Raises:
        DataError: the shapes do not fit, a name is unknown, or a cell says neither yes nor no nor unknown.
    """
    columns = getattr(y_true, "columns", None)
    values = y_true.detach().cpu() if hasattr(y_true, "detach") else y_true
    rows = values.tolist() if hasattr(values, "tolist") else values
    if columns is None and all(isinstance(name, str) for row in rows for name in row):
        shown, names = _of_names(rows, names, shape), names
    else:
        shown, names = _of_table(values, names, shape)
    if names is None:
        names = tuple(f"class {c}" for c in range(shape[1]))
    if len(names) != shape[1]:
        raise DataError(f"there are {len(names)} class names and {shape[1]} columns of probabilities")
    known = None if (shown >= 0).all() else shown >= 0
    return {"labels": (shown == 1).argmax(axis=1), "positive": shown == 1, "known": known}, names


def _of_names(rows: Sequence[Any], names: tuple[str, ...] | None, shape: tuple[int, ...]) -> np.ndarray:
    """(N, C) int8 of lists of names."""
    if names is None:
        raise DataError(
            "labels are lists of names, and nothing says which column of the probabilities is of which class; give "
            "class_names in the order of the columns"
        )
    if len(rows) != shape[0]:
        raise DataError(f"there are {len(rows):,} lists of labels and {shape[0]:,} rows of probabilities")
    place = {name: c for c, name in enumerate(names)}
    shown = np.zeros((len(rows), len(names)), np.int8)
    for i, row in enumerate(rows):
        for name in row:
            if name not in place:
                has = did_you_mean(name, names, lead="The classes are")
                raise DataError(f"the label {name!r} is no class. {has}")
            shown[i, place[name]] = 1
    return shown


def _of_table(
    values: Any, names: tuple[str, ...] | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """(N, C) int8 of a table of 1, 0, and NaN or -1; its columns in the order of `names`."""
    columns = getattr(values, "columns", None)
    if columns is not None:
        own = tuple(map(str, columns))
        if names is not None and sorted(own) != sorted(names):
            strange = next((name for name in own if name not in names), own[0])
            has = did_you_mean(strange, names, lead="The classes are")
            raise DataError(f"the columns of y_true are not the classes: {strange!r}. {has}")
        names = names or own
        values = values[[columns[own.index(name)] for name in names]]
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            "y_true should be one label for each image; or, where an image may show several classes, (N, C) 1 and 0, "
            f"or a list of class names for each: {error}"
        ) from error
    if array.shape != tuple(shape):
        raise DataError(
            f"y_true says for each class whether an image shows it, and so has the shape of the probabilities; got "
            f"{array.shape} and {tuple(shape)}"
        )
    array = np.nan_to_num(array, nan=-1)
    odd = np.argwhere(~np.isin(array, (0, 1, -1)))
    if len(odd):
        row, c = odd[0]
        raise DataError(
            f"y_true holds 1, 0, and NaN or -1 where it is not known whether an image shows a class; got "
            f"{array[row, c]:g} in row {row}, column {c}"
        )
    return array.astype(np.int8), names


def given_probabilities(probs: np.ndarray, *, several: bool) -> dict[str, np.ndarray]:
    """Fields of `Predictions`: "probs"; of single classes also "sigmoid", of which "probs" are the shares.

    Raises:
        DataError: of one class per image rows do not sum to 1, though they might be probabilities of single classes.
    """
    if several:
        return {"probs": shares(probs), "sigmoid": probs}
    within = bool(len(probs) and ((probs >= 0) & (probs <= 1)).all())
    if within and (np.abs(probs.sum(axis=1, dtype=np.float64) - 1) > 5e-3).mean() > 0.5:
        raise DataError(
            "most rows of probabilities do not sum to 1, and y_true has one class for each image. If an image may show "
            "several classes, or none, and the model says yes or no for each, give y_true as (N, C) 1 and 0; otherwise "
            "the rows need a softmax"
        )
    return {"probs": probs}


def chosen_thresholds(given: Any, names: Sequence[str], *, several: bool) -> np.ndarray | None:
    """(C,) thresholds from numbers, a mapping, or one number; None for none.

    Raises:
        DataError: images have one class each, a class is missing, or a name is unknown.
    """
    if given is None:
        return None
    if not several:
        raise DataError(
            "thresholds name classes by themselves, and y_true has one class for each image; for a two-sided question "
            'give outcomes=[{"positive": [CLASS], "threshold": 0.3}]'
        )
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise DataError(f"thresholds: nothing is {name!r}. {did_you_mean(str(name), names)}")
        lacking = [name for name in names if name not in given]
        if lacking:
            raise DataError(f"thresholds lack {', '.join(map(repr, lacking[:5]))}; each class needs one")
        given = [given[name] for name in names]
    values = np.asarray(given, dtype=np.float64)
    return np.full(len(names), float(values)) if values.ndim == 0 else values
