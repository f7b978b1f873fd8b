"""The base-to-new protocol: learn half of the classes, and judge the other half by its names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptclip.data.dataset import DomainData, ImageDataset
from adaptclip.errors import SplitError


def base_and_new(data: DomainData) -> tuple[DomainData, DomainData]:
    """Cuts the classes of a data set in two: the first ceil(C / 2) label ids are base, the rest new.

    The protocol of CoCoOp (Zhou et al. 2022, arXiv:2203.05557, sec. 4.1). Label ids are numbered anew in either half.

    Raises:
        SplitError: there is only one class.
    """
    names = data.class_names
    if len(names) < 2:
        raise SplitError(f"base and new classes need at least two classes, card {data.card.name} has {len(names)}")
    half = -(-len(names) // 2)
    return select_classes(data, range(half)), select_classes(data, range(half, len(names)))


def select_classes(data: DomainData, classes: Sequence[int]) -> DomainData:
    """Returns the images of some classes (old label ids, rising), numbered 0, 1, … in that order."""
    parts = {name: _of_classes(part, classes) for name, part in data.parts.items()}
    return replace(data, class_names=tuple(data.class_names[c] for c in classes), **parts)


def _of_classes(images: ImageDataset, classes: Sequence[int]) -> ImageDataset:
    new_id = np.full(len(images.class_names), -1)
    new_id[list(classes)] = np.arange(len(classes))
    kept = images.select(np.flatnonzero(new_id[images.labels] >= 0))
    return replace(
        kept,
        labels=new_id[kept.labels],
        class_names=tuple(images.class_names[c] for c in classes),
        levels={name: tuple(values[c] for c in classes) for name, values in images.levels.items()},
    )


def harmonic_mean(base: float, new: float) -> float:
    """Returns 2 base new / (base + new), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0
