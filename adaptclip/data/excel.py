# SPDX-License-Identifier: Apache-2.0
"""Sheets of Excel files (.xlsx) as rows of text, with what a spreadsheet hides.

Cells are text, as in CSV: a number whose format shows zeros before it ("000") has them, dates are written as
2024-03-01, `#N/A` is an empty cell, and a formula is the result that was stored with it.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptclip.errors import DataError, agree, shown

MAX_UNPACKED = 2 * 2**30
"""Bytes that an Excel file may unpack to."""

_BLOCK = 2**20
_OVERLAP = 2**12
_HIDDEN_ROW = re.compile(rb'<(?:\w+:)?row\b[^>]*\bhidden="(?:1|true)"')
_ROW = re.compile(rb'<(?:\w+:)?row\b[^>]*\br="(\d+)"')
_HIDDEN_COLUMN = re.compile(rb'<(?:\w+:)?col\b[^>]*\bhidden="(?:1|true)"')
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\b[^>]*\bref="([A-Z]+)(\d+):([A-Z]+)(\d+)"')
_NO_RESULT = re.compile(
    rb'<(?:\w+:)?c r="([A-Z]+\d+)"[^>]*>\s*<(?:\w+:)?f\b(?:[^>]*/>|[^>]*>[^<]*</(?:\w+:)?f>)\s*'
    rb"(?:<(?:\w+:)?v\s*/>|<(?:\w+:)?v></(?:\w+:)?v>)?\s*</(?:\w+:)?c>"
)


@dataclass(frozen=True)
class Sheet:
    """A sheet that is being read.

    Attributes:
        rows: number as the spreadsheet counts it, and cells; the first is the header, and all are as long as it is.
        notes: sentences about what a spreadsheet hides.
    """

    rows: Iterator[tuple[int, list[str | None]]]
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def open_sheet(path: Path, name: str | None = None) -> Iterator[Sheet]:
    """Opens a sheet.

    Args:
        path: of the Excel file.
        name: of the sheet; None takes the only one that is not empty.

    Raises:
        DataError: openpyxl is not installed, the file is damaged or locked, or it cannot be told which sheet is meant.
    """
    with _workbook(path) as book:
        names = [name] if name is not None else _filled(book)
        if name is not None and name not in book.sheetnames:
            listed = ", ".join(map(shown, book.sheetnames))
            raise DataError(f"{shown(path)} has no sheet {name!r}; its sheets are {listed}")
        if len(names) > 1:
            listed = ", ".join(shown(title) for title in names)
            raise DataError(
                f"{shown(path)} has {len(names)} sheets that are not empty ({listed}), and nothing says which is "
                "meant; name one: `sheet` in the card, or --sheet"
            )
        if not names:
            yield Sheet(iter(()))
            return
        sheet = book[names[0]]
        hidden = _hidden(path, sheet)
        rows = _filled_down(path, _rows(path, sheet, hidden.last), hidden)
        number, head = next(rows, (0, []))
        before = (f"the rows above row {number} of {shown(path.name)} are not used: the header is there",)
        notes = (*hidden.notes(path.name, sheet.title), *(before if number > hidden.first(sheet) else ()))
        yield Sheet(_with_head(path, number, head, rows), notes)


def sheet_names(path: Path) -> list[str]:
    """Returns the names of the sheets that are not empty. Raises DataError as `open_sheet` does."""
    with _workbook(path) as book:
        return _filled(book)


@contextlib.contextmanager
def _workbook(path: Path) -> Iterator[Any]:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{shown(path)}: Excel files are read with openpyxl, which is not installed: python -m pip install "
            '"adaptclip[excel]". Or save the sheet as CSV UTF-8'
        ) from error
    book = None
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(item.file_size for item in packed.infolist())
        if size > MAX_UNPACKED:
            raise DataError(f"{shown(path)} unpacks to {size / 2**30:.1f} GB; save the sheet as CSV UTF-8")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        yield book
    except (DataError, OSError, MemoryError, GeneratorExit):
        raise
    except zipfile.BadZipFile as error:
        raise DataError(
            f"cannot read {shown(path)}: it is no Excel file (.xlsx), is damaged, or is locked by a password; save it "
            "anew without one, or as CSV UTF-8"
        ) from error
    except Exception as error:  # openpyxl raises whatever the XML in the file leads to
        raise DataError(
            f"cannot read {shown(path)}: it is damaged ({type(error).__name__}: {error}); save it anew, or as CSV UTF-8"
        ) from error
    finally:
        if book is not None:
            book.close()


def _filled(book: Any) -> list[str]:
    """Names of the visible sheets with a cell that is not empty among the first rows."""
    found = []
    for sheet in book.worksheets:
        sheet.reset_dimensions()
        rows = sheet.iter_rows(max_row=200, values_only=True)
        if sheet.sheet_state == "visible" and any(cell is not None for row in rows for cell in row):
            found.append(sheet.title)
    return found


@dataclass(frozen=True)
class _Hidden:
    """What a sheet's XML says beside its cells."""

    rows: int
    columns: int
    merged: tuple[tuple[int, int, int, int], ...]
    last: int | None = None  # row with a value; there may be a million empty ones behind it

    def notes(self, file: str, title: str) -> Iterator[str]:
        where = f"of the sheet {shown(title)!r} of {shown(file)}"
        if self.rows:
            are = agree(self.rows, "row", "rows")
            yield f"{self.rows} hidden {are} {where} {agree(self.rows, 'is', 'are')} read like the others"
        if self.columns:
            yield f"hidden columns {where} are read like the others"
        down = sum(first < last for _, first, _, last in self.merged)
        if down:
            cells = agree(down, "cell", "cells")
            yield f"{down} merged {cells} {where} {agree(down, 'stands', 'stand')} for each row that {cells} cover"

    @staticmethod
    def first(sheet: Any) -> int:
        """Number of the first row that is not empty."""
        rows = sheet.iter_rows(max_row=200, values_only=True)
        return next((i for i, row in enumerate(rows, 1) if any(cell is not None for cell in row)), 0)


def _hidden(path: Path, sheet: Any) -> _Hidden:
    """Looks through the sheet's XML in blocks; openpyxl tells none of it where it reads row by row."""
    place = str(getattr(sheet, "_worksheet_path", "")).lstrip("/")
    rows, columns = set(), set()
    merged: dict[tuple[int, int, int, int], None] = {}
    with zipfile.ZipFile(path) as packed:
        if place not in packed.namelist():
            return _Hidden(0, 0, ())
        with packed.open(place) as file:
            start, kept, last, open_row = 0, b"", 0, 0
            while block := file.read(_BLOCK):
                text = kept + block
                if empty := _NO_RESULT.search(text):
                    raise DataError(
                        f"{shown(path)}: the cell {empty[1].decode()} of the sheet {shown(sheet.title)!r} holds a "
                        "formula without its result, as programs write it that do not compute; open and save the file "
                        "in a spreadsheet, or save it as CSV UTF-8"
                    )
                rows |= {start + found.start() for found in _HIDDEN_ROW.finditer(text)}
                columns |= {start + found.start() for found in _HIDDEN_COLUMN.finditer(text)}
                for found in _MERGED.finditer(text):
                    left, top, right, bottom = (part.decode() for part in found.groups())
                    merged[(_column(left), int(top), _column(right), int(bottom))] = None
                value = max(map(text.rfind, (b"<v>", b"<is>", b":v>", b":is>")))
                begun = [(found.start(), int(found[1])) for found in _ROW.finditer(text)]
                if value >= 0:  # of the last row that begins before it, here or in a block before
                    last = next((number for at, number in reversed(begun) if at < value), open_row)
                open_row = begun[-1][1] if begun else open_row
                kept = text[-_OVERLAP:]
                start += len(text) - len(kept)
    return _Hidden(len(rows), len(columns), tuple(merged), last or None)


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - 64
    return number


def _rows(path: Path, sheet: Any, last: int | None) -> Iterator[tuple[int, list[str | None]]]:
    """Yields the rows from the header on that are not empty; the header is the first row with two cells or more."""
    sheet.reset_dimensions()  # what a file says of its size may be a million empty rows
    begun = False
    for number, row in enumerate(sheet.iter_rows(max_row=last), 1):
        cells = [_text(path, cell) for cell in row]
        while cells and cells[-1] is None:
            cells.pop()
        begun = begun or len([cell for cell in cells if cell is not None]) >= 2
        if cells and begun:
            yield number, cells


def _filled_down(
    path: Path, rows: Iterator[tuple[int, list[str | None]]], hidden: _Hidden
) -> Iterator[tuple[int, list[str | None]]]:
    """Gives each row the value of a cell that is merged down to it; one that is merged across columns is refused."""
    values: dict[tuple[int, int, int, int], str | None] = {}
    header = 0
    for number, cells in rows:
        header = header or number
        for block in hidden.merged:
            left, top, right, bottom = block
            if not top <= number <= bottom:
                continue
            if left != right or (top <= header < bottom):
                raise DataError(
                    f"{shown(path)}, line {number}: cells are merged across columns or with the header, and nothing "
                    "says what stands in each; unmerge them and fill every cell"
                )
            cells += [None] * (left - len(cells))
            if number == top:
                values[block] = cells[left - 1]
            cells[left - 1] = values.get(block)
        yield number, cells


def _with_head(
    path: Path, number: int, head: list[str | None], rows: Iterator[tuple[int, list[str | None]]]
) -> Iterator[tuple[int, list[str | None]]]:
    yield number, head
    for line, cells in rows:
        if len(cells) > len(head):
            raise DataError(
                f"{shown(path)}, line {line}: a cell lies to the right of the {len(head)} columns of the header in "
                f"line {number}; give its column a name, or empty it"
            )
        yield line, cells + [None] * (len(head) - len(cells))


def _text(path: Path, cell: Any) -> str | None:
    """Returns a cell as a spreadsheet shows it."""
    value = cell.value
    if value is None or isinstance(value, bool):
        return None if value is None else str(value)
    if isinstance(value, str):
        if cell.data_type == "e":
            if value == "#N/A":
                return None
            raise DataError(f"{shown(path)}: the cell {cell.coordinate} holds the error {value}; mend its formula")
        return value
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, int | float):
        whole = float(value).is_integer()
        zeros = re.fullmatch(r"0+", str(cell.number_format or ""))
        text = str(int(value)) if whole else format(value, ".15g")
        return text.zfill(len(zeros[0])) if whole and zeros else text
    return str(value)
