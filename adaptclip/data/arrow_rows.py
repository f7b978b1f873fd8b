"""Readers of what the `datasets` library reads: Parquet and Arrow files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.data.card import Card
from adaptclip.data.card_block import HubSource, ParquetSource, normalise_text
from adaptclip.data.dataset import ArrowStore
from adaptclip.data.fingerprints import cache_root, file_stamp
from adaptclip.data.rows import RawRows, base_folder, check_columns, find_files, wanted_columns
from adaptclip.errors import DataError
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
        with _loading(f"card {card.name}: {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")):
            loaded = load_dataset(
                kind, data_files=[str(p.resolve()) for p in paths], split="train", cache_dir=str(cache_root() / "arrow")
            )
        parts.append((split, loaded))  # pyright: ignore[reportArgumentType]
    return _from_datasets(card, parts, base_folder(card, data_root))


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
    names: list[tuple[str, ...] | None] = []
    images, stamps, splits = [], [], []
    for split, part in parts:
        check_columns([image, *wanted], part.column_names, f"card {card.name}: " + (split or "the data"))
        cells = part.select_columns(wanted).with_format("arrow")[:]
        feature = part.features[label] if label else None
        names.append(tuple(normalise_text(n) for n in feature.names) if isinstance(feature, ClassLabel) else None)
        for name in wanted:
            other = part.features[name] if name != label else None
            column = cells[name].to_pylist()
            values[name].append(_names_of(column, tuple(other.names)) if isinstance(other, ClassLabel) else column)
        with _loading(f"card {card.name}: column {image!r} as encoded images"):
            images.append(part.select_columns([image]).cast_column(image, Image(decode=False)))
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
    )


def _names_of(cells: list[Any], names: tuple[str, ...] | None) -> list[Any]:
    return [names[cell] if names and isinstance(cell, int) and 0 <= cell < len(names) else cell for cell in cells]
