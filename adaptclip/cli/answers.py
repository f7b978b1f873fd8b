"""Rows that a command answers with: written as they come, to the terminal or into a file."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from adaptclip.errors import ConfigError, StorageError, shown
from adaptclip.outputs import check_file
from adaptclip.terminal import console, encodable, json_line, safe_cell

Format = Literal["table", "csv", "jsonl"]

PARTIAL = ".partial"
"""What the name of an unfinished file ends in: it has the rows that were done when the command stopped."""


class Answers:
    """Writes rows one by one in one of three formats.

    CSV and JSON lines are written as they come. A table waits for its last row, as its columns are as wide as their
    widest cell; what it has is shown when an error ends the command, too. A file gets its name when all is done, and
    is called NAME.partial until then.
    """

    def __init__(
        self,
        *,
        form: Format | None = None,
        out: Path | None = None,
        raw_csv: bool = False,
        images: Iterable[Path] = (),
    ) -> None:
        """Checks where the rows will go, before they are computed; nothing is written yet.

        Args:
            form: None goes by the ending of `out`, and is a table without one.
            out: a new file; None is standard output.
            raw_csv: leave text in CSV as it is, though a spreadsheet may run it.
            images: folders of images that are read, where no file is put.

        Raises:
            ConfigError: the format is a table, or unknown, and there is a file to write.
            StorageError: the file exists, or may not be written there (see `adaptclip.outputs`).
        """
        self.form: Format = form or _by_ending(out)
        if out is not None and self.form == "table":
            raise ConfigError("a table is for the terminal: with --out, --format is csv or jsonl")
        self._out, self._raw = out, raw_csv
        self._headings: Sequence[str] = ()
        self._rows: list[Sequence[str]] = []
        self._stream: TextIO = sys.stdout
        self.count = 0
        for path in () if out is None else (out, self._partial):  # a link to nothing is there, too
            if os.path.lexists(path):
                what = " (unfinished rows of an earlier command are called so)" if path != out else ""
                raise StorageError(f"{path} exists already{what}; choose another name, or remove it yourself")
            check_file(path, images=images)

    def start(self, columns: Sequence[str], headings: Sequence[str]) -> Answers:
        """Opens the output, for a `with` block.

        Args:
            columns: names of the cells of a row in CSV.
            headings: of the columns of a table.

        Raises:
            StorageError: the file cannot be written.
        """
        self._headings = headings
        try:
            if self._out is not None:
                self._out.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._partial.open("x", encoding="utf-8", newline="")
        except OSError as error:
            raise StorageError(f"cannot write {self._out}: {error.strerror or error}") from error
        if self.form == "csv":
            self._write_csv(columns)
        return self

    @property
    def _partial(self) -> Path:
        assert self._out is not None
        return self._out.with_name(self._out.name + PARTIAL)

    def __enter__(self) -> Answers:
        return self

    def add(self, values: Mapping[str, Any], cells: Sequence[str], shown: Sequence[str]) -> None:
        """Writes a row: `values` as a JSON line, `cells` in CSV, or `shown` in a table."""
        self.count += 1
        if self.form == "jsonl":
            self._write(json_line(values) + "\n")
        elif self.form == "csv":
            self._write_csv(cells)
        else:
            self._rows.append(shown)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.form == "table":
            self._print_table()
        if self._out is None:
            return
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            if kind is None:
                self._partial.replace(self._out)
        except OSError as problem:
            raise StorageError(f"cannot write {self._out}: {problem.strerror or problem}") from problem
        if kind is not None:
            sys.stderr.write(f"the {self.count} rows that were done are in {shown(str(self._partial))}\n")

    def _write(self, text: str) -> None:
        self._stream.write(encodable(text, self._stream))
        self._stream.flush()  # whoever reads along gets every row at once

    def _write_csv(self, cells: Iterable[str]) -> None:
        cells = list(cells) if self._raw else [safe_cell(cell) for cell in cells]
        if self._out is None and self._stream.isatty():
            cells = [shown(cell) for cell in cells]
        csv.writer(_Lines(self._write), lineterminator="\n").writerow(cells)

    def _print_table(self) -> None:
        from rich.table import Table

        table = Table(*self._headings)
        for row in self._rows:
            table.add_row(*row)
        console().print(table)


class _Lines:
    """A file for the csv writer that hands its text on."""

    def __init__(self, write: Any) -> None:
        self.write = write


def _by_ending(out: Path | None) -> Format:
    if out is None:
        return "table"
    kinds: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if out.suffix.lower() not in kinds:
        raise ConfigError(f"--out {out}: name a file that ends in {', '.join(kinds)}, or give --format")
    return kinds[out.suffix.lower()]
