# SPDX-License-Identifier: Apache-2.0
"""Which of somebody's tables lists the images, which are parts or pieces of one, and which can be joined to it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from adaptclip.data.asking import Question, Unclear
from adaptclip.data.card_block import PARTS, normalise_text
from adaptclip.data.columns import as_text, is_missing
from adaptclip.data.layouts import class_folder_names
from adaptclip.data.table_roles import SAMPLE, lists_images
from adaptclip.data.tables import TABLE_SUFFIXES, is_encoded, open_table
from adaptclip.errors import CardError, DataError, shown
from adaptclip.words import plain, role_of, split_part


def sorted_tables(folder: Path, tables: list[Path]) -> tuple[dict[str, list[Path]], list[Path], list[Path]]:
    """Returns part -> tables of it, the tables that list images, and those that can only be joined to them.

    Raises:
        CardError: several tables list images, or none, and their names do not say which part each is.
    """
    pieces: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    for table in tables:  # train-00000-of-00002.parquet is one of two pieces of train
        stem = re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?([-_][0-9a-f]{6,})?$", "", table.stem)
        pieces[stem, table.suffix.lower()].append(table)
    if len(tables) > 1 and len(pieces) == 1:
        return {}, tables, []
    by_part = {part: [own for (stem, _), own in pieces.items() if split_part(stem)[0] == part] for part in PARTS}
    named = {part: own[0] for part, own in by_part.items() if len(own) == 1}
    used = [table for own in named.values() for table in own]
    others = [table for table in tables if table not in used]
    if {"train", "test"} <= set(named) and not any(map(image_sheets, others)):
        return named, used, others
    listing = [table for table in tables if image_sheets(table)] if len(tables) > 1 else tables
    if len(listing) != 1:
        raise too_many(folder, tables)
    return {}, listing, [table for table in tables if table != listing[0]]


def too_many(folder: Path, tables: Sequence[Path]) -> CardError:
    """The error about a folder of several tables whose parts nobody can tell."""
    listed = ", ".join(shown(table.name) for table in tables[:5])
    return CardError(
        f"{shown(folder)} holds {len(tables)} tables ({listed}); keep one, name them after their parts (train, "
        "validation, test), or give the one that lists the images itself, with --join for the others"
    )


def image_sheets(path: Path) -> list[str | None]:
    """Returns the sheets of an Excel file that list images; [None] for another table that does; [] for none."""
    if encoded_columns(path):
        return [None]
    found: list[str | None] = []
    for sheet in _sheets(path):
        table = open_table(path, sheet)
        rows = [row for _, row in islice(table.rows, SAMPLE)]
        found += [sheet] if lists_images(path, table.columns, rows) else []
    return found


def _sheets(path: Path) -> list[str | None]:
    from adaptclip.data.excel import sheet_names

    names = sheet_names(path) if path.suffix.lower() == ".xlsx" else []
    return list(names) if len(names) > 1 else [None]


def sheet_of(path: Path, asked: str | None) -> str | None:
    """Returns the sheet to read: what is asked for, or of several that are not empty the one that lists images.

    Raises:
        Unclear: several list images, or none of several.
    """
    sheets = _sheets(path)
    if asked is not None or sheets == [None]:
        return asked
    listing = image_sheets(path)
    if len(listing) == 1:
        return listing[0]
    names = [name for name in sheets if name is not None]
    what = f"{len(listing)} of them list images" if listing else "none of them has a column that looks like images"
    words = f"{shown(path)} has {len(names)} sheets ({', '.join(map(shown, names))}), and {what}"
    raise Unclear([Question(words, {"--sheet": tuple(names)}, ("--sheet", names[0]))])


def encoded_columns(path: Path) -> list[str]:
    """Returns the columns of a Parquet file that hold encoded images; [] for any other table."""
    if path.suffix.lower() != ".parquet":
        return []
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {shown(path)}: {error}") from error
    return [normalise_text(one.name) for one in schema if is_encoded(one.type)]


def encoded_column(path: Path, asked: str | None) -> str | None:
    """Returns the column of encoded images; None for a table of paths.

    Raises:
        Unclear: there are several.
    """
    found = encoded_columns(path)
    if asked is not None:
        return asked if asked in found else None
    called_so = [name for name in found if role_of(name) == "image"]
    if len(found) > 1 and len(called_so) != 1:
        flag = "--image-column"
        words = f"{shown(path)} has several columns of encoded files: {', '.join(map(shown, found))}"
        raise Unclear([Question(words, {flag: tuple(found)}, (flag, found[0]))])
    return (called_so or found or [None])[0]


def own_columns(path: Path, sheet: str | None) -> dict[str, list[Any]]:
    """Returns column -> cells of a table."""
    table = open_table(path, sheet)
    columns: dict[str, list[Any]] = {name: [] for name in table.columns}
    for _, row in table.rows:
        for name, cells in columns.items():
            cells.append(row.get(name))
    return columns


@dataclass(frozen=True)
class Key:
    """How a table is joined to the images.

    Attributes:
        path: the table.
        own: column of the images' table.
        other: column of this table.
        sheet: of an Excel file that has several.
        likely: how likely it is that this is meant: whether the columns have one name, and which share of the images'
            values is found.
    """

    path: Path
    own: str
    other: str
    sheet: str | None = None
    likely: tuple[bool, float] = (True, 1.0)

    def in_card(self, file: str) -> dict[str, Any]:
        """What the card's `join` says of it, with the file as the card calls it."""
        by = self.own if self.own == self.other else {self.own: self.other}
        return {"file": file, "by": by, **({"sheet": self.sheet} if self.sheet else {})}

    def words(self) -> str:
        """A sentence about it."""
        by = repr(self.own) if self.own == self.other else f"{self.own!r} = its {self.other!r}"
        sheet = f"the sheet {shown(self.sheet)!r} of " if self.sheet else ""
        return f"{sheet}{shown(self.path.name)} is joined to the images by {by}"


def describing_classes(folder: Path, tables: Sequence[Path]) -> list[Key]:
    """Returns how tables are joined to class folders that describe the classes and list no images."""
    folders = {normalise_text(name) for name in class_folder_names(folder)}
    found: list[Key] = []
    for path in tables:
        if encoded_columns(path) or image_sheets(path):
            continue
        for sheet in _sheets(path):
            for name, cells in own_columns(path, sheet).items():
                named = {as_text(cell) for cell in cells if not is_missing(cell)}
                if len(folders) > 1 and len(named & folders) >= len(folders) / 2:
                    found.append(Key(path, "label", name, sheet))
                    break
    return found


def join_of(text: str, own: Mapping[str, Sequence[Any]]) -> Key:
    """Reads a value of --join: FILE, FILE:COLUMN or FILE:COLUMN=ITS_COLUMN; without a column the key is found.

    Args:
        text: the value.
        own: column -> cells of the table that lists the images.

    Raises:
        CardError: there is no such table.
        Unclear: several columns could be the key, or none.
    """
    file, _, by = text.rpartition(":")
    if Path(text).expanduser().suffix.lower() in TABLE_SUFFIXES or not file:
        file, by = text, ""
    path = Path(file).expanduser()
    if not path.is_file():
        raise CardError(f"there is no table {shown(path)} to join; write --join FILE:COLUMN, or FILE:COLUMN=ITS_COLUMN")
    if by:
        first, _, second = by.partition("=")
        key = Key(path, normalise_text(first), normalise_text(second or first))
        sheets = [sheet for sheet in _sheets(path) if key.other in open_table(path, sheet).columns]
        return replace(key, sheet=sheets[0] if len(sheets) == 1 else None)
    best = _best(keys_of(path, _sheets(path), own))
    if len(best) == 1:
        return best[0]
    names = [(key.own, key.other) for key in best] or [("COLUMN", "ITS_COLUMN")]
    what = f"{len(best)} pairs of columns fit" if best else "no column of both tables has the same values"
    options = tuple(f"{file}:{a}" if a == b else f"{file}:{a}={b}" for a, b in names)
    words = f"nothing says by which column {shown(path)} is joined: {what}"
    raise Unclear([Question(words, {"--join": options}, ("--join", options[0]))])


def keys_of(path: Path, sheets: Sequence[str | None], own: Mapping[str, Sequence[Any]]) -> list[Key]:
    """Returns what could join a table, the likeliest first.

    The values of such a column of the table are all different, and half of the images' own values or more are among
    them.
    """
    values = {name: {as_text(cell) for cell in cells if not is_missing(cell)} for name, cells in own.items()}
    found: list[Key] = []
    for sheet in sheets:
        for name, cells in own_columns(path, sheet).items():
            known = [as_text(cell) for cell in cells if not is_missing(cell)]
            if len(known) < 2 or len(set(known)) < len(known):
                continue
            for other, there in values.items():
                share = len(there & set(known)) / max(1, len(there))
                if len(there) > 1 and share >= 0.5:
                    found.append(Key(path, other, name, sheet, (plain(name) == plain(other), share)))
    return sorted(found, key=lambda key: key.likely, reverse=True)


def _best(keys: Sequence[Key]) -> list[Key]:
    return [key for key in keys if key.likely == keys[0].likely]


def likely_join(path: Path, own: Mapping[str, Sequence[Any]]) -> Key | None:
    """Returns how a table that lies beside the images is joined; None where that is not clear."""
    best = _best(keys_of(path, _sheets(path), own))
    return best[0] if len(best) == 1 else None


def other_sheets(path: Path, sheet: str | None, own: Mapping[str, Sequence[Any]]) -> tuple[list[Key], list[str]]:
    """Returns how the other sheets of the Excel file are joined, and sentences about those that are not used."""
    joined: list[Key] = []
    unused: list[str] = []
    listing = image_sheets(path) if sheet is not None else []
    for name in _sheets(path) if sheet is not None else ():
        if name == sheet or name is None:
            continue
        best = _best(keys_of(path, [name], own))
        if len(best) == 1 and name not in listing:
            joined.append(best[0])
        else:
            unused.append(f"the sheet {shown(name)!r} of {shown(path.name)} is not used")
    return joined, unused
