"""Columns that divide the images into training and test by their values, whatever the column is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptclip.data.card_block import PARTS
from adaptclip.data.columns import as_text, is_missing
from adaptclip.data.spellings import plain
from adaptclip.words import role_of, split_part, words_of

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


def division_lines(name: str, division: Mapping[str, str]) -> str:
    """Words `splits:` of a card that follows the column, for a message."""
    parts = ", ".join(f'{part}: "{value}"' for part, value in division.items())
    return f'`splits: {{column: "{name}", {parts}}}`'
