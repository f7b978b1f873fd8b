# SPDX-License-Identifier: Apache-2.0
"""`adaptclip predict`: labels and probabilities of images, written row by row to the terminal or into a file."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from adaptclip.errors import ConfigError, DataError, StorageError, shown
from adaptclip.progress import progress_bar
from adaptclip.settings import ExistingPath
from adaptclip.terminal import console, encodable, json_line, safe_cell, say, table

if TYPE_CHECKING:
    from adaptclip.artifact import Prediction

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
        from adaptclip.outputs import check_file

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
        made = table(*self._headings)
        for row in self._rows:
            made.add_row(*row)
        console().print(made)


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


def predict(
    artifact: ExistingPath,
    images: list[ExistingPath],
    /,
    *,
    format: Format | None = None,
    out: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    top_k: int = 3,
    batch_size: int = 64,
    device: str = "cpu",
    raw_csv: bool = False,
    allow_failed_gates: bool = False,
) -> int:
    """Predict images with an adapted model.

    Args:
        artifact: the artifact folder, or a run folder that holds one.
        images: images, or folders that are searched for them.
        format: table, csv or jsonl; without, a table, or what the ending of --out says.
        out: a new file for the predictions, called NAME.partial until it is complete.
        on_bad_image: stop at an unreadable image with exit code 1 (the rows before it are written), or name it on
            standard error and go on.
        top_k: classes per image.
        batch_size: images per forward pass.
        device: cpu, cuda, cuda:1 ...
        raw_csv: leave text in CSV as it is; without, what a spreadsheet would run gets a ' before it.
        allow_failed_gates: use a model although one of its gates failed.
    """
    from adaptclip.artifact import Unreadable, load
    from adaptclip.data.image_files import find_images

    answers = Answers(form=format, out=out, raw_csv=raw_csv, images=images)
    paths, passed = find_images(images)
    if passed:
        say(f"passed over: {passed}", to=sys.stderr)
    model = load(artifact, device=device, allow_failed_gates=allow_failed_gates)
    top_k, several = min(top_k, len(model.class_names)), model.thresholds is not None
    columns = [f"{what}_{k}" for k in range(1, top_k + 1) for what in ("label", "probability")]
    headings = ["image", *["labels"] * several, *(f"top {k}" for k in range(1, top_k + 1))]
    skipped = 0
    with (
        answers.start(["image", *["labels"] * several, *columns], headings),
        progress_bar(total=len(paths), desc="predicting", unit="image", leave=False) as bar,
    ):
        for found in model.stream(paths, batch_size=batch_size):
            bar.update()
            if not isinstance(found, Unreadable):
                answers.add(*_row(found, top_k, several=several))
            elif on_bad_image == "skip":
                skipped += 1
                say(f"skipped: {found.reason}", to=sys.stderr)
            else:
                raise DataError(_stopped_at(found.reason, answers.count, len(paths)))
        if skipped == len(paths):
            raise DataError(f"none of {len(paths)} images could be predicted; each is named above")
    if skipped:
        say(f"{answers.count} of {len(paths)} images were predicted, {skipped} skipped", to=sys.stderr)
    return 0


def _stopped_at(reason: str, done: int, number: int) -> str:
    more = "" if "--on-bad-image" in reason else " Leave such images out with `--on-bad-image skip`."
    return (
        f"{reason.rstrip('.')}.{more}\n{done} of {number} images were predicted before it, and their rows are written."
    )


def _row(p: Prediction, top_k: int, *, several: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """A prediction for JSON, for CSV and for the table; `several`: with all labels that are named.

    In CSV these are a JSON list, because a class may have any character in its name.
    """
    ranked = list(p.probabilities.items())[:top_k]
    values: dict[str, Any] = {"image": p.source, "label": p.label, "confidence": round(p.confidence, 6)}
    values["top"] = [{"label": name, "probability": round(value, 6)} for name, value in ranked]
    values |= {"labels": list(p.labels)} if several else {}
    named = [json_line(p.labels)] if several else []
    cells = [p.source, *named, *(cell for name, value in ranked for cell in (name, f"{value:.6f}"))]
    named = [", ".join(p.labels) or "–"] if several else []
    return values, cells, [p.source, *named, *(f"{name} {value:.1%}" for name, value in ranked)]
