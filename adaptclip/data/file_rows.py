"""Readers of tables of image paths, folders of images, and the sets that come with the package."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptclip.data.card import Card
from adaptclip.data.card_block import Columns, EmbeddedSource, ImageFolderSource, ManifestSource
from adaptclip.data.dataset import FileStore, MemoryStore, inside
from adaptclip.data.embedded import EMBEDDED
from adaptclip.data.fingerprints import content_digest, file_stamp
from adaptclip.data.image_files import list_images, passed_over_in_words
from adaptclip.data.layouts import read_layout
from adaptclip.data.rows import RawRows, base_folder, check_columns, find_files, wanted_columns
from adaptclip.errors import DataError, StorageError, did_you_mean
from adaptclip.storage import parse_json


def read_manifest(card: Card, data_root: Path | None) -> RawRows:
    """Reads CSV, TSV or JSONL tables of image paths; see `RawRows`.

    Raises:
        DataError: a table is missing or damaged, or a path in it leaves the table's folder.
    """
    assert isinstance(card.source, ManifestSource)
    wanted, image = wanted_columns(card), card.columns.image
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    paths: list[Path] = []
    splits: list[str] = []
    found = find_files(card, card.source.files, data_root)
    for split, tables in found.items():
        for table in tables:
            for line, row in _read_table(table):
                check_columns([image, *wanted], list(row), f"{table}, line {line},")
                name = row[image]
                if not isinstance(name, str) or not name.strip():
                    raise DataError(f"{table}, line {line}: the column {image!r} should hold a path, got {name!r}")
                paths.append(inside(table.parent, name.strip()))
                splits.append(split or "")
                for column in wanted:
                    values[column].append(row[column])
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=[file_stamp(path) for path in paths],
        values=values,
        columns=card.columns,
        origin=str(base_folder(card, data_root).resolve()),
        splits=None if None in found else splits,
    )


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, cells) of a CSV, TSV or JSONL file; CSV cells stay text, so that "007" stays "007"."""
    kinds = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.suffix.lower() not in kinds:
        raise DataError(f"{path}: a manifest must end in {', '.join(kinds)}")
    try:
        yield from kinds[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        # Spreadsheets of many countries separate by semicolons.
        reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count), restkey="", strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if "" in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: {'more' if '' in row else 'fewer'} cells than the "
                    f"{len(reader.fieldnames)} columns of the first line; text with the separator in it needs quotes"
                )
            yield reader.line_num, row


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = parse_json(text, where="this line", nan=True)  # pandas' NaN is an empty cell
            except StorageError as error:
                raise DataError(f"{path}, line {line}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {line}: expected an object {{...}}, got {type(row).__name__}")
            yield line, row


def read_image_folder(card: Card, data_root: Path | None) -> RawRows:
    """Reads class folders, or split folders of class folders, as `read_layout` understands them.

    Raises:
        CardError: it cannot be told which folders are splits and which are classes.
        DataError: there is no such folder, or no class folder in it.
    """
    assert isinstance(card.source, ImageFolderSource)
    folder = base_folder(card, data_root) / card.source.path
    if not folder.is_dir():
        raise DataError(f"card {card.name}: {folder} is not a folder. Point `--data-root` at the folder that holds it")
    layout = read_layout(folder, card.splits, card.class_names)
    paths, labels, splits, listings = [], [], [], []
    for split, name, class_folder in layout.classes:
        listings.append(list_images(class_folder))
        files = listings[-1].images
        paths += files
        labels += [name] * len(files)
        splits += [split] * len(files)
    passed = passed_over_in_words(listings)
    columns = Columns(image="image", label="label")
    if card.columns != columns:
        raise DataError(
            f"card {card.name}: an image folder has no columns but its folders' names; leave `columns:` out, or "
            "list the images in a table and use `source: {kind: manifest, ...}`"
        )
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=[file_stamp(path) for path in paths],
        values={"label": labels},
        columns=columns,
        origin=str(folder.resolve()),
        class_names=tuple(sorted({name for _, name, _ in layout.classes})),
        splits=None if layout.rule.fractions else splits,
        split_rule=layout.rule,
        passed_over=(*layout.unused, *([f"no images: {passed}"] if passed else [])),
    )


def read_embedded(card: Card, data_root: Path | None) -> RawRows:
    """Makes a set that comes with the package; its groups are all reported unless the card names some.

    Raises:
        DataError: there is no such set, or it has no such option.
    """
    assert isinstance(card.source, EmbeddedSource)
    name, options = card.source.name, card.source.options
    if name not in EMBEDDED:
        raise DataError(f"card {card.name}: no embedded set {name!r}. {did_you_mean(name, EMBEDDED)}")
    allowed = inspect.signature(EMBEDDED[name]).parameters
    for option in options:
        if option not in allowed:
            raise DataError(f"card {card.name}: {name} has no option {option!r}. {did_you_mean(option, allowed)}")
    made = EMBEDDED[name](**options)
    reported = card.columns.groups or {group: group for group in made.groups}
    check_columns(list(reported.values()), list(made.groups), f"the embedded set {name}")
    values: dict[str, Any] = {"label": made.labels, "id": made.ids, "cluster": made.clusters}
    return RawRows(
        store=MemoryStore(made.images, made.ids),
        stamps=[content_digest(image) for image in made.images],
        values=values | {f"group:{group}": cells for group, cells in made.groups.items()},
        columns=Columns(
            id="id",
            cluster=None if made.clusters is None else "cluster",
            groups={group: f"group:{column}" for group, column in reported.items()},
        ),
        origin="embedded",
        class_names=made.class_names,
        splits=made.splits,
        class_levels=made.levels,
    )
