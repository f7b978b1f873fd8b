"""Readers of tables of image paths, folders of images, and the sets that come with the package."""

from __future__ import annotations

import inspect
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from adaptclip.data.card import Card
from adaptclip.data.card_block import Columns, EmbeddedSource, ImageFolderSource, ManifestSource
from adaptclip.data.dataset import FileStore, MemoryStore, inside
from adaptclip.data.embedded import EMBEDDED
from adaptclip.data.fingerprints import content_digest, file_stamp
from adaptclip.data.image_files import IMAGE_SUFFIXES, list_images, passed_over_in_words
from adaptclip.data.layouts import read_layout
from adaptclip.data.rows import RawRows, base_folder, check_columns, find_files, wanted_columns
from adaptclip.data.tables import open_table
from adaptclip.errors import DataError, did_you_mean, shown


def read_manifest(card: Card, data_root: Path | None) -> RawRows:
    """Reads CSV, TSV or JSONL tables of image paths; see `RawRows`.

    Raises:
        DataError: a table is missing or damaged, or a path in it leaves the table's folder.
    """
    assert isinstance(card.source, ManifestSource)
    wanted, image = wanted_columns(card), card.columns.image
    columns: dict[str, list[Any]] = {}
    paths: list[Path] = []
    splits: list[str] = []
    passed_over: list[str] = []
    found = find_files(card, card.source.files, data_root)
    for split, files in found.items():
        for file in files:
            table, places = open_table(file), ImagePlaces(file)
            passed_over += table.passed_over
            for line, row in table.rows:
                check_columns([image, *wanted], list(row), f"{shown(file)}, line {line},")
                for name, cell in row.items():
                    column = columns.setdefault(name, [])
                    column += [None] * (len(paths) - len(column))  # earlier tables may lack it
                    column.append(cell)
                paths.append(places.path(row[image], column=image, line=line))
                splits.append(split or "")
    for column in columns.values():
        column += [None] * (len(paths) - len(column))
    values: dict[str, Any] = {name: columns.get(name, []) for name in wanted}
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=[file_stamp(path) for path in paths],
        values=values,
        columns=card.columns,
        origin=str(base_folder(card, data_root).resolve()),
        splits=None if None in found else splits,
        unused={name: cells for name, cells in columns.items() if name not in (image, *wanted)},
        passed_over=tuple(passed_over),
    )


class ImagePlaces:
    """Finds the images that a table names, relative to the table's own folder.

    Args:
        table: the table's file.
    """

    def __init__(self, table: Path) -> None:
        self._table = table
        self._without_ending: dict[Path, dict[str, list[Path]]] = {}

    def path(self, name: Any, *, column: str, line: int) -> Path:
        """Returns the path of an image.

        Backslashes separate folders where there is no file of that very name, and an ending may be left out where a
        single image fits.

        Raises:
            DataError: the cell holds no path, or one that cannot be one below the table's folder.
        """
        where = f"{shown(self._table)}, line {line}: the column {column!r}"
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where} should hold a path, got {name!r}")
        name = name.strip()
        if "\0" in name:
            raise DataError(f"{where} holds a NUL character: {name!r}; the table is damaged")
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
            raise DataError(f"{where} holds a web address, {name!r}; download the images and name their files")
        if PureWindowsPath(name).drive or name.startswith("\\"):
            last = PureWindowsPath(name).name
            there = f"; {last} is there, so that the last part of each path would do" * (self._folder / last).is_file()
            raise DataError(
                f"{where} holds paths of a Windows machine, {name!r}. Paths are relative to the table's own folder, "
                f"{shown(self._folder)}: put the images there, or in folders below it, and take "
                f"{name.removesuffix(last)!r} away from each path{there}"
            )
        if "\\" in name and not (self._folder / name).exists():
            name = name.replace("\\", "/")
        path = inside(self._folder, name)
        return path if path.suffix or path.exists() else self._with_ending(path, where)

    @property
    def _folder(self) -> Path:
        return self._table.parent

    def _with_ending(self, path: Path, where: str) -> Path:
        if path.parent not in self._without_ending:
            known = self._without_ending[path.parent] = {}
            for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    known.setdefault(file.stem, []).append(file)
        fitting = self._without_ending[path.parent].get(path.name, [])
        if len(fitting) > 1:
            names = ", ".join(shown(file.name) for file in fitting)
            raise DataError(f"{where} holds {path.name!r} without an ending, and several images fit: {names}")
        return fitting[0] if fitting else path


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
