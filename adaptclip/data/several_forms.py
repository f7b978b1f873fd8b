# SPDX-License-Identifier: Apache-2.0
"""Tables in which an image may show several classes, as people write them, and what a card says of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptclip.data.asking import Given, Question, Unclear
from adaptclip.data.card_block import SeveralLabels
from adaptclip.data.checks import division
from adaptclip.data.columns import SEPARATORS, as_number, as_text, is_missing
from adaptclip.data.label_forms import Labels
from adaptclip.data.label_sets import first_shown, in_words, one_class_each, read_flags, read_label_sets
from adaptclip.errors import shown
from adaptclip.words import identity_rank, role_of, words_of

_NONE = frozenset((
    *("no finding", "no findings", "none", "none of these", "nothing", "no label", "kein befund", "ohne befund"),
    *("keine", "keiner", "aucun", "ninguno", "nessuno"),
))  # fmt: skip
"""Words, in a cell or as the name of a column, that say that an image shows none of the classes."""


@dataclass(frozen=True)
class SeveralForm:
    """How it is written down which classes an image shows.

    Attributes:
        columns: those of 0 and 1; () where one column names the classes.
        rule: the card's `several_labels`; None where each image shows exactly one.
        notes: sentences about it.
        none: columns of 0 and 1 that say that an image shows none of the others.
    """

    columns: tuple[str, ...]
    rule: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    none: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Lines of YAML for the card."""
        return [] if self.rule is None else [f"several_labels: {json.dumps(self.rule, ensure_ascii=False)}"]

    def block(self) -> dict[str, Any]:
        """The keys of the card's block."""
        return {} if self.rule is None else {"several_labels": self.rule}


def flag_columns(columns: Mapping[str, Sequence[Any]], given: Given) -> list[str]:
    """Returns the columns that say of one class each whether an image shows it: 0 and 1, -1, or empty; [] below two."""
    taken = {given.image_column, given.cluster_column, *given.group, *given.shared}
    found = []
    for name, cells in columns.items():
        values = {as_number(cell) for cell in cells if not is_missing(cell)}
        plain = role_of(name) is None and identity_rank(name) is None and name not in taken
        if values and values <= {0.0, 1.0, -1.0} and plain and not division(name, cells):
            found.append(name)
    return found if len(found) > 1 else []


def of_flags(columns: Mapping[str, Sequence[Any]], flags: Sequence[str], given: Given) -> SeveralForm:
    """Returns what a card says of columns of 0 and 1.

    Raises:
        Unclear: some cells are -1 or empty, and nobody said what that stands for.
    """
    marks = np.asarray([[_mark(cell) for cell in columns[name]] for name in flags]).T
    if bool(((marks == 1).sum(axis=1) == 1).all()) and set(np.unique(marks)) <= {0.0, 1.0}:
        return SeveralForm(
            tuple(flags), None, [f"the columns {_listed(flags)} are the classes, one of them for each image"]
        )
    kept, notes = list(flags), []
    for at, name in enumerate(flags):
        others = np.delete(marks, at, axis=1) == 1
        if " ".join(words_of(name)) in _NONE and len(kept) > 2 and not others[marks[:, at] == 1].any():
            kept.remove(name)
            notes.append(f"the column {name!r} says that an image shows none of the others, and is no class")
    marks = np.asarray([[_mark(cell) for cell in columns[name]] for name in kept]).T
    listed = _listed(kept)
    rule: dict[str, Any] = {}
    asked = []
    for key, there, words, choices, guess in (
        ("uncertain", marks == -1, "are -1, which is uncertain", ("negative", "positive", "ignore"), "ignore"),
        ("blank", np.isnan(marks), "are empty", ("negative", "ignore"), "negative"),
    ):
        answer = getattr(given, key)
        if answer is not None:
            rule[key] = answer
        elif there.any():
            sentence = (
                f"{int(there.sum()):,} of {marks.size:,} cells of the columns {listed} {words}: what does it stand for"
            )
            asked.append(Question(sentence, {f"--{key}": choices}, (f"--{key}", guess)))
    if asked:
        raise Unclear(asked)
    info = f"the columns {listed} say which classes an image shows, several or none"
    return SeveralForm(tuple(kept), rule, [info, *notes], tuple(name for name in flags if name not in kept))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:4])) + (", ..." if len(names) > 4 else "")


def _mark(cell: Any) -> float:
    return float("nan") if is_missing(cell) else as_number(cell) or 0.0


def of_cells(column: str, cells: Sequence[Any]) -> SeveralForm | None:
    """Returns what a card says of a column whose cells are lists, or name several classes; None for one class each."""
    if any(isinstance(cell, list | tuple | np.ndarray | set) for cell in cells):
        items = {as_text(item) for cell in cells if isinstance(cell, list | tuple | np.ndarray | set) for item in cell}
        return SeveralForm((), _with_none({}, items), [f"the cells of {column!r} are lists: an image may show several"])
    texts = {as_text(cell) for cell in cells if isinstance(cell, str) and not is_missing(cell)}
    for separator in SEPARATORS:
        single = {text for text in texts if separator not in text}
        split = {text: [part.strip() for part in text.split(separator)] for text in texts - single}
        if any(single.issuperset(parts) for parts in split.values()):
            items = single | {part for parts in split.values() for part in parts}
            info = f"cells of {column!r} name several classes with {separator!r} between them"
            return SeveralForm((), _with_none({"separator": separator}, items), [info])
    return None


def _with_none(rule: dict[str, Any], items: set[str]) -> dict[str, Any]:
    words = sorted(item for item in items if " ".join(words_of(item)) in _NONE)
    return {**rule, "none": words} if words else rule


def several_labels(
    form: SeveralForm,
    cells: Mapping[str, Sequence[Any]],
    column: str | None,
    source_names: tuple[str, ...] | None,
    where: Callable[[int], str],
) -> Labels:
    """Returns the labels of such a table, each image under the first class that it shows, with the counts of all.

    Args:
        form: how they are written.
        cells: column -> N cells.
        column: of cells that name several; None for columns of 0 and 1.
        source_names: what the source itself calls its ids, or None.
        where: row -> what to call it in an error.

    Raises:
        DataError: a cell cannot be read so.
    """
    rule = None if form.rule is None else SeveralLabels.model_validate(form.rule)
    if column is None:
        marks, names = read_flags({name: cells[name] for name in form.columns}, rule, card_names=None, where=where)
    else:
        assert rule is not None
        marks, names = read_label_sets(cells[column], rule, card_names=None, source_names=source_names, where=where)
    ids = one_class_each(marks, names, where) if rule is None else first_shown(marks)
    counts = dict(zip(names, (marks == 1).sum(axis=0).tolist(), strict=True))
    notes = list(form.notes) if rule is None else [*form.notes, in_words(marks, names)]
    return Labels([names[c] for c in ids], form.lines, notes, counts, Counter(counts))
