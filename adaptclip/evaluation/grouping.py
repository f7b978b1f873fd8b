"""Which rows belong together: the same images in two predictions, the images of each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from adaptclip.errors import DataError, did_you_mean
from adaptclip.gate_rules import BETWEEN
from adaptclip.types import Predictions


class Grouped(Protocol):
    """What has groups, such as `Predictions`."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Attribute name -> N values."""
        ...


def listed(names: Iterable[str]) -> str:
    """Names in a row; between those of an intersection ("female, 60+"), which have commas of their own, semicolons."""
    named = list(map(str, names))
    return ("; " if any(", " in name for name in named) else ", ").join(named)


def align(predictions: Predictions, baseline: Predictions) -> Predictions:
    """Returns the baseline with its rows in the order of the predictions.

    Raises:
        DataError: the two do not judge the same images with the same labels and classes.
    """
    if predictions.class_names != baseline.class_names:
        raise DataError("predictions and baseline have different class names; compare models on the same classes")
    position = {row: i for i, row in enumerate(baseline.ids)}
    missing = [row for row in predictions.ids if row not in position]
    if missing or len(baseline) != len(predictions):
        example = f", for example {missing[0]!r}" if missing else ""
        raise DataError(
            f"a paired comparison needs the same images: {len(missing)} of {len(predictions)} are missing from the "
            f"baseline, which has {len(baseline)}{example}. Predict both models on the same split."
        )
    order = np.array([position[row] for row in predictions.ids], dtype=np.int64)
    different = int((baseline.labels[order] != predictions.labels).sum())
    if different:
        raise DataError(f"{different} images have another label in the baseline; predict both models on the same data")
    return replace(
        predictions, probs=baseline.probs[order], ranked=baseline.ranked, confident=baseline.confident,
        sigmoid=None if baseline.sigmoid is None else baseline.sigmoid[order], thresholds=baseline.thresholds,
    )  # fmt: skip


def group_values(predictions: Grouped, attribute: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of an attribute's groups, sorted, and (N,) the position of each image's group among them.

    An intersection, "sex × age_group", has groups such as "female, 60+". "unknown" is a group like any other.

    Raises:
        DataError: the predictions have no such attribute.
    """
    if attribute in predictions.groups:
        return encode(predictions.groups[attribute])
    parts = [group_values(predictions, name) for name in attribute.split(BETWEEN)] if BETWEEN in attribute else []
    if not parts:
        has = (
            did_you_mean(attribute, predictions.groups) if predictions.groups else "They have no group columns at all."
        )
        raise DataError(f"these predictions have no group attribute {attribute!r}. {has}")
    sizes = [len(names) for names, _ in parts]
    crossed, codes = np.unique(np.ravel_multi_index([code for _, code in parts], sizes), return_inverse=True)
    indices = np.stack(np.unravel_index(crossed, sizes), axis=1)
    labels = [tuple(parts[k][0][i] for k, i in enumerate(row)) for row in indices]
    joined = tuple(map(", ".join, labels))
    if len(set(joined)) < len(joined):  # values with commas of their own
        joined = tuple(map(BETWEEN.join, labels))
    return joined, codes


def encode(values: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the distinct values, sorted, and (N,) the position of each row's among them."""
    encoded = pa.array(values, pa.string()).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return tuple(names[i] for i in order), rank[encoded.indices.to_numpy(zero_copy_only=False)]


def group_rows(predictions: Predictions, attribute: str) -> dict[str, np.ndarray]:
    """Returns group name -> row positions, names sorted; see `group_values`.

    Raises:
        DataError: the predictions have no such attribute.
    """
    names, code = group_values(predictions, attribute)
    order = np.argsort(code, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(code, minlength=len(names)))[:-1]) if names else []
    return dict(zip(names, parts, strict=True))
