# SPDX-License-Identifier: Apache-2.0
"""Readers of sources: encoded images by row, and columns of raw cells.

Tables of image paths, folders of images, the sets that come with the package, and what the `datasets` library reads:
Parquet and Arrow files, and data sets of the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import parquet

from adaptclip.data.archives import Archive, in_archive
from adaptclip.data.card_block import (
    Columns,
    EmbeddedSource,
    FeaturesSource,
    HubSource,
    ImageFolderSource,
    Join,
    ManifestSource,
    ParquetSource,
    Splits,
    normalise_text,
)
from adaptclip.data.dataset import ArrowStore, FileStore, ImageStore, MemoryStore
from adaptclip.data.fingerprints import cache_root, content_digest, file_stamp, file_stamps
from adaptclip.data.image_files import list_images, passed_over_in_words
from adaptclip.data.image_places import ImagePlaces
from adaptclip.data.joins import join_tables, joined_columns
from adaptclip.data.layouts import read_layout
from adaptclip.data.remote import at_address, is_address
from adaptclip.data.tables import columns_by_name, open_table
from adaptclip.data.trees import TreePath
from adaptclip.datasets.embedded import EMBEDDED
from adaptclip.errors import DataError, did_you_mean, shown
from adaptclip.files import digest
from adaptclip.hub import is_offline, require_hub
from adaptclip.terminal import is_terminal

if TYPE_CHECKING:
    from datasets import Dataset

    from adaptclip.data.card import Card


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
        notes: sentences about how what is there was understood.
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
    notes: tuple[str, ...] = ()

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
    joins = [base_folder(card, data_root) / join.file for join in joins_of(card)]
    match card.source:
        case ImageFolderSource(path=path) if is_address(path):
            return [*own, *joins], [base_folder(card, data_root)]
        case ImageFolderSource(path=path):
            return [*own, base_folder(card, data_root) / path, *joins], [base_folder(card, data_root)]
        case FeaturesSource(file=file, table=table):
            read = [path for name in (file, table) if name for path in find_files(card, name, data_root)[None]]
            return [*own, *read], [base_folder(card, data_root)]
        case ManifestSource(files=files) | ParquetSource(files=files):
            tables = [table for found in find_files(card, files, data_root).values() for table in found]
            return [*own, *tables, *joins], [base_folder(card, data_root)]
        case _:
            return own, [data_root] if data_root else []


def named_columns(card: Card) -> list[str]:
    """Returns the columns that the card names, without that of the image."""
    columns = card.columns
    split = card.splits.column if card.splits else None
    named = [columns.label, *columns.labels, columns.captions, columns.id, columns.cluster, split]
    named += [*columns.groups.values(), *columns.levels.values()]
    return list(dict.fromkeys(name for name in named if name))


def wanted_columns(card: Card, data_root: Path | None = None) -> list[str]:
    """Returns those of `named_columns` that the images' own table must have, with the keys of joins."""
    joins = joins_of(card)
    joined = joined_columns(joins, base_folder(card, data_root)) if joins else set()
    keys = [join.keys[0] for join in joins]
    return list(dict.fromkeys(name for name in [*named_columns(card), *keys] if name not in joined))


def joins_of(card: Card) -> tuple[Join, ...]:
    """Returns what the card joins; () for sources that nothing is joined to."""
    return getattr(card.source, "join", ())


def joined(card: Card, raw: RawRows, data_root: Path | None) -> RawRows:
    """Returns the rows with the columns of the tables that the card joins."""
    joins = joins_of(card)
    return join_tables(raw, joins, named_columns(card), base_folder(card, data_root)) if joins else raw


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


def read_manifest(card: Card, data_root: Path | None) -> RawRows:
    """Reads tables of image paths (CSV, TSV, JSONL, Excel, Parquet); see `RawRows`.

    Raises:
        DataError: a table is missing or damaged, or a path in it leaves the table's folder.
    """
    assert isinstance(card.source, ManifestSource)
    wanted, image = wanted_columns(card, data_root), card.columns.image
    columns: dict[str, list[Any]] = {}
    paths: list[Path] = []
    splits: list[str] = []
    passed_over: list[str] = []
    notes: list[str] = []
    found = find_files(card, card.source.files, data_root)
    for split, files in found.items():
        for file in files:
            table, places = open_table(file, card.source.sheet), ImagePlaces(file)
            passed_over += table.passed_over
            notes += table.notes
            for line, row in table.rows:
                check_columns([image, *wanted], list(row), f"{shown(file)}, line {line},")
                for name, cell in row.items():
                    column = columns.setdefault(name, [])
                    column += [None] * (len(paths) - len(column))  # earlier tables may lack it
                    column.append(cell)
                paths.append(places.path(row[image], column=image, line=line))
                splits.append(split or "")
            notes += places.notes()
    for column in columns.values():
        column += [None] * (len(paths) - len(column))
    values: dict[str, Any] = {name: columns.get(name, []) for name in wanted}
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=file_stamps(paths),
        values=values,
        columns=card.columns,
        origin=str(base_folder(card, data_root).resolve()),
        splits=None if None in found else splits,
        unused={name: cells for name, cells in columns.items() if name not in (image, *wanted)},
        passed_over=tuple(passed_over),
        notes=tuple(notes),
    )


def folder_of_images(card: Card, data_root: Path | None) -> Path:
    """Returns the folder that an image folder's card names, or what stands for it: an archive, or an address."""
    assert isinstance(card.source, ImageFolderSource)
    path, base = card.source.path, base_folder(card, data_root)
    return at_address(path) if is_address(path) else in_archive(base, path) or base / path


def left_out(folder: Path) -> tuple[str, ...]:
    """Returns sentences about entries of an archive that are not read."""
    return folder.tree.words() if isinstance(folder, TreePath) and isinstance(folder.tree, Archive) else ()


def read_image_folder(card: Card, data_root: Path | None) -> RawRows:
    """Reads class folders, or split folders of class folders, as `read_layout` understands them.

    Raises:
        CardError: it cannot be told which folders are splits and which are classes.
        DataError: there is no such folder, or no class folder in it.
    """
    assert isinstance(card.source, ImageFolderSource)
    folder = folder_of_images(card, data_root)
    if not folder.is_dir():
        raise DataError(f"card {card.name}: {folder} is not a folder. Point `--data-root` at the folder that holds it")
    layout = read_layout(folder, card.splits, card.class_names, len(card.source.levels))
    paths, labels, splits, listings = [], [], [], []
    for split, name, class_folder in layout.classes:
        listings.append(list_images(class_folder, videos=card.video is not None))
        files = listings[-1].images
        paths += files
        labels += [name] * len(files)
        splits += [split] * len(files)
    passed = passed_over_in_words(listings)
    above = {name: [layout.levels[label][i] for label in labels] for i, name in enumerate(card.source.levels)}
    wanted = set(wanted_columns(card, data_root)) - {"label", *above}
    if wanted or (card.columns.image, card.columns.label) != ("image", "label"):
        raise DataError(
            f"card {card.name}: an image folder has no columns but its folders' names; leave `columns:` out, join a "
            "table with `source: {join: [{file: ..., by: {label: ...}}]}`, or list the images in a table and use "
            "`source: {kind: manifest, ...}`"
        )
    return RawRows(
        store=FileStore(tuple(paths)),
        stamps=file_stamps(paths),
        values={"label": labels, **above},
        columns=card.columns.model_copy(update={"levels": {**{name: name for name in above}, **card.columns.levels}}),
        origin=str(folder.resolve()),
        class_names=tuple(sorted({name for _, name, _ in layout.classes})),
        splits=None if layout.rule.fractions else splits,
        split_rule=layout.rule,
        passed_over=(*layout.unused, *([f"no images: {passed}"] if passed else []), *left_out(folder)),
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


def read_parquet_files(card: Card, data_root: Path | None) -> RawRows:
    """Reads Parquet or Arrow files, memory-mapped; see `RawRows`.

    Raises:
        DataError: a file or column is missing or damaged.
    """
    from datasets import load_dataset  # seconds to import, and not every card needs it

    assert isinstance(card.source, ParquetSource)
    parts: list[tuple[str | None, Dataset]] = []
    for split, paths in find_files(card, card.source.files, data_root).items():
        kind = "arrow" if paths[0].suffix == ".arrow" else "parquet"
        for path in paths if kind == "parquet" else ():
            _refuse_equal_columns(path)
        with _loading(f"card {card.name}: {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")):
            loaded = load_dataset(
                kind, data_files=[str(p.resolve()) for p in paths], split="train", cache_dir=str(cache_root() / "arrow")
            )
        parts.append((split, loaded))  # pyright: ignore[reportArgumentType]
    return _from_datasets(card, parts, base_folder(card, data_root))


def _refuse_equal_columns(path: Path) -> None:
    """Raises DataError where a Parquet file has two columns of one name, which its readers word badly or not at all."""
    with _loading(shown(path)):
        names = parquet.read_schema(path).names
    columns_by_name(names, shown(path))


def read_hub(card: Card, data_root: Path | None) -> RawRows:
    """Reads a data set of the hub, from a local copy under the data root, from the cache, or by downloading it.

    Raises:
        DataError: it is nowhere on this machine and the hub cannot be reached (at once), or it cannot be loaded.
    """
    from datasets import load_dataset

    assert isinstance(card.source, HubSource)
    source, name = card.source, card.source.id.rpartition("/")[2]
    if data_root is not None:
        candidates = [data_root / source.id, data_root / name, data_root / card.name]
        local = next((folder for folder in candidates if folder.is_dir()), None)
        if local is None:
            tried = ", ".join(str(folder) for folder in candidates)
            raise DataError(f"card {card.name}: no local copy of {source.id} under the data root; looked for {tried}")
        with _loading(f"card {card.name}: the local copy {local}"):
            loaded = load_dataset(str(local), name=source.config, cache_dir=str(cache_root() / "arrow"))
    else:
        _check_reachable(card.name, source.id)
        with _loading(f"card {card.name}: {source.id} of the hub"):
            loaded = load_dataset(source.id, name=source.config, revision=source.revision)
    parts = loaded.items()  # pyright: ignore[reportAttributeAccessIssue]
    return _from_datasets(card, [(str(split), part) for split, part in parts], None)


def _check_reachable(card_name: str, hub_id: str) -> None:
    """Raises at once, rather than after the retries of the download, unless there is a copy or a network."""
    from datasets import config

    cached = (Path(config.HF_DATASETS_CACHE) / hub_id.replace("/", "___")).is_dir()
    if cached and is_offline():
        return
    try:
        require_hub(f"The images of card {card_name} ({hub_id})", error=DataError)
    except DataError as error:
        hint = " A downloaded copy seems to be in the cache: set HF_HUB_OFFLINE=1 to use it." if cached else ""
        raise DataError(f"{error}{hint}") from error


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Words whatever `datasets` raises, and keeps its progress bars off where there is no terminal."""
    import datasets

    quiet = not is_terminal(sys.stderr) and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # the loaders raise whatever their file formats and the network do
        cause = error.__cause__ or error
        raise DataError(f"{what} cannot be loaded ({type(cause).__name__}: {cause})") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _from_datasets(card: Card, parts: list[tuple[str | None, Dataset]], root: Path | None) -> RawRows:
    from datasets import ClassLabel, Image, concatenate_datasets

    wanted, image, label = wanted_columns(card, root), card.columns.image, card.columns.label
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    others = set.intersection(*(_plain_columns(part) for _, part in parts)) - {image, *wanted}
    unused: dict[str, list[Any]] = {name: [] for name in sorted(others)}
    names: list[tuple[str, ...] | None] = []
    images, stamps, splits = [], [], []
    for split, part in parts:
        where = f"card {card.name}: " + (split or "the data")
        own = columns_by_name(part.column_names, where)
        check_columns([image, *wanted], list(own), where)
        cells = part.select_columns([own[name] for name in (*wanted, *unused)]).with_format("arrow")[:]
        feature = part.features[own[label]] if label else None
        feature = getattr(feature, "feature", feature)  # of a list of labels, its items
        names.append(tuple(normalise_text(n) for n in feature.names) if isinstance(feature, ClassLabel) else None)
        for name in (*wanted, *unused):
            other = part.features[own[name]] if name != label else None
            column = cells[own[name]].to_pylist()
            column = _names_of(column, tuple(other.names)) if isinstance(other, ClassLabel) else column
            (values if name in values else unused)[name].append(column)
        with _loading(f"card {card.name}: column {image!r} as encoded images"):
            encoded = part.select_columns([own[image]]).rename_columns({own[image]: image})
            images.append(encoded.cast_column(image, Image(decode=False)))
        stamp = digest(*(file_stamp(Path(file["filename"])) for file in part.cache_files))[:16]
        stamps += [f"{stamp}:{row}" for row in range(len(part))]
        splits += [split or ""] * len(part)
    class_names = names[0] if len(set(names)) == 1 else None
    if class_names is None and label:
        # Parts that were stored apart may number different classes: their names are what they agree on.
        values[label] = [_names_of(c, n) for c, n in zip(values[label], names, strict=True)]
    return RawRows(
        store=ArrowStore(concatenate_datasets(images), image, root),
        stamps=stamps,
        values={name: [cell for cells in columns for cell in cells] for name, columns in values.items()},
        columns=card.columns,
        origin=str(root),
        class_names=class_names,
        splits=None if parts[0][0] is None else splits,
        unused={name: [cell for cells in columns for cell in cells] for name, columns in unused.items()},
    )


def _plain_columns(part: Dataset) -> set[str]:
    """Columns of texts, numbers and dates; images, lists and bytes are too large to look through."""
    from datasets import ClassLabel, Value

    plain = [
        name
        for name, feature in part.features.items()
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "binary" not in feature.dtype)
    ]
    return {normalise_text(name) for name in plain}


def _names_of(cells: list[Any], names: tuple[str, ...] | None) -> list[Any]:
    if any(isinstance(cell, list) for cell in cells):
        return [_names_of(cell or [], names) for cell in cells]
    return [names[cell] if names and isinstance(cell, int) and 0 <= cell < len(names) else cell for cell in cells]
