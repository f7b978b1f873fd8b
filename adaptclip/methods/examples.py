# SPDX-License-Identifier: Apache-2.0
"""What users hand to `fit` and `predict_proba`: images or features, and labels, as the data set that methods read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptclip.data.dataset import FeatureRows, FileStore, ImageDataset, MemoryStore
from adaptclip.data.fingerprints import content_digest
from adaptclip.data.given_images import Window, each_image
from adaptclip.data.label_sets import first_shown
from adaptclip.data.transforms import read_file
from adaptclip.errors import DataError, did_you_mean
from adaptclip.feature_clip import as_features, unit_rows
from adaptclip.types import Features


def as_dataset(
    x: Any, y: Any, class_names: Sequence[str], *, width: int, what: str = "X", window: Window | None = None,
    frames: str | None = None, several: bool = True,
) -> ImageDataset:  # fmt: skip
    """Returns images, or features in their place, with labels as a data set.

    Args:
        x: images, see `data.given_images`: one, or a collection of them; or (N, D) or (V, N, D) floats, which are
            features; or `Features`, or an `ImageDataset`, which bring their own labels.
        y: N labels, see `as_labels` and `as_marks`; None where nothing is known (all are then of class 0), or x brings
            them.
        class_names: C names in the order of the class ids.
        width: D that features should have.
        what: what to call x in a message.
        window: (black, white) values of images of more than 8 bits, see `decode_image`.
        frames: which of several frames, see there.
        several: whether an image may have several labels.

    Raises:
        DataError: x is none of these, or empty, of another width, or y does not fit.
    """
    if isinstance(x, ImageDataset):
        _refuse_labels(y, what, "a data set")
        if len(x.class_names) != len(class_names):
            raise DataError(
                f"{what} is a data set of {len(x.class_names)} classes, and the method was made for {len(class_names)}"
            )
        return x
    if isinstance(x, Features):
        _refuse_labels(y, what, "Features")
        labels = as_labels(x.labels, class_names, len(x), what="their labels")
        found = _of_features(x.values, labels, x.ids, class_names, width, what)
        return found if x.multi_hot is None else replace(found, multi_hot=x.multi_hot.cpu().numpy())
    marks = None if y is None else as_marks(y, class_names, _length(y))
    if marks is not None and not several:
        raise DataError(
            f"y should be one label for each image, got shape {marks.shape}; take the argmax of each row if they are "
            'one-hot. Where an image may show several classes, make the method with objective="sigmoid", if it has it'
        )
    if marks is not None:
        blank = as_dataset(x, None, class_names, width=width, what=what, window=window, frames=frames)
        if len(blank) != len(marks):
            raise DataError(f"there are {len(blank)} images and {len(marks)} rows of labels; give one for each")
        return replace(blank, labels=first_shown(marks), multi_hot=marks)
    values = _features_in(x, width)
    if values is not None:
        values = as_features(values, what, "(N, D) or (V, N, D)")
        count = values.shape[-2]
        ids = tuple(f"row {i}" for i in range(count))
        return _of_features(values, as_labels(y, class_names, count), ids, class_names, width, what)
    return replace(_of_images(x, y, class_names, what, window), frames=frames)


def as_marks(y: Any, class_names: Sequence[str], count: int, *, what: str = "y") -> np.ndarray | None:
    """Returns (N, C) int8 of labels that may be several for an image: 1 shows it, 0 does not, -1 nobody knows.

    Args:
        y: N lists of class names, or an (N, C) matrix of 0 and 1 with -1 or NaN for what nobody knows.
        class_names: C names.
        count: N.
        what: what to call them in a message.

    Returns:
        None where y has one label for each image.

    Raises:
        DataError: an unknown name (with the nearest), another shape, or other numbers.
    """
    values: Any = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y
    if not hasattr(values, "__iter__") or isinstance(values, str):
        return None
    rows = list(values.to_numpy()) if hasattr(values, "to_numpy") else values if _is_matrix(values) else list(values)
    if not _is_matrix(rows) and not any(isinstance(row, list | tuple | set | frozenset | np.ndarray) for row in rows):
        return None
    texts = (not isinstance(row, str) and hasattr(row, "__iter__") for row in rows)
    if not _is_matrix(rows) and all(texts) and all(isinstance(item, str) for row in rows for item in row):
        place = {name: c for c, name in enumerate(class_names)}
        marks = np.zeros((len(rows), len(class_names)), np.int8)
        for i, row in enumerate(rows):
            for name in row:
                if name not in place:
                    raise DataError(f"{what} has the label {name!r}, which is no class. {did_you_mean(name, place)}")
                marks[i, place[name]] = 1
        return marks
    try:
        matrix = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} should be one label for each image, or for several an ({count}, {len(class_names)}) matrix of 0 "
            "and 1 or lists of class names; got rows of another kind (lists of class ids are not taken: give names)"
        ) from error
    matrix = np.where(np.isnan(matrix), -1, matrix)
    if matrix.shape != (count, len(class_names)) or not np.isin(matrix, (-1, 0, 1)).all():
        raise DataError(
            f"{what} should be one label for each image, or for several an ({count}, {len(class_names)}) matrix of 0 "
            f"and 1 (-1 or NaN for what nobody knows) or lists of names; got shape {matrix.shape}"
            + ("" if np.isin(matrix, (-1, 0, 1)).all() else f" with {matrix.flat[0]:g} and its like")
        )
    return matrix.astype(np.int8)


def _is_matrix(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 2


def _length(values: Any) -> int:
    return len(values) if hasattr(values, "__len__") else 0


def as_labels(y: Any, class_names: Sequence[str], count: int, *, what: str = "y") -> np.ndarray:
    """Returns (N,) int64 class ids of labels.

    Args:
        y: N class ids from 0, or N names among `class_names`; None for zeros.
        class_names: C names.
        count: N.
        what: what to call them in a message.

    Raises:
        DataError: another number of them, an id out of range, an unknown name (with the nearest), or several labels
            for an image.
    """
    if y is None:
        return np.zeros(count, dtype=np.int64)
    values = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if values.ndim != 1:
        hint = "; take the argmax of each row if they are one-hot" if values.ndim == 2 else ""
        raise DataError(f"{what} should be ({count},), one label for each image, got shape {values.shape}{hint}")
    if len(values) != count:
        raise DataError(f"there are {count} images and {len(values)} labels; give one for each")
    if values.dtype.kind in "OUS":
        id_of = {name: i for i, name in enumerate(class_names)}
        for value in values.tolist():
            if not isinstance(value, str) or value not in id_of:
                has = did_you_mean(str(value), id_of, lead="The classes are")
                raise DataError(f"{what} has the label {value!r}, which is no class. {has}")
        return np.array([id_of[value] for value in values.tolist()], dtype=np.int64)
    ids = values.astype(np.int64) if values.dtype.kind in "biuf" and np.isfinite(values).all() else None
    if ids is None or not np.array_equal(ids, values):
        raise DataError(f"{what} should be class ids or class names, got {values.dtype} such as {values[:3].tolist()}")
    if count and (ids.min() < 0 or ids.max() >= len(class_names)):
        raise DataError(
            f"{what} has class ids {ids.min()} to {ids.max()}; with {len(class_names)} classes 0 to "
            f"{len(class_names) - 1} are allowed"
        )
    return ids


def shots_of(images: ImageDataset) -> int:
    """Returns k where every class has exactly k images, else 0, which stands for "all images"."""
    counts = images.class_counts()
    return int(counts[0]) if len(counts) and counts.min() == counts.max() else 0


class GivenFeatures:
    """Features that are at hand, as the source of a support set: there is nothing to encode and nothing to crop."""

    def get(self, backbone: Any, dataset: ImageDataset, *, views: int = 0, **_: Any) -> Features:
        """Returns the features of a data set that holds them: of the evaluation transform all views that were given."""
        store = dataset.store
        assert isinstance(store, FeatureRows)
        values = torch.from_numpy(store.values[:, dataset.rows])
        return Features.of(values, dataset)


def _of_features(
    values: torch.Tensor, labels: np.ndarray, ids: Sequence[str], class_names: Sequence[str], width: int, what: str
) -> ImageDataset:
    values = values[None] if values.ndim == 2 else values
    if values.shape[-1] != width:
        raise DataError(
            f"{what} has features {values.shape[-1]} wide, and this CLIP has {width}; they come from another model"
        )
    store = FeatureRows(unit_rows(values).numpy(), np.zeros((0, width), np.float32), (), 1.0, None, what)
    stamps = tuple(content_digest(store.read(row)) for row in range(len(ids)))
    return ImageDataset(store, np.arange(len(ids)), tuple(class_names), tuple(ids), labels, stamps)


def _of_images(x: Any, y: Any, class_names: Sequence[str], what: str, window: Window | None) -> ImageDataset:
    names, images = [], []
    for given in each_image(x, what):
        names.append(given.name)
        images.append(given.encoded(window))
    paths = [image for image in images if isinstance(image, Path)]
    if len(paths) == len(images):
        store: FileStore | MemoryStore = FileStore(paths)
    else:
        store = MemoryStore([read_file(image) if isinstance(image, Path) else image for image in images], names)
    labels = as_labels(y, class_names, len(images))
    names = [store.where(i) for i in range(len(images))]
    ids = names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names)]
    stamps = tuple(content_digest(store.read(i)) for i in range(len(ids)))
    return ImageDataset(store, np.arange(len(ids)), tuple(class_names), tuple(ids), labels, stamps, window=window)


def _features_in(x: Any, width: int) -> Any:
    """Floats that stand for features: an array or tensor, a table, or nested lists; None where x is something else.

    A (H, W, 3) or (H, W, 4) array of floats is an image, unless features are so narrow.
    """
    if hasattr(x, "to_numpy") and not hasattr(x, "to_pylist"):
        x = x.to_numpy()
    if isinstance(x, list | tuple) and x:
        row = x[0]
        if isinstance(row, np.ndarray | torch.Tensor) and row.ndim == 1 and _is_floating(row):
            return torch.stack([torch.as_tensor(each) for each in x]) if len({len(each) for each in x}) == 1 else None
        row = row[0] if isinstance(row, list | tuple) and row and isinstance(row[0], list | tuple) else row
        return np.asarray(x) if isinstance(row, list | tuple) and row and isinstance(row[0], float) else None
    if not isinstance(x, torch.Tensor | np.ndarray) or not _is_floating(x) or x.ndim > 3:
        return None
    return None if x.ndim == 3 and x.shape[-1] in (3, 4) and width != x.shape[-1] else x


def _is_floating(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else x.dtype.kind == "f"


def _refuse_labels(y: Any, what: str, brings: str) -> None:
    if y is not None:
        raise DataError(f"{what} is {brings} and brings its own labels; leave y out")
