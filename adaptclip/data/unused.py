"""Columns that a card does not name: which of them tell who or what images are of, and must not be in two parts.

The rule. A column of persons or animals by its name ("PatientID", "subject", "case no") is always looked at. Of the
others those are like clusters whose values repeat and are too many for groups: more than FEW_VALUES different ones, and
a tenth of the rows or more with a value that others have too. Left aside are columns that each class has one value of,
sizes and places within a picture, sentences, and measured numbers (20 rows or more for each different number, such as
ages in years).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adaptclip.data.columns import as_number, as_text, is_missing
from adaptclip.data.dataset import DomainData
from adaptclip.errors import agree
from adaptclip.words import FEW_VALUES, is_person, words_of

_REPEATED = 0.1
_ROWS_OF_A_NUMBER = 20
_SIZES = frozenset(
    ("width", "height", "size", "bytes", "filesize", "pixels", "resolution", "channels", "depth", "x", "y", "w", "h",
     "xmin", "xmax", "ymin", "ymax", "x1", "x2", "y1", "y2", "left", "top", "right", "bottom", "bbox", "area")
)  # fmt: skip


def is_like_a_cluster(name: str, cells: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether a column may tell who or what images are of; see the rule above.

    Args:
        name: of the column.
        cells: N cells.
        labels: N labels.
    """
    values = [as_text(cell) for cell in cells if not is_missing(cell)]
    counts = Counter(values)
    if len(counts) < 2 or max(counts.values()) == 1:
        return False
    by_class = is_function_of_class(cells, labels)
    if is_person(name):
        return not (by_class and len(counts) == len(set(labels)))
    if by_class or len(counts) <= FEW_VALUES:
        return False
    if set(words_of(name)) & _SIZES or sum(len(value.split()) for value in counts) > 4 * len(counts):
        return False
    if len(values) >= _ROWS_OF_A_NUMBER * len(counts) and all(as_number(value) is not None for value in counts):
        return False
    return sum(count for count in counts.values() if count > 1) >= _REPEATED * len(values)


def is_function_of_class(cells: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether all rows of a class have the same value, where they have one."""
    found: defaultdict[Any, set[str]] = defaultdict(set)
    for cell, label in zip(cells, labels, strict=True):
        if not is_missing(cell):
            found[label].add(as_text(cell))
    return all(len(values) == 1 for values in found.values())


def shared_values(data: DomainData, name: str, cells: Sequence[Any]) -> str:
    """Words how the values of an unused column lie in several parts, or would with another draw.

    Args:
        data: the three parts; a split that is drawn here counts as straddling where values repeat at all.
        name: of the column.
        cells: by row of the source.

    Returns:
        The end of a sentence, or "" where nothing is shared or the column tells of no clusters.
    """
    rows = np.concatenate([part.rows for part in data.parts.values()])
    labels = np.concatenate([part.labels for part in data.parts.values()]).tolist()
    if not is_like_a_cluster(name, [cells[row] for row in rows], labels):
        return ""
    values = {
        part: ["" if is_missing(cells[row]) else as_text(cells[row]) for row in images.rows]
        for part, images in data.parts.items()
    }
    learnt = {*values["train"], *values["validation"]} - {""}
    shared = [value for value in values["test"] if value in learnt]
    if shared:
        share = f"{len(shared)} of {len(values['test'])} test images ({len(shared) / len(values['test']):.0%})"
        number = len(set(shared))
        values_are = agree(number, "value in test that is", "values in test that are")
        have = agree(len(shared), "has", "have")
        return f"has {number} {values_are} in another part too ({_some(shared)}): {share} {have} one"
    inner = (set(values["train"]) & set(values["validation"])) - {""}
    if inner:
        values_are = agree(len(inner), "value that is", "values that are")
        return f"has {len(inner)} {values_are} in train and in validation ({_some(inner)})"
    if data.card.splits is None or data.card.splits.fractions is None:
        return ""
    units: defaultdict[str, set[str]] = defaultdict(set)
    for part, images in data.parts.items():
        for value, unit in zip(values[part], images.clusters or images.contents, strict=True):
            units[value].add(unit)
    several = {value for value, own in units.items() if len(own) > 1} - {""}
    if not several:
        return ""
    number = f"{len(several)} {agree(len(several), 'value', 'values')}"
    return f"has {number} with several images ({_some(several)}), which a draw may put into two parts"


def _some(values: Iterable[str]) -> str:
    names = sorted(set(values))
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
