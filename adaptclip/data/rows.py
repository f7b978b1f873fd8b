"""What every reader of a source gives: encoded images by row, and columns of raw cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptclip.data.card import Card
from adaptclip.data.card_block import Columns, FeaturesSource, ImageFolderSource, ManifestSource, ParquetSource, Splits
from adaptclip.data.dataset import ImageStore
from adaptclip.errors import DataError, did_you_mean


@dataclass(frozen=True)
class RawRows:
    """What a reader found, before anything is made of it.

    Attributes:
        store: the encoded images, N rows.
        stamps: N keys that change with the bytes.
        values: column -> N cells.
        columns: which of them means what.
        origin: what was read, as the name of the kept digests.
        class_names: the source's own names of integer labels, or all classes that it knows; None if it has none.
        splits: N names of source splits, or None.
        split_rule: how parts are made of them, where the source itself can tell; else the card's.
        class_levels: taxonomy levels that the source gives per class.
        passed_over: sentences about what lies at the source and was not taken.
        unused: column that the card does not name -> N cells, where these are texts, numbers or dates.
    """

    store: ImageStore
    stamps: Sequence[str]
    values: Mapping[str, Sequence[Any]]
    columns: Columns
    origin: str
    class_names: tuple[str, ...] | None = None
    splits: Sequence[str] | None = None
    split_rule: Splits | None = None
    class_levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    unused: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.stamps)


def base_folder(card: Card, data_root: Path | None) -> Path:
    """Returns the folder that the card's relative paths start from: the data root, or else the card's own folder."""
    folder = (data_root or (card.path.parent if card.path else Path.cwd())).expanduser()
    if not folder.is_dir():
        raise DataError(f"the data root {folder} is not a folder; give the one that holds the card's files")
    return folder


def card_places(card: Card, data_root: Path | None) -> tuple[list[Path], list[Path]]:
    """Returns what a card's images are read from, so that what is written can keep clear of it.

    Returns:
        Files and folders that are read, and folders that hold more than those, such as the data root.
    """
    own = [card.path] if card.path else []
    match card.source:
        case ImageFolderSource(path=path):
            return [*own, base_folder(card, data_root) / path], [base_folder(card, data_root)]
        case FeaturesSource(file=file, table=table):
            read = [path for name in (file, table) if name for path in find_files(card, name, data_root)[None]]
            return [*own, *read], [base_folder(card, data_root)]
        case ManifestSource(files=files) | ParquetSource(files=files):
            tables = [table for found in find_files(card, files, data_root).values() for table in found]
            return [*own, *tables], [base_folder(card, data_root)]
        case _:
            return own, [data_root] if data_root else []


def wanted_columns(card: Card) -> list[str]:
    """Returns the columns that the card names, without that of the image."""
    columns = card.columns
    split = card.splits.column if card.splits else None
    named = [columns.label, columns.captions, columns.id, columns.cluster, split]
    named += [*columns.groups.values(), *columns.levels.values()]
    return list(dict.fromkeys(name for name in named if name))


def check_columns(wanted: Sequence[str], found: Sequence[str], where: str) -> None:
    """Raises DataError unless all of `wanted` are among `found`."""
    for name in wanted:
        if name not in found:
            raise DataError(f"{where} has no column {name!r}, which the card names. {did_you_mean(name, found)}")


def _no_match(card: Card, pattern: str, root: Path) -> str:
    if not Path(pattern).is_absolute() and next(root.parent.glob(pattern), None):
        return f"card {card.name}: no file matches {pattern!r} under {root}; did you mean `--data-root {root.parent}`?"
    where = f"; {card.path.name} says where to get it." if card.path else "."
    return (
        f"card {card.name}: no file matches {pattern!r} under {root}. Point `--data-root` at the folder with the data"
        f"{where}"
    )


def find_files(card: Card, files: Any, data_root: Path | None) -> dict[str | None, list[Path]]:
    """Resolves globs: split name (None when the card gives no names) -> files, sorted."""
    root = base_folder(card, data_root)
    by_split: dict[str | None, Any] = dict(files) if isinstance(files, dict) else {None: files}
    found: dict[str | None, list[Path]] = {}
    for split, patterns in by_split.items():
        found[split] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            start = Path(Path(pattern).anchor) if Path(pattern).is_absolute() else root
            relative = str(Path(pattern).relative_to(start)) if Path(pattern).is_absolute() else pattern
            matches = sorted(p for p in start.glob(relative) if p.is_file() and not p.name.startswith("."))
            if not matches:
                raise DataError(_no_match(card, pattern, root.resolve()))
            found[split] += matches
    return found
