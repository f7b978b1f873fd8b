# SPDX-License-Identifier: Apache-2.0
"""Second tables whose columns are joined to the images by a key: a taxonomy by class, findings by patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.data.card_block import Join
from adaptclip.data.columns import as_text, is_missing
from adaptclip.data.tables import open_table
from adaptclip.errors import DataError, agree, did_you_mean, shown
from adaptclip.words import plain

if TYPE_CHECKING:
    from adaptclip.data.readers import RawRows


def joined_columns(joins: Sequence[Join], root: Path) -> set[str]:
    """Returns the columns that the tables add, without their keys.

    Raises:
        DataError: a table is missing or lacks its key.
    """
    return {name for join in joins for name in _open(join, root).columns if name != join.keys[1]}


def join_tables(raw: RawRows, joins: Sequence[Join], wanted: Sequence[str], root: Path) -> RawRows:
    """Returns the rows with the columns of the joined tables.

    Args:
        raw: rows, with the keys among their columns.
        joins: what is joined, in this order; a key may come from a table before.
        wanted: columns that the card names; the others become `unused`.
        root: folder that the tables are relative to.

    Raises:
        DataError: a key has two rows, no row fits, or a column that the card names is in both tables with other values.
    """
    for join in joins:
        raw = _joined(raw, join, wanted, root)
    both = {name: raw.unused[name] for name in wanted if name not in raw.values and name in raw.unused}
    unused = {name: cells for name, cells in raw.unused.items() if name not in both}
    return replace(raw, values={**raw.values, **both}, unused=unused)


def _open(join: Join, root: Path) -> Any:
    path = root / join.file
    if not path.is_file():
        raise DataError(
            f"there is no table {shown(path)} to join; files are relative to the card's folder or --data-root"
        )
    table = open_table(path, join.sheet)
    if join.keys[1] not in table.columns:
        raise DataError(
            f"{shown(path)} has no column {join.keys[1]!r} to join by. {did_you_mean(join.keys[1], table.columns)}"
        )
    return table


def rows_by_key(path: Path, key: str, sheet: str | None = None) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Returns the columns of a table, and value of the key -> row. Raises DataError where two rows have one value."""
    table = open_table(path, sheet)
    found: dict[str, dict[str, Any]] = {}
    lines: dict[str, int] = {}
    for line, row in table.rows:
        if is_missing(row.get(key)):
            continue
        value = as_text(row[key])
        if value in found and found[value] != row:
            raise DataError(
                f"{shown(path)} has two rows for {value!r} in the column {key!r} (lines {lines[value]} and {line}), "
                "and nothing says which is meant; leave one"
            )
        found[value], lines[value] = row, line
    return table.columns, found


def _joined(raw: RawRows, join: Join, wanted: Sequence[str], root: Path) -> RawRows:
    own, other = join.keys
    _open(join, root)
    path = root / join.file
    columns, rows = rows_by_key(path, other, join.sheet)
    cells = {**raw.unused, **raw.values}.get(own)
    if cells is None:
        known = [*raw.values, *raw.unused]
        raise DataError(
            f"{shown(path)} is joined by the column {own!r}, which the images lack. {did_you_mean(own, known)}"
        )
    keys = ["" if is_missing(cell) else as_text(cell) for cell in cells]
    missing = [key for key in keys if key and key not in rows]
    if len(missing) == sum(map(bool, keys)):
        raise DataError(_none_fits(path, join, missing, rows))
    added: dict[str, list[Any]] = {}
    for name in columns:
        if name == other:
            continue
        there = {**raw.unused, **raw.values}.get(name)
        new = [rows.get(key, {}).get(name) for key in keys]
        if there is None:
            added[name] = new
        elif name in wanted and not _agree(there, new):
            raise DataError(
                f"the column {name!r}, which the card names, is in {shown(path)} and among the images' own with other "
                "values, and nothing says which is meant; rename one"
            )
    notes = []
    if missing:
        rows_are = agree(len(missing), "image has", "images have")
        notes.append(
            f"{len(missing)} {rows_are} no row in {shown(path.name)}, joined by {own!r} (first {missing[0]!r}): what "
            "it says is unknown for them"
        )
    if spare := [key for key in rows if key not in set(keys)]:
        fit = agree(len(spare), "row fits", "rows fit")
        notes.append(f"{len(spare)} {fit} no image in {shown(path.name)}, joined by {own!r} (first {spare[0]!r})")
    return replace(
        raw,
        values={**raw.values, **{name: new for name, new in added.items() if name in wanted}},
        unused={**raw.unused, **{name: new for name, new in added.items() if name not in wanted}},
        notes=(*raw.notes, *notes),
    )


def _agree(first: Sequence[Any], second: Sequence[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(is_missing(a) or is_missing(b) or as_text(a) == as_text(b) for a, b in pairs)


def _none_fits(path: Path, join: Join, keys: Sequence[str], rows: Mapping[str, Any]) -> str:
    own, other = join.keys
    by_plain = {plain(key): key for key in rows}
    near = next(((key, by_plain[plain(key)]) for key in keys if plain(key) in by_plain), None)
    info = f": {near[0]!r} here is {near[1]!r} there; write each in one way" if near else ""
    example = f", for example {keys[0]!r}" if keys and not near else ""
    return (
        f"no image fits a row of {shown(path)}: none of the values of {own!r}{example} is in its column {other!r}{info}"
    )
