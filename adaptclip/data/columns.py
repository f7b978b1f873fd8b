# SPDX-License-Identifier: Apache-2.0
"""Raw table columns turned into label ids, row ids, groups and taxonomy levels, and those that a card does not name.

Which unnamed columns tell who or what images are of, and must not be in two parts: a column of persons or animals by
its name ("PatientID", "subject", "case no") is always looked at. Of the others those are like clusters whose values
repeat and are too many for groups: more than FEW_VALUES different ones, and a tenth of the rows or more with a value
that others have too. Left aside are columns that each class has one value of, sizes and places within an image,
sentences, and measured numbers (one with a fraction among them, or 20 rows or more for each different number, such as
ages in years).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from adaptclip.data.card_block import GroupBins, normalise_text
from adaptclip.data.dataset import UNKNOWN, DomainData
from adaptclip.errors import DataError, agree, did_you_mean
from adaptclip.words import FEW_VALUES, blanks_apart, is_person, numbers_twice, spelt, words_of

ONE_LABEL = (
    "If an image may show several classes, or none of them, the card says so with `several_labels:` (for cells such as "
    'these `several_labels: {separator: ";"}`; lists need no separator); otherwise leave one label per row.'
)

SEPARATORS = "|;,"
"""What stands between the labels of a cell that has several."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN or blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """Returns a cell as text: whole numbers without a decimal point, text in Unicode form NFC."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return normalise_text(value) if isinstance(value, str) else str(value)


def resolve_labels(
    values: Sequence[Any],
    *,
    card_names: tuple[str, ...] | None,
    source_names: tuple[str, ...] | None,
    where: Callable[[int], str],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turns a label column into class ids and the class names they count through.

    Names win over numbers: where the source names its ids and the card lists the same names in another order, ids
    follow the card. A card may rename all classes of a source by listing as many other names in the order of its ids.

    Args:
        values: N integer ids or names.
        card_names: the card's class names in the order of their ids, or None.
        source_names: the source's own names of its integer ids, or None.
        where: row -> what to call it in an error.

    Returns:
        (N,) int64 ids and C names.

    Raises:
        DataError: a label is missing, out of range, of the wrong type or not among the names.
    """
    refuse_unclear_labels(values, card_names or source_names or (), where)
    _refuse_bad_cells(values, where)
    if source_names is None:
        values = label_texts(values, card_names or ())
    if _are_numbers_as_names(values, card_names):
        values = [as_text(value) for value in values]
    if all(isinstance(value, str) for value in values):
        names = card_names or source_names
        texts = [as_text(value) for value in values]
        if names is not None and not (_all_whole(texts) and not set(texts) & set(names)):
            return _ids_of_names(texts, names, where), names
        if names is None and not _all_whole(texts):
            names = tuple(sorted(set(texts)))
            return _ids_of_names(texts, names, where), names
        values = [int(text) for text in texts]
    ids = np.asarray([int(value) for value in values], dtype=np.int64)
    own = source_names or card_names
    if own is None:
        raise DataError(
            f"labels are the numbers {ids.min()} to {ids.max()} and nothing says what they are called: "
            + (
                "add class_names to the card, in the order of the numbers (the names are the words CLIP reads)"
                if ids.min() <= 0
                else _count_from_one(values)
            )
        )
    _check_range(ids, values, len(own), where)
    if card_names is None or source_names is None or card_names == source_names:
        return ids, own
    return _to_card_order(ids, source_names, card_names), card_names


def label_texts(values: Sequence[Any], names: Sequence[str] = ()) -> list[Any]:
    """Returns labels as they are meant: true and false are names, and "1.0" in all rows is what pandas makes of 1.

    Args:
        values: N cells.
        names: of the card; labels that are among them stay as they are.
    """
    given = [value for value in values if not is_missing(value)]
    if given and all(isinstance(value, bool | np.bool_) for value in given) and (not names or "True" in names):
        return [None if is_missing(value) else str(value) for value in values]
    whole = all(isinstance(value, str) and re.fullmatch(r"-?\d+[.,]0+", value.strip()) for value in given)
    if whole and not {as_text(value) for value in given} & set(names):
        return [value if is_missing(value) else re.split("[.,]", value.strip())[0] for value in values]
    return list(values)


def _refuse_bad_cells(values: Sequence[Any], where: Callable[[int], str]) -> None:
    several = [row for row, value in enumerate(values) if isinstance(value, list | tuple | np.ndarray | set)]
    if several:
        raise DataError(
            f"{len(several)} {agree(len(several), 'row has', 'rows have')} a list of labels, first "
            f"{where(several[0])}: {values[several[0]]!r}. {ONE_LABEL}"
        )
    missing = [row for row, value in enumerate(values) if is_missing(value)]
    if missing:
        raise DataError(
            f"{len(missing)} {agree(len(missing), 'row has', 'rows have')} no label, first {where(missing[0])}: label "
            f"{agree(len(missing), 'it, or leave it', 'them, or leave them')} out of the files"
        )
    kinds = {type(value).__name__ for value in values}
    for row, value in enumerate(values):
        whole = isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer())
        if not (whole or isinstance(value, str)) or (isinstance(value, str) and kinds != {"str"}):
            raise DataError(
                f"{where(row)}: the label {value!r} is a {type(value).__name__}; labels must be all whole numbers or "
                f"all texts, and this column has {', '.join(sorted(kinds))}"
            )


def _all_whole(texts: Sequence[str]) -> bool:
    return all(text.lstrip("-").isdecimal() for text in texts)


def refuse_unclear_labels(values: Sequence[Any], names: Sequence[str], where: Callable[[int], str]) -> None:
    """Raises DataError where a label is several in one cell ("Effusion|Mass"), or one number is spelt in two ways."""
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if isinstance(value, str):
            first.setdefault(as_text(value), row)
    if found := several_in_one(first, names, SEPARATORS):
        text, number, _ = found
        empty = " The empty cells seem to mean none of them." if "" in first else ""
        raise DataError(f"{where(first[text])}: the label {text!r} is {number} labels in one cell.{empty} {ONE_LABEL}")
    twice = numbers_twice(first)
    if twice:
        raise DataError(
            f"the labels {spelt(twice)} are one number spelt in several ways (first {where(first[twice[0][-1]])}), and "
            "nothing says whether they are one class; write each in one way"
        )
    lists = [text for text in first if text == "[]" or text.startswith(("['", '["'))]
    if lists:
        raise DataError(f"{where(first[lists[0]])}: the label {lists[0]!r} is a list in one cell. {ONE_LABEL}")


def several_in_one(
    texts: Collection[str], names: Collection[str], separators: Iterable[str]
) -> tuple[str, int, str] | None:
    """Returns the first text that is others, or `names`, with a separator between; how many, and it. None without."""
    for separator in separators:
        known = {*names, *(text for text in texts if text and separator not in text)}
        for text in texts:
            parts = [part.strip() for part in text.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                return text, len(parts), separator
    return None


def merged_labels(values: Sequence[Any], where: Callable[[int], str]) -> tuple[str, ...]:
    """Returns a sentence about labels that `as_text` makes one, such as "crack" and "crack "; () without any."""
    counts = Counter(value for value in values if isinstance(value, str) and not is_missing(value))
    merged = blanks_apart(counts)
    if not merged:
        return ()
    usual = {max(spellings, key=counts.__getitem__) for spellings in merged}
    rare = {text for spellings in merged for text in spellings} - usual
    first = next(row for row, value in enumerate(values) if value in rare)
    return (
        f"the labels {spelt(merged)} differ only in blanks around them or in the Unicode form of a letter, and each "
        f"is read as one class ({sum(counts[text] for text in rare)} of {len(values)} rows are written otherwise than "
        f"the rest, first {where(first)}); write each in one way, or give them names of their own if they differ",
    )


def _are_numbers_as_names(values: Sequence[Any], card_names: tuple[str, ...] | None) -> bool:
    """Whether labels are whole numbers and the card's class names are these numbers, as where ids count from 1."""
    if not card_names or not _all_whole(card_names) or any(isinstance(value, str) for value in values):
        return False
    return {as_text(value) for value in values} <= set(card_names)


def _ids_of_names(texts: Sequence[str], names: tuple[str, ...], where: Callable[[int], str]) -> np.ndarray:
    ids = {name: i for i, name in enumerate(names)}
    unknown = Counter(text for text in texts if text not in ids)
    if unknown:
        name, count = unknown.most_common(1)[0]
        first = next(row for row, text in enumerate(texts) if text == name)
        raise DataError(
            f"{(rows := sum(unknown.values()))} {agree(rows, 'row has', 'rows have')} a label that is no class of the "
            f"card, for example {name!r} ({count} {agree(count, 'row', 'rows')}, first {where(first)}). "
            f"{did_you_mean(name, names)}"
        )
    return np.asarray([ids[text] for text in texts], dtype=np.int64)


def _count_from_one(values: Sequence[Any]) -> str:
    """How to say what numbers are called that do not count from 0."""
    numbers = sorted({as_text(value) for value in values})
    listed = ", ".join(f'"{number}"' for number in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
    return (
        f"they do not count from 0, so take them as names: `class_names: [{listed}]`, with the words that CLIP "
        f'shall read under `aliases: {{"{numbers[0]}": ...}}`'
    )


def _check_range(ids: np.ndarray, values: Sequence[Any], num_classes: int, where: Callable[[int], str]) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= num_classes))
    if len(wrong):
        hint = "; -1 usually marks the hidden labels of a public test set: use another split" if ids.min() == -1 else ""
        if ids.min() >= 1:
            hint = f". The numbers here are {ids.min()} to {ids.max()}: {_count_from_one(values)}"
        raise DataError(
            f"{len(wrong)} {agree(len(wrong), 'row has', 'rows have')} a label id out of range, for example "
            f"{ids[wrong[0]]} ({where(int(wrong[0]))}). "
            f"Allowed: 0 to {num_classes - 1}, as there are {num_classes} class names{hint}"
        )


def _to_card_order(ids: np.ndarray, source_names: tuple[str, ...], card_names: tuple[str, ...]) -> np.ndarray:
    if set(source_names) == set(card_names):
        order = np.asarray([card_names.index(name) for name in source_names], dtype=np.int64)
        return order[ids]
    if len(source_names) == len(card_names) and not set(source_names) & set(card_names):
        return ids
    only_card = sorted(set(card_names) - set(source_names))
    only_source = sorted(set(source_names) - set(card_names))
    raise DataError(
        f"class_names of the card and the classes of the data differ: only in the card {only_card[:5]}, only in the "
        f"data {only_source[:5]}. List the data's {len(source_names)} names (other words for the prompt go into "
        "`aliases`), or leave class_names out"
    )


def group_values(values: Sequence[Any], bins: GroupBins | None, *, name: str) -> tuple[str, ...]:
    """Turns an attribute column into group names; a missing cell is UNKNOWN.

    Raises:
        DataError: the attribute has bins and a value is no number or lies below the first bin.
    """
    if bins is None:
        return tuple(UNKNOWN if is_missing(value) else as_text(value) for value in values)
    return tuple(UNKNOWN if is_missing(value) else _bin(value, bins, name) for value in values)


def _bin(value: Any, bins: GroupBins, name: str) -> str:
    number = as_number(value)
    if number is None:
        raise DataError(
            f"group {name!r} has bins from {bins.bins[0]:g}, but a row holds {value!r}, which is no number; leave "
            "unknown values empty"
        )
    place = sum(edge <= number for edge in bins.bins) - 1
    if place < 0:
        raise DataError(
            f"group {name!r} has bins from {bins.bins[0]:g}, but a row holds {value!r}; start the bins lower, or leave "
            "unknown values empty"
        )
    return bins.names[place]


def as_number(value: Any) -> float | None:
    """Returns a cell as a number, None where it is none.

    A decimal comma is one ("50,0"), unless three digits follow, when it may as well separate thousands.
    """
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+,(\d{1,2}|\d{4,})", text):
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def level_values(
    values: Sequence[Any], labels: np.ndarray, class_names: Sequence[str], *, name: str
) -> tuple[str, ...]:
    """Returns one coarse name per class from a column that holds it per row; UNKNOWN for a class without rows.

    Raises:
        DataError: rows of one class disagree.
    """
    found: list[set[str]] = [set() for _ in class_names]
    for value, label in zip(values, labels, strict=True):
        if not is_missing(value):
            found[label].add(as_text(value))
    for class_name, names in zip(class_names, found, strict=True):
        if len(names) > 1:
            raise DataError(
                f"level {name!r} must be the same for all images of a class, but {class_name!r} has "
                f"{', '.join(sorted(names)[:5])}; what varies within a class belongs under columns.groups"
            )
    return tuple(next(iter(names), UNKNOWN) for names in found)


def row_ids(values: Sequence[Any] | None, contents: Sequence[str]) -> tuple[str, ...]:
    """Returns the ids of an id column, or else the first 16 digits of each content, with -2, -3 … for repeats.

    Raises:
        DataError: the id column has an empty or a repeated cell.
    """
    if values is None:
        seen: Counter[str] = Counter()
        ids = []
        for content in contents:
            short = content[:16]
            seen[short] += 1
            ids.append(short if seen[short] == 1 else f"{short}-{seen[short]}")
        return tuple(ids)
    ids = [as_text(value) for value in values]
    empty = sum(is_missing(value) for value in values)
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if empty or repeated:
        raise DataError(
            f"the id column has {empty} empty and {len(repeated)} repeated values"
            + (f" (for example {repeated[0]!r})" if repeated else "")
            + "; leave columns.id out to use digests of the images"
        )
    return tuple(ids)


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
    numbers = [as_number(value) for value in counts]
    often = len(values) >= _ROWS_OF_A_NUMBER * len(counts)
    if None not in numbers and (often or any(x is not None and x % 1 for x in numbers)):
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
        return f"has {number} {values_are} in another part too ({_quoted(shared)}): {share} {have} one"
    inner = (set(values["train"]) & set(values["validation"])) - {""}
    if inner:
        values_are = agree(len(inner), "value that is", "values that are")
        return f"has {len(inner)} {values_are} in train and in validation ({_quoted(inner)})"
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
    return f"has {number} with several images ({_quoted(several)}), which a draw may put into two parts"


def _quoted(values: Iterable[str]) -> str:
    names = sorted(set(values))
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
