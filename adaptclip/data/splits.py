"""Which image plays which part: as the source says, or drawn here without tearing apart what belongs together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from adaptclip.data.card_block import PARTS, Splits
from adaptclip.errors import SplitError, did_you_mean
from adaptclip.storage import digest

UNUSED = ""
"""The part of a row that the card does not use."""


def named_parts(splits: Splits | None, source_splits: Sequence[str]) -> tuple[str, ...]:
    """Returns each row's part from the names of the splits it lies in.

    Args:
        splits: the card's names of its parts; None stands for "train", "validation" and "test".
        source_splits: N names of source splits.

    Returns:
        N parts; UNUSED for rows of a split that the card does not name.

    Raises:
        SplitError: there is no row for the training or the test part; the former only where the card names one.
    """
    rule = splits or Splits()
    names, part_of = rule.names, rule.parts
    parts = tuple(part_of.get(name, UNUSED) for name in source_splits)
    for part in ("train", "test"):
        if part in names and part not in parts:
            found = Counter(source_splits)
            raise SplitError(
                f"no image is in the split {names[part]!r}, which the card takes for {part}. "
                f"{did_you_mean(names[part], found)} Name them under `splits:`, or let a split be made with "
                "`splits: {fractions: {train: 0.6, validation: 0.1, test: 0.3}}`"
            )
    return parts


def units(count: int, *, keys: Iterable[Sequence[str]], pairs: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Groups rows that must stay together: equal in any of `keys`, or linked by `pairs`, also by way of other rows.

    Args:
        count: number of rows N.
        keys: columns of N values, for example clusters and image digests.
        pairs: linked rows.

    Returns:
        (N,) int64 number of each row's unit.
    """
    links = list(pairs)
    for column in keys:
        first: dict[str, int] = {}
        links += [(first.setdefault(value, row), row) for row, value in enumerate(column)]
    ends = np.asarray(links, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def drawn_parts(
    splits: Splits, labels: np.ndarray, contents: Sequence[str], unit_of_row: np.ndarray
) -> tuple[str, ...]:
    """Draws a split stratified by class that keeps units whole; the same for any order of rows, on every machine.

    Units are taken in an order that depends only on the seed and on their images (the largest first, as they are the
    hardest to place), and each goes where its classes lack most. A class of two or more units has images in train and
    test, as far as units of several classes allow it.

    Args:
        splits: with `fractions` and `seed`.
        labels: (N,) int64 class ids.
        contents: N digests of the images.
        unit_of_row: (N,) int64, see `units`.

    Returns:
        N parts.

    Raises:
        SplitError: too few units for the parts.
    """
    assert splits.fractions is not None
    chosen = [part for part in PARTS if splits.fractions.get(part, 0) > 0]
    shares = np.asarray([splits.fractions[part] for part in chosen])  # pyright: ignore[reportArgumentType]
    members = _members(unit_of_row)
    if len(members) < len(chosen):
        raise SplitError(
            f"{len(labels)} images in {len(members)} clusters cannot be divided into {', '.join(chosen)}; clusters and "
            "copies of a picture stay together"
        )
    order = sorted(members, key=lambda rows: (-len(rows), _rank(splits.seed, [contents[int(row)] for row in rows])))
    totals = np.bincount(labels).astype(float)
    lacking = shares[:, None] * totals[None]
    needed = np.asarray([part in ("train", "test") for part in chosen], dtype=float)[:, None] * np.ones_like(lacking)
    left = np.bincount(np.concatenate([np.unique(labels[rows]) for rows in order]), minlength=len(totals))
    result = [UNUSED] * len(labels)
    for rows in order:
        classes, counts = np.unique(labels[rows], return_counts=True)
        # A needed part without an image of the class is preferred a little, and above all when units run out.
        urgent = left[classes] <= needed[:, classes].sum(axis=0)
        bonus = needed[:, classes] * (1 + urgent * totals[classes])
        want = (lacking[:, classes] + bonus) * counts / totals[classes]
        best = int(want.sum(axis=1).argmax())
        lacking[best, classes] -= counts
        needed[best, classes] = 0
        left[classes] -= 1
        for row in rows:
            result[row] = chosen[best]
    return tuple(result)


def _members(unit_of_row: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(unit_of_row, kind="stable")
    edges = np.flatnonzero(np.diff(unit_of_row[order])) + 1
    return np.split(order, edges)


def _rank(seed: int, contents: Iterable[str]) -> str:
    return digest(str(seed), "split", sorted(contents))
