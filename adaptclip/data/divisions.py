"""Columns that divide the images into training and test by their values, whatever the column is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adaptclip.data.card_block import PARTS
from adaptclip.data.columns import as_text, is_missing
from adaptclip.spellings import plain
from adaptclip.words import is_fold, role_of, split_part, words_of

_FOLDS = frozenset(("fold", "folds", "kfold", "cvfold", "cv", "faltung"))
_MOST_FOLDS = 20
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}


def division(name: str, cells: Sequence[Any]) -> dict[str, str]:
    """Returns part -> value of a column that says which images are for training and which for the test.

    All its values are names of parts ("train", "val", "Test"), where the column is called "split" or the like some of
    them; or it is a flag whose name says what it marks ("is_test" with 0 and 1).

    Returns:
        Parts in their order, with the values as the card must write them; {} for any other column.
    """
    values = sorted({as_text(cell) for cell in cells if not is_missing(cell)})
    named = {part: value for value in values for part in PARTS if split_part(value) == (part, "")}
    if (len(named) == len(values) or role_of(name) == "split") and {"train", "test"} <= set(named):
        return {part: named[part] for part in PARTS if part in named}
    marked, _ = split_part(" ".join(word for word in words_of(name) if word not in ("is", "in", "use", "for", "flag")))
    flags = {_FLAGS[plain(value)]: value for value in values if plain(value) in _FLAGS}
    if marked in ("train", "test") and len(values) == len(flags) == 2:
        other = "test" if marked == "train" else "train"
        found = {marked: flags[True], other: flags[False]}
        return {part: found[part] for part in PARTS if part in found}
    return {}


def folds(name: str, cells: Sequence[Any]) -> list[str]:
    """Returns the values of a column of folds ("fold" with 0 to 4, "split" with 1 to 3), sorted; [] for any other."""
    values = sorted({as_text(cell) for cell in cells if not is_missing(cell)}, key=lambda value: (len(value), value))
    called_so = role_of(name) == "split" or bool(set(words_of(name)) & _FOLDS)
    numbered = all(value.isdecimal() or is_fold(value) for value in values)
    return values if called_so and numbered and 2 <= len(values) <= _MOST_FOLDS else []


def folds_in_words(name: str, values: Sequence[str]) -> tuple[str, str]:
    """Returns what is wrong where a column of folds is not followed, and how a card follows it."""
    test, *rest = values
    validation, train = (rest[:1], rest[1:]) if len(rest) > 1 else ([], rest)
    parts = {"train": train, "validation": validation, "test": [test]}
    told = ", ".join(f"{part}: {json.dumps(names, ensure_ascii=False)}" for part, names in parts.items() if names)
    return (
        f"the column {name!r} seems to number {len(values)} folds ({', '.join(values)}), and the card does not follow "
        "it: what was kept together in one fold can be in two parts",
        "Say which values are for training and which for the test, for example "
        f"`splits: {{column: {json.dumps(name, ensure_ascii=False)}, {told}}}`",
    )


def division_lines(name: str, division: Mapping[str, str]) -> str:
    """Words `splits:` of a card that follows the column, for a message."""
    parts = ", ".join(f'{part}: "{value}"' for part, value in division.items())
    return f'`splits: {{column: "{name}", {parts}}}`'
