"""A taxonomy above the classes: how bad a mistake is.

A node is its path from the root, so that two departments that both have a "red" have two nodes of that name. Heights
count from the classes upwards: a class has height 0, the finest level 1, the coarsest K, and the root K + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def _paths(levels: Mapping[str, Sequence[str]], num_classes: int) -> np.ndarray:
    """Returns (K, C) node ids by level, coarse to fine; equal ids mean equal paths from the root."""
    ids = np.zeros((len(levels), num_classes), dtype=np.int64)
    above = [()] * num_classes
    for k, names in enumerate(levels.values()):
        above = [(*path, name) for path, name in zip(above, names, strict=True)]
        order = {path: i for i, path in enumerate(sorted(set(above)))}
        ids[k] = [order[path] for path in above]
    return ids


def ancestor_heights(levels: Mapping[str, Sequence[str]], num_classes: int) -> np.ndarray:
    """Height of the lowest common ancestor of every two classes (Bertinetto et al. 2020, section 2).

    Args:
        levels: level name -> C names, coarse to fine; K levels, may be none.
        num_classes: C.

    Returns:
        (C, C) int16: 0 on the diagonal, 1 where the finest level is shared, K + 1 where only the root is.
    """
    heights = np.full((num_classes, num_classes), len(levels) + 1, dtype=np.int16)
    for ids in _paths(levels, num_classes):
        heights -= ids[:, None] == ids[None, :]
    np.fill_diagonal(heights, 0)
    return heights


def least_severe(probs: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Decides for the class of least expected severity instead of the most probable one (CRM, Karthik et al. 2021).

    Args:
        probs: (N, C) class probabilities.
        heights: (C, C) of `ancestor_heights`.

    Returns:
        (N,) int64 class ids; the lowest id wins a tie.
    """
    # Summed in float64: rounding must not decide between classes of equal expected severity.
    return (probs.astype(np.float64) @ heights.astype(np.float64)).round(9).argmin(axis=1)
