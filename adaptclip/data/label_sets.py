# SPDX-License-Identifier: Apache-2.0
"""Images that may show several classes, or none of them: cells with several names, or a column of 0 and 1 for each.

Both become one matrix (N, C) of int8: 1 shows the class, 0 does not, -1 nobody knows. That an image shows none of the
classes is a state of its row, all 0, and no class of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.data.columns import SEPARATORS, as_text, is_missing, several_in_one
from adaptclip.errors import DataError, agree, did_you_mean

if TYPE_CHECKING:
    from adaptclip.data.card_block import SeveralLabels

NOT_KNOWN = -1

_FLAGS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0, "-1": NOT_KNOWN}
"""What a cell of a class's own column may hold; -1 is what CheXpert writes for "uncertain"."""

_POLICIES = {"negative": 0, "positive": 1, "ignore": NOT_KNOWN}


def read_label_sets(
    cells: Sequence[Any],
    rule: SeveralLabels,
    *,
    card_names: tuple[str, ...] | None,
    source_names: tuple[str, ...] | None,
    where: Callable[[int], str],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads cells that name all classes of their image: texts such as "crack;rust", or lists of names or ids.

    An empty cell or list, and the words of `rule.none`, say that the image shows none of the classes.

    Args:
        cells: N cells.
        rule: of the card.
        card_names: the card's class names, or None.
        source_names: the source's own names of ids, or None.
        where: row -> what to call it in an error.

    Returns:
        (N, C) int8 and C names: the card's, else the source's, else those of the cells, sorted.

    Raises:
        DataError: a cell is neither text nor list, names an unknown class, or says "none" and a class; the cells are
            texts and the card declares no separator although one stands in them.
    """
    rows = [_names_in(cell, rule, where, row) for row, cell in enumerate(cells)]
    names = card_names or source_names
    if source_names is not None:
        rows = [[_of_id(name, source_names, where, row) for name in found] for row, found in enumerate(rows)]
    for row, found in enumerate(rows):
        words = [name for name in found if isinstance(name, str) and name in rule.none]
        if words and len(words) < len(found):
            raise DataError(
                f"{where(row)}: the cell {cells[row]!r} says {words[0]!r}, which is none, and names a class"
            )
    rows = [[name for name in found if name not in rule.none] for found in rows]
    if names is None:
        names = tuple(sorted({name for found in rows for name in found}))
        if names and all(name.lstrip("-").isdecimal() for name in names):
            raise DataError(
                f"labels are the numbers {names[0]} to {names[-1]} and nothing says what they are called: add "
                "class_names to the card, in the order of the numbers (the names are the words CLIP reads)"
            )
    elif card_names is not None and all(name.isdecimal() for found in rows for name in found):
        rows = [[name if name in names else _of_id(int(name), names, where, r) for name in found]
                for r, found in enumerate(rows)]  # fmt: skip
    place = {name: c for c, name in enumerate(names)}
    _refuse_other_separator(rows, rule, where)
    _refuse_unknown(rows, place, where)
    marks = np.zeros((len(rows), len(names)), np.int8)
    for row, found in enumerate(rows):
        marks[row, [place[name] for name in found]] = 1
        if not found and rule.blank == "ignore" and _is_empty(cells[row]):
            marks[row] = NOT_KNOWN
    return marks, names


def read_flags(
    columns: Mapping[str, Sequence[Any]],
    rule: SeveralLabels | None,
    *,
    card_names: tuple[str, ...] | None,
    where: Callable[[int], str],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads a column of 0 and 1 for each class.

    Args:
        columns: class -> N cells: 0 and 1, true and false, yes and no, -1 for "uncertain", or empty.
        rule: of the card: what uncertain and empty cells stand for; None allows neither.
        card_names: the card's class names: these columns in another order, or as many other names; or None.
        where: row -> what to call it in an error.

    Returns:
        (N, C) int8 and C names.

    Raises:
        DataError: a cell is something else, or is uncertain or empty and the card does not say what that stands for.
    """
    order = _order(tuple(columns), card_names)
    marks = np.stack([_column(name, columns[name], rule, where) for name in order], axis=1)
    return marks, card_names or tuple(columns)


def one_class_each(marks: np.ndarray, names: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    """Returns (N,) class ids where each row has exactly one class.

    Raises:
        DataError: a row has none or several, and the card does not say that it may.
    """
    counts = marks.sum(axis=1)
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        several, none = int((counts > 1).sum()), int((counts == 0).sum())
        first = int(wrong[0])
        shown = ", ".join(name for name, mark in zip(names, marks[first], strict=True) if mark) or "none"
        raise DataError(
            f"{several} {agree(several, 'row shows', 'rows show')} several classes and {none} "
            f"{agree(none, 'shows', 'show')} none, first {where(first)} ({shown}). If an image may show several, or "
            "none of them, say `several_labels: {}` in the card; if not, mend the columns"
        )
    return marks.argmax(axis=1).astype(np.int64)


def first_shown(marks: np.ndarray) -> np.ndarray:
    """Returns (N,) int64, the first class that each image shows; 0 where it shows none."""
    return (marks == 1).argmax(axis=1).astype(np.int64)


def in_words(marks: np.ndarray, names: Sequence[str]) -> str:
    """How many classes the images show, as a sentence."""
    counts, unknown = (marks == 1).sum(axis=1), (marks == NOT_KNOWN)
    none = int(((counts == 0) & ~unknown.any(axis=1)).sum())
    most = int(counts.max(initial=0))
    mean = counts.sum() / max((~unknown).sum(), 1) * len(names)
    words = (
        f"images show {mean:.2f} of {len(names)} classes on average, {most} at most; {none:,} of {len(marks):,} show "
        "none of them"
    )
    if not unknown.any():
        return words
    return f"{words}, as far as all is known; {unknown.mean():.1%} of the answers are not known and left out"


def _is_empty(cell: Any) -> bool:
    return (len(cell) == 0) if isinstance(cell, list | tuple | np.ndarray | set) else is_missing(cell)


def _names_in(cell: Any, rule: SeveralLabels, where: Callable[[int], str], row: int) -> list[Any]:
    """The names or ids of a cell, each once, in their order."""
    if _is_empty(cell):
        return []
    if isinstance(cell, list | tuple | np.ndarray | set):
        found = [as_text(item) if isinstance(item, str) else item for item in cell]
    elif isinstance(cell, str) and rule.separator:
        found = [as_text(part) for part in cell.split(rule.separator)]
    elif isinstance(cell, str):
        text = as_text(cell)
        seen = [s for s in SEPARATORS if s in text]
        if seen or text.startswith("["):
            how = f'`several_labels: {{separator: "{seen[0]}"}}`' if not text.startswith("[") else "a list, not as text"
            raise DataError(
                f"{where(row)}: the cell {cell!r} seems to name several classes, and the card does not say what stands "
                f"between them: {how if text.startswith('[') is False else 'write it as ' + how}"
            )
        found = [text]
    else:
        found = [cell]
    for item in found:
        whole = isinstance(item, int | np.integer) and not isinstance(item, bool)
        if not whole and not isinstance(item, str) and not (isinstance(item, float) and item.is_integer()):
            raise DataError(f"{where(row)}: {item!r} in the cell {cell!r} is a {type(item).__name__}, and no class")
        if isinstance(item, str) and not item:
            raise DataError(f"{where(row)}: the cell {cell!r} has an empty name between two separators")
    return list(dict.fromkeys(as_text(item) for item in found))


def _of_id(name: Any, names: tuple[str, ...], where: Callable[[int], str], row: int) -> str:
    """The name of an id of the source; names stay."""
    if isinstance(name, str) and (name in names or not name.lstrip("-").isdecimal()):
        return name
    number = int(name)
    if not 0 <= number < len(names):
        hint = "; do the numbers count from 1?" if number == len(names) else ""
        raise DataError(f"{where(row)}: the class id {number} is out of range; allowed: 0 to {len(names) - 1}{hint}")
    return names[number]


def _refuse_other_separator(rows: Sequence[list[Any]], rule: SeveralLabels, where: Callable[[int], str]) -> None:
    """Raises DataError where names are made of others with something else between them than the card says."""
    first: dict[str, int] = {}
    for row, found in enumerate(rows):
        for name in found:
            first.setdefault(name, row)
    if found := several_in_one(first, (), [other for other in SEPARATORS if other != rule.separator]):
        name, number, other = found
        raise DataError(
            f"{where(first[name])}: {name!r} seems to be {number} classes with {other!r} between them, and the card "
            f"says `several_labels: {{separator: {rule.separator!r}}}`; write the one that is there"
        )


def _refuse_unknown(rows: Sequence[list[Any]], place: Mapping[str, int], where: Callable[[int], str]) -> None:
    unknown = Counter(name for found in rows for name in found if name not in place)
    if unknown:
        name, count = unknown.most_common(1)[0]
        first = next(row for row, found in enumerate(rows) if name in found)
        raise DataError(
            f"{count} {agree(count, 'row names', 'rows name')} {name!r}, which is no class of the card, first "
            f"{where(first)}. {did_you_mean(name, place)} If it says that none of them is there, write "
            f'`several_labels: {{none: ["{name}"]}}`'
        )


def _order(columns: tuple[str, ...], card_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The columns in the order of the card's class names, which may be other words for them."""
    if card_names is None or set(card_names) == set(columns):
        return card_names or columns
    if len(card_names) == len(columns) and not set(card_names) & set(columns):
        return columns
    only = sorted(set(card_names) ^ set(columns))
    raise DataError(
        f"class_names of the card and columns.labels differ: {only[0]!r} is only in one of the two. List the "
        f"{len(columns)} columns (other words for the prompt go into `aliases`), or leave class_names out"
    )


def _column(name: str, cells: Sequence[Any], rule: SeveralLabels | None, where: Callable[[int], str]) -> np.ndarray:
    marks = np.zeros(len(cells), np.int8)
    for row, cell in enumerate(cells):
        if is_missing(cell):
            marks[row] = _by_policy("blank", "an empty cell", rule and rule.blank, name, where, row)
            continue
        text = as_text(cell).casefold()
        text = text.removesuffix(".0") if text.endswith(".0") else text
        if text not in _FLAGS:
            raise DataError(
                f"{where(row)}: the column {name!r} says whether an image shows {name!r}, and holds {cell!r}; allowed: "
                "0 and 1, true and false, yes and no, -1 for uncertain, or nothing"
            )
        mark = _FLAGS[text]
        if mark == NOT_KNOWN:
            mark = _by_policy("uncertain", f"{cell!r}, which is uncertain", rule and rule.uncertain, name, where, row)
        marks[row] = mark
    return marks


def _by_policy(key: str, what: str, policy: str | None, name: str, where: Callable[[int], str], row: int) -> int:
    if policy is None:
        allowed = "negative, positive or ignore" if key == "uncertain" else "negative or ignore"
        raise DataError(
            f"{where(row)}: the column {name!r} has {what}, and the card does not say what that stands for: "
            f"`several_labels: {{{key}: negative}}` takes it for 0; allowed: {allowed} (neither learnt nor judged)"
        )
    return _POLICIES[policy]
