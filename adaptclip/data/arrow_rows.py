"""Readers of what the `datasets` library reads: Parquet and Arrow files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import parquet

from adaptclip.data.card import Card
from adaptclip.data.card_block import HubSource, ParquetSource, normalise_text
from adaptclip.data.dataset import ArrowStore
from adaptclip.data.fingerprints import cache_root, file_stamp
from adaptclip.data.rows import RawRows, base_folder, check_columns, find_files, wanted_columns
from adaptclip.data.tables import columns_by_name
from adaptclip.errors import DataError, shown
from adaptclip.hub import is_offline, require_hub
from adaptclip.storage import digest

if TYPE_CHECKING:
    from datasets import Dataset


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

    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
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

    wanted, image, label = wanted_columns(card), card.columns.image, card.columns.label
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
    return [names[cell] if names and isinstance(cell, int) and 0 <= cell < len(names) else cell for cell in cells]
