# SPDX-License-Identifier: Apache-2.0
"""What users hand to `fit` and `predict_proba`: images or features, and labels, as the data set that methods read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adaptclip.data.dataset import FeatureRows, FileStore, ImageDataset, MemoryStore
from adaptclip.data.fingerprints import content_digest
from adaptclip.errors import DataError, did_you_mean
from adaptclip.feature_clip import as_features, unit_rows
from adaptclip.types import Features

ACCEPTED = (
    "a list of images (paths, PIL images, encoded bytes, or (H, W) or (H, W, 3) uint8 arrays), or features "
    "(N, D) or (V, N, D) as an array or tensor of floats"
)


def as_dataset(x: Any, y: Any, class_names: Sequence[str], *, width: int, what: str = "X") -> ImageDataset:
    """Returns images, or features in their place, with labels as a data set.

    Args:
        x: see `ACCEPTED`; or `Features`, or an `ImageDataset`, which bring their own labels.
        y: N labels, see `as_labels`; None where nothing is known (all are then of class 0), or x brings them.
        class_names: C names in the order of the class ids.
        width: D that features should have.
        what: what to call x in a message.

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
        return _of_features(x.values, labels, x.ids, class_names, width, what)
    x = _as_array(x)
    if isinstance(x, torch.Tensor | np.ndarray) and x.ndim != 4 and _is_floating(x):
        values = as_features(x, what, "(N, D) or (V, N, D)")
        count = values.shape[-2]
        ids = tuple(f"row {i}" for i in range(count))
        return _of_features(values, as_labels(y, class_names, count), ids, class_names, width, what)
    store, stamps = _images(x, what)
    labels = as_labels(y, class_names, len(stamps))
    names = tuple(store.where(i) for i in range(len(stamps)))
    ids = names if len(set(names)) == len(names) else tuple(f"{i}: {name}" for i, name in enumerate(names))
    return ImageDataset(store, np.arange(len(ids)), tuple(class_names), ids, labels, tuple(stamps))


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


def shots_of(labels: np.ndarray, num_classes: int) -> int:
    """Returns k where every class has exactly k images, else 0, which stands for "all images"."""
    counts = np.bincount(labels, minlength=num_classes)
    return int(counts[0]) if len(counts) and counts.min() == counts.max() else 0


class GivenFeatures:
    """Features that are at hand, as the source of a support set: there is nothing to encode and nothing to crop."""

    def get(self, backbone: Any, dataset: ImageDataset, *, views: int = 0, **_: Any) -> Features:
        """Returns the features of a data set that holds them: of the evaluation transform all views that were given."""
        store = dataset.store
        assert isinstance(store, FeatureRows)
        values = torch.from_numpy(store.values[:, dataset.rows])
        return Features(values, torch.as_tensor(dataset.labels, dtype=torch.int64), tuple(dataset.ids))


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


def _images(x: Any, what: str) -> tuple[FileStore | MemoryStore, list[str]]:
    """Returns a store of images, and the digest of each; images in memory take the same way as files."""
    if isinstance(x, str | Path | bytes | Image.Image | dict | set) or not hasattr(x, "__iter__"):
        raise DataError(f"{what} should be {ACCEPTED}; got {type(x).__name__}")
    items = list(x)
    if not items:
        raise DataError(f"{what} is empty; give at least one image")
    if all(isinstance(item, str | Path) for item in items):
        store: FileStore | MemoryStore = FileStore([Path(item) for item in items])
    else:
        store = MemoryStore(
            [_encoded(item, f"{what}[{i}]") for i, item in enumerate(items)], list(map(str, range(len(items))))
        )
    return store, [content_digest(store.read(i)) for i in range(len(items))]


def _encoded(item: Any, what: str) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | Path):
        return FileStore([Path(item)]).read(0)
    if isinstance(item, torch.Tensor):
        item = item.numpy()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] == 3)):
            raise DataError(
                f"{what} should be an image of (H, W) or (H, W, 3) uint8, got {item.dtype} {item.shape}; transformed "
                "pixels are not taken, because training crops images anew"
            )
        item = Image.fromarray(item)
    if not isinstance(item, Image.Image):
        raise DataError(f"{what} should be a path, a PIL image, bytes or a uint8 array, got {type(item).__name__}")
    return encoded_image(item)


def encoded_image(image: Image.Image) -> bytes:
    """Returns an image in memory as the bytes of a file without loss, so that it is decoded like any other."""
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if image.mode in ("F", "I", "CMYK") else "PNG", exif=image.getexif())
    return buffer.getvalue()


def _as_array(x: Any) -> Any:
    """Columns of a table and nested lists of numbers as an array; anything else as it is."""
    if hasattr(x, "to_numpy"):
        return x.to_numpy()
    row = x[0] if isinstance(x, list | tuple) and x else None
    row = row[0] if isinstance(row, list | tuple) and row and isinstance(row[0], list | tuple) else row
    return np.asarray(x) if isinstance(row, list | tuple) and row and isinstance(row[0], float) else x


def _is_floating(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else x.dtype.kind == "f"


def _refuse_labels(y: Any, what: str, brings: str) -> None:
    if y is not None:
        raise DataError(f"{what} is {brings} and brings its own labels; leave y out")
