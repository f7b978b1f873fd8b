# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: TAR archives whose files of one name before the first dot are one row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from adaptclip.data.archives import Archive, open_archive
from adaptclip.data.dataset import FileStore
from adaptclip.data.file_rules import WebDatasetSource
from adaptclip.data.fingerprints import file_stamps
from adaptclip.data.image_files import IMAGE_SUFFIXES
from adaptclip.data.readers import RawRows, base_folder, check_columns, find_files, wanted_columns
from adaptclip.data.remote import is_address, local_copy, plain_address
from adaptclip.data.trees import TreePath, as_path
from adaptclip.errors import DataError, StorageError, shown
from adaptclip.files import parse_json

if TYPE_CHECKING:
    from adaptclip.data.card import Card

_TEXTS = ("cls", "cls2", "index", "id", "txt", "text", "caption", "json")
_MAX_TEXT = 2**20


def expanded(pattern: str) -> list[str]:
    """Returns the names that a pattern with number ranges means: `a-{00..02}.tar` is a-00.tar, a-01.tar, a-02.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found[1], found[2]
    if not 0 <= int(last) - int(first) < 100_000:
        raise DataError(f"the range in {pattern!r} should rise, by less than 100,000")
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expanded(pattern[: found.start()] + n + pattern[found.end() :])]


def read_webdataset(card: Card, data_root: Path | None) -> RawRows:
    """Reads shards; each row's `.cls`, `.txt` and the like are columns of that name, as are the keys of its `.json`.

    Raises:
        DataError: a shard is missing or damaged, or a row has no image.
    """
    assert isinstance(card.source, WebDatasetSource)
    wanted = wanted_columns(card, data_root)
    paths: list[Path] = []
    splits: list[str] = []
    rows: list[dict[str, Any]] = []
    passed: list[str] = []
    shards = _shards(card, card.source.files, data_root)
    for split, archives in shards.items():
        for archive in archives:
            passed += archive.words()
            for key, image, cells in _samples(archive, card.columns.image):
                check_columns(wanted, list(cells), f"{shown(archive.label)}: the row {key!r}")
                paths.append(as_path(TreePath(archive, image)))
                splits.append(split or "")
                rows.append(cells)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=file_stamps(paths),
        values={name: columns.get(name, []) for name in wanted},
        columns=card.columns,
        origin=str(base_folder(card, data_root).resolve()),
        splits=None if None in shards else splits,
        unused={name: cells for name, cells in columns.items() if name not in wanted},
        passed_over=tuple(passed),
    )


def _shards(card: Card, files: Any, data_root: Path | None) -> dict[str | None, list[Archive]]:
    by_split: dict[str | None, Any] = dict(files) if isinstance(files, dict) else {None: files}
    found: dict[str | None, list[Archive]] = {}
    for split, patterns in by_split.items():
        names = [
            name for pattern in ([patterns] if isinstance(patterns, str) else patterns) for name in expanded(pattern)
        ]
        found[split] = []
        for name in names:
            if is_address(name):
                found[split].append(open_archive(local_copy(name), label=plain_address(name)))
            else:
                found[split] += [open_archive(path) for path in find_files(card, name, data_root)[None]]
    return found


def _samples(archive: Archive, wanted: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields key, name of the image, and cells of each row."""
    groups: dict[str, dict[str, str]] = {}
    for name in archive.sizes():
        path = PurePosixPath(name)
        if path.name.startswith("."):
            continue
        stem, _, ending = path.name.partition(".")
        groups.setdefault((path.parent / stem).as_posix(), {})[ending.lower()] = name
    for key, files in groups.items():
        images = [ending for ending in files if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        if len(images) > 1 and wanted in images:
            images = [wanted]
        if len(images) != 1:
            what = (
                f"several images ({', '.join(images)}): name one by `columns: {{image: ...}}`" if images else "no image"
            )
            raise DataError(f"{shown(archive.label)}: the row {key!r} has {what}; it holds {', '.join(sorted(files))}")
        cells: dict[str, Any] = {"__key__": key}
        for ending, name in files.items():
            if ending in _TEXTS:
                cells |= _cells(archive, ending, name)
        yield key, files[images[0]], cells


def _cells(archive: Archive, ending: str, name: str) -> dict[str, Any]:
    where = f"{shown(archive.label)}/{name}"
    if archive.sizes()[name] > _MAX_TEXT:
        raise DataError(f"{where} has more than {_MAX_TEXT:,} bytes, and should hold a short text")
    try:
        text = archive.read(name).decode("utf-8-sig").strip()
        if ending != "json":
            return {ending: int(text) if ending == "cls" and re.fullmatch(r"\d+", text) else text}
        held = parse_json(text, where=where)
    except (UnicodeDecodeError, StorageError, DataError) as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(held, dict):
        return {"json": json.dumps(held)}
    return {str(key): value for key, value in held.items() if not isinstance(value, dict)}
