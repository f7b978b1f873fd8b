# SPDX-License-Identifier: Apache-2.0
"""How the labels of somebody's table are written, and what a card must say so that they are read as they are meant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adaptclip.data.columns import (
    as_number,
    as_text,
    is_missing,
    label_texts,
    refuse_unclear_labels,
    resolve_labels,
)
from adaptclip.errors import CardError, shown
from adaptclip.words import FEW_VALUES


@dataclass(frozen=True)
class Labels:
    """What labels are.

    Attributes:
        values: N labels by the names that the card has for them.
        lines: of YAML for the card's `class_names`; [] where the labels are the names.
        notes: sentences about how they are read.
        named: name of each class -> images, as far as it is known how the card will call it.
        shown: name of each class -> images that show it, where an image may show several; else None.
    """

    values: list[str]
    lines: list[str]
    notes: list[str]
    named: dict[str, int]
    shown: Counter[str] | None = None

    @property
    def counts(self) -> Counter[str]:
        """Class, as the table calls it -> images."""
        return Counter(self.values) if self.shown is None else self.shown


def understood_labels(
    column: str, values: Sequence[Any], source_names: tuple[str, ...] | None, where: Callable[[int], str]
) -> Labels:
    """Recognises names, numbers from 0 and from elsewhere, "1.0", "001", true and false.

    Args:
        column: of the labels.
        values: N cells.
        source_names: what the source itself calls its ids, or None.
        where: row -> what to call it in an error.

    Raises:
        CardError: it is no column of classes: measured numbers, nearly as many values as rows, or a single one.
        DataError: labels are missing, several in a cell, or one number is spelt in two ways.
    """
    refuse_unclear_labels(values, source_names or (), where)
    texts = label_texts(values) if source_names is None else list(values)
    known = [as_text(value) for value in texts if not is_missing(value)]
    counts = Counter(known)
    _refuse_no_classes(column, counts, len(known))
    lines, notes, named = [], [], dict(counts)
    card_names: tuple[str, ...] | None = None
    if source_names is not None:
        ids, names = resolve_labels(values, card_names=None, source_names=source_names, where=where)
        texts = [names[label] for label in ids]
        return Labels(texts, [], [], {name: texts.count(name) for name in dict.fromkeys(names)})
    if all(name.lstrip("-").isdecimal() for name in counts):
        numbers = {int(name): name for name in counts}
        if min(numbers) == -1 and set(numbers) != {-1, 1}:
            raise CardError(
                f"the column {column!r} holds -1 in {counts[numbers[-1]]} of {len(known)} rows, which usually marks "
                "the hidden labels of a public test set: leave these rows out"
            )
        if sorted(numbers) == list(range(len(numbers))):
            named = {f"class {i}": counts[numbers[i]] for i in range(len(numbers))}
            card_names = tuple(named)
            lines.append(
                "# The labels are numbers: put the words that CLIP shall read here, in the order of the numbers."
            )
            notes.append(f"the labels are the numbers 0 to {len(numbers) - 1}: name them under class_names")
        else:
            card_names = tuple(sorted(counts))
            lines.append("# The labels are numbers that do not count from 0, and so names; words go under `aliases`.")
            info = f"{min(numbers)} to {max(numbers)}"
            notes.append(f"the labels are numbers that do not count from 0 ({info}), and are taken as names")
        lines.append(f"class_names: [{', '.join(json.dumps(name, ensure_ascii=False) for name in card_names)}]")
        raw = {as_text(value) for value in values}
        if len(raw) == len(counts) and not raw & set(counts):
            notes.append(f"labels such as {shown(sorted(raw)[0])!r} are read as whole numbers")
    resolve_labels(values, card_names=card_names, source_names=None, where=where)
    return Labels([as_text(text) for text in texts], lines, notes, named)


def _refuse_no_classes(column: str, counts: Counter[str], rows: int) -> None:
    """Raises CardError where a column has the values of something else than classes."""
    example = shown(next(iter(counts), ""))[:60]
    numbers = [as_number(text) for text in counts]
    fractions = sum(number is not None and not number.is_integer() for number in numbers)
    if None not in numbers and fractions:
        what = f"holds measured numbers ({len(counts):,} different ones, such as {example!r})"
    elif len(counts) > max(FEW_VALUES, rows / 2):
        what = f"has {len(counts):,} different values in {rows:,} rows, such as {example!r}"
    elif len(counts) == 1:
        what = f"has the one value {example!r} in all {rows:,} rows, and a classifier needs two classes or more"
    else:
        return
    raise CardError(f"the column {column!r} {what}: it is no column of classes. Name another with --label-column")
