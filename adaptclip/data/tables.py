# SPDX-License-Identifier: Apache-2.0
"""Tables as people have them: CSV, TSV, JSONL, Excel and Parquet, from spreadsheets of any country, pandas or R."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.data.card_block import normalise_text
from adaptclip.errors import DataError, StorageError, shown
from adaptclip.files import dialect_of, encoding_of, not_utf_8, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[int, dict[str, Any]]
"""Line number, and column -> cell."""


@dataclass(frozen=True)
class Table:
    """A table that is being read.

    Attributes:
        columns: names in Unicode form NFC without outer blanks, all different; of JSONL those of its first row.
        rows: of every line that is not blank. CSV cells stay text, so that "007" stays "007".
        passed_over: sentences about columns that cannot be used.
        notes: sentences about how the table is read.
    """

    columns: tuple[str, ...]
    rows: Iterator[Row]
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_table(path: Path, sheet: str | None = None) -> Table:
    """Opens a table by its ending (TABLE_SUFFIXES).

    A byte order mark of UTF-8 or UTF-16 is understood, and so are commas, semicolons, tabs and bars, Excel's `sep=;`
    line, quoted line breaks, and blank lines. Columns without a name, such as the index that pandas writes, are left
    out. Cells of Excel are text as a spreadsheet shows it; of Parquet, bytes are left out and dates are text.

    Args:
        path: of the table.
        sheet: of an Excel file; None takes the only one that is not empty.

    Raises:
        DataError: another ending or encoding, two columns of one name, a package that is not installed, or (while rows
            are read) a damaged row.
    """
    suffix = path.suffix.lower()
    if suffix not in _KINDS:
        old = suffix in (".xls", ".xlsb", ".xlsm", ".ods", ".numbers")
        how = ". Save it as .xlsx or as CSV UTF-8" if old else ""
        raise DataError(f"{shown(path)}: a manifest must end in {', '.join(_KINDS)}{how}")
    if sheet is not None and suffix != ".xlsx":
        raise DataError(f"{shown(path)} has no sheets, and the sheet {sheet!r} is asked for; leave `sheet` out")
    rows = _worded(path, lambda: _KINDS[suffix](path, sheet))
    head = next(rows)
    assert isinstance(head, Table)
    return Table(head.columns, rows, head.passed_over, head.notes)  # pyright: ignore[reportArgumentType]


def _worded(path: Path, read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yields what `read` yields, and words what may go wrong."""
    try:
        yield from read()
    except UnicodeDecodeError as error:
        raise DataError(not_utf_8(path, error)) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {shown(path)}: {error}") from error


def _open_csv(path: Path, _: str | None) -> Iterator[Any]:
    dialect = dialect_of(path)
    with path.open(encoding=dialect.encoding, newline="") as file:
        for _line in range(before := dialect.before):
            file.readline()
        reader = csv.reader(file, delimiter=dialect.delimiter, strict=True)
        yield from _of_cells(path, ((reader.line_num + before, cells) for cells in reader))


def _open_excel(path: Path, sheet: str | None) -> Iterator[Any]:
    from adaptclip.data.excel import open_sheet

    with open_sheet(path, sheet) as found:
        yield from _of_cells(path, found.rows, found.notes)


def _of_cells(path: Path, lines: Iterator[tuple[int, Sequence[Any]]], notes: Sequence[str] = ()) -> Iterator[Any]:
    """Yields the table of lines of cells, the first of which are the names of the columns, and then its rows."""
    names = [normalise_text(name or "") for name in next(lines, (0, []))[1]]
    columns = _unique(names, str(path))
    unnamed = [str(i + 1) for i, name in enumerate(names) if not name]
    has_no_name = f"column {', '.join(unnamed)} of {shown(path.name)} has no name and is not used"
    yield Table(columns, iter(()), (has_no_name,) if unnamed else (), tuple(notes))
    for line, given in lines:
        cells = list(given)
        if not any(cell is not None and cell.strip() for cell in cells):
            continue
        while len(cells) > len(names) and not (cells[-1] or "").strip():
            cells.pop()
        if len(cells) != len(names):
            raise DataError(
                f"{shown(path)}, line {line}: {'more' if len(cells) > len(names) else 'fewer'} cells than the "
                f"{len(names)} columns of the first line; text with the separator in it needs quotes"
            )
        row = {name: cell for name, cell in zip(names, cells, strict=True) if name}
        _refuse_nul(row, f"{shown(path)}, line {line}")
        yield line, row


def _open_jsonl(path: Path, _: str | None) -> Iterator[Any]:
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


def _open_parquet(path: Path, _: str | None) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            own = columns_by_name(schema.names, shown(path))
            kept = {
                name: spelt
                for name, spelt in own.items()
                if not is_encoded(schema.field(spelt).type) and not re.fullmatch(r"__index_level_\d+__|", name)
            }
            yield Table(tuple(kept), iter(()))
            line = 1
            for batch in file.iter_batches(batch_size=1024, columns=list(kept.values())):
                columns = {
                    name: (column.cast(pa.string()) if pa.types.is_temporal(column.type) else column).to_pylist()
                    for name, column in ((name, batch.column(spelt)) for name, spelt in kept.items())
                }
                for cells in zip(*columns.values(), strict=True):
                    line += 1
                    row = dict(zip(columns, cells, strict=True))
                    _refuse_nul(row, f"{shown(path)}, row {line - 1}")
                    yield line, row
    except pa.ArrowException as error:
        raise DataError(f"cannot read {shown(path)}: {error}") from error


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of Arrow holds files, such as encoded images: bytes, or bytes beside a path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(is_encoded(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


_KINDS: dict[str, Callable[[Path, str | None], Iterator[Any]]] = {
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".xlsx": _open_excel,
    ".parquet": _open_parquet,
}

TABLE_SUFFIXES = tuple(_KINDS)
"""Endings of files that are taken for a table."""


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
