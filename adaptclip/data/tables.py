# SPDX-License-Identifier: Apache-2.0
"""Tables as people have them: CSV, TSV and JSONL, from spreadsheets of any country, pandas or R."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptclip.data.card_block import normalise_text
from adaptclip.errors import DataError, StorageError, shown
from adaptclip.files import dialect_of, encoding_of, not_utf_8, parse_json

Row = tuple[int, dict[str, Any]]
"""Line number, and column -> cell."""


@dataclass(frozen=True)
class Table:
    """A table that is being read.

    Attributes:
        columns: names in Unicode form NFC without outer blanks, all different; of JSONL those of its first row.
        rows: of every line that is not blank. CSV cells stay text, so that "007" stays "007".
        passed_over: sentences about columns that cannot be used.
    """

    columns: tuple[str, ...]
    rows: Iterator[Row]
    passed_over: tuple[str, ...] = ()


def open_table(path: Path) -> Table:
    """Opens a table by its ending.

    A byte order mark of UTF-8 or UTF-16 is understood, and so are commas, semicolons, tabs and bars, Excel's `sep=;`
    line, quoted line breaks, and blank lines. Columns without a name, such as the index that pandas writes, are left
    out.

    Raises:
        DataError: another ending or encoding, two columns of one name, or (while rows are read) a damaged row.
    """
    kinds = {".csv": _open_csv, ".tsv": _open_csv, ".jsonl": _open_jsonl, ".ndjson": _open_jsonl}
    if path.suffix.lower() not in kinds:
        raise DataError(f"{shown(path)}: a manifest must end in {', '.join(kinds)}")
    rows = _worded(path, lambda: kinds[path.suffix.lower()](path))
    head = next(rows)
    assert isinstance(head, Table)
    return Table(head.columns, rows, head.passed_over)  # pyright: ignore[reportArgumentType]


def _worded(path: Path, read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yields what `read` yields, and words what may go wrong."""
    try:
        yield from read()
    except UnicodeDecodeError as error:
        raise DataError(not_utf_8(path, error)) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {shown(path)}: {error}") from error


def _open_csv(path: Path) -> Iterator[Any]:
    dialect = dialect_of(path)
    with path.open(encoding=dialect.encoding, newline="") as file:
        for _ in range(before := dialect.before):
            file.readline()
        reader = csv.reader(file, delimiter=dialect.delimiter, strict=True)
        names = [normalise_text(name) for name in next(reader, [])]
        columns = _unique(names, str(path))
        unnamed = [str(i + 1) for i, name in enumerate(names) if not name]
        yield Table(
            columns,
            iter(()),
            (f"column {', '.join(unnamed)} of {shown(path.name)} has no name and is not used",) if unnamed else (),
        )
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            while len(cells) > len(names) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(names):
                raise DataError(
                    f"{shown(path)}, line {reader.line_num + before}: {'more' if len(cells) > len(names) else 'fewer'} "
                    f"cells than the {len(names)} columns of the first line; text with the separator in it needs quotes"
                )
            row = {name: cell for name, cell in zip(names, cells, strict=True) if name}
            _refuse_nul(row, f"{shown(path)}, line {reader.line_num + before}")
            yield reader.line_num + before, row


def _open_jsonl(path: Path) -> Iterator[Any]:
    seen = False
    with path.open(encoding=encoding_of(path), newline="") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"{shown(path)}, line {line}"
            try:
                row = parse_json(text, where=where, nan=True)  # pandas' NaN is an empty cell
            except StorageError as error:
                raise DataError(str(error)) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object {{...}}, got {type(row).__name__}")
            names = _unique([normalise_text(name) for name in row], where)
            if not seen:
                yield Table(names, iter(()))
                seen = True
            _refuse_nul(row, where)
            yield line, dict(zip([normalise_text(name) for name in row], row.values(), strict=True))
    if not seen:
        yield Table((), iter(()))


def _refuse_nul(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError where a cell holds a NUL: what a bad disk or copy leaves would be a name of its own."""
    for name, cell in row.items():
        if isinstance(cell, str) and "\0" in cell:
            raise DataError(f"{where}: the column {name!r} holds a NUL character, {cell!r}; the table is damaged")


def _unique(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the names that are given; raises DataError where two columns have the same one."""
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        places = " and ".join(str(i + 1) for i, name in enumerate(names) if name == twice[0])
        raise DataError(
            f"{where} has {names.count(twice[0])} columns named {twice[0]!r} (columns {places}), and nothing says "
            "which is meant; rename or remove one"
        )
    return tuple(filter(None, names))


def columns_by_name(names: Sequence[str], where: str) -> dict[str, str]:
    """Returns name as a card writes it (Unicode form NFC, no outer blanks) -> the table's own spelling.

    Raises:
        DataError: two columns have the same name.
    """
    _unique([normalise_text(name) for name in names], where)
    return {normalise_text(name): name for name in names}
