# SPDX-License-Identifier: Apache-2.0
"""Reader of features that were computed elsewhere: safetensors, .npz, or .npy files with a table beside them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from adaptclip.data.card_block import FeaturesSource
from adaptclip.data.dataset import FeatureRows as FeatureRows
from adaptclip.data.fingerprints import content_digest
from adaptclip.data.readers import RawRows, check_columns, find_files, wanted_columns
from adaptclip.data.tables import open_table
from adaptclip.errors import CardError, DataError, agree, did_you_mean, shown

if TYPE_CHECKING:
    from adaptclip.data.card import Card


def read_features(card: Card, data_root: Path | None) -> RawRows:
    """Reads features, labels and columns; see `FeaturesSource` and `RawRows`.

    Raises:
        CardError: the card does not list its class names.
        DataError: the file or its table is missing or damaged, a key is missing, or shapes do not fit together.
    """
    source = card.source
    assert isinstance(source, FeaturesSource)
    if card.class_names is None:
        raise CardError(
            f"card {card.name}: features come with no words; list `class_names:` in the order of the text features"
        )
    path = _one_file(card, source.file, data_root)
    arrays = _read_arrays(path)
    image, text = _features(card, source, path, arrays)
    values = _unit(image if image.ndim == 3 else image[None], f"{shown(path)}: the image features {source.image!r}")
    num_rows = values.shape[1]
    columns = {
        name: array.tolist() for name, array in arrays.items()
        if array.ndim == 1 and len(array) == num_rows and array.dtype.kind in "biufUS"
    }  # fmt: skip
    own = card.columns
    if source.label in columns and own.label is not None:
        columns.setdefault(own.label, columns[source.label])
    flags = arrays.get(source.label)
    if card.several_labels is not None and not own.labels and flags is not None and flags.ndim == 2:
        _check_flags(flags, card.class_names, num_rows, f"{shown(path)}: the labels {source.label!r}")
        own = own.model_copy(update={"label": None, "labels": card.class_names})
        columns |= {name: flags[:, c].tolist() for c, name in enumerate(card.class_names)}
    passed_over: tuple[str, ...] = ()
    if source.table is not None:
        info, passed_over = _read_table(_one_file(card, source.table, data_root), num_rows)
        columns |= info
    wanted = [*(name for name in wanted_columns(card) if own.label or name != card.columns.label), *own.labels]
    wanted = list(dict.fromkeys(wanted))
    check_columns(wanted, list(columns), f"{shown(path)}{f' with {source.table}' if source.table else ''}")
    text = text.astype(np.float32)
    _norms(text, f"{shown(path)}: the text features {source.text!r}")
    store = FeatureRows(
        values, text, tuple(card.aliases.get(name, name) for name in card.class_names),
        source.logit_scale, source.logit_bias, shown(path.name),
    )  # fmt: skip
    used = {*wanted, source.label}
    return RawRows(
        store=store,
        stamps=[content_digest(store.read(row)) for row in range(num_rows)],
        values={name: columns[name] for name in wanted},
        columns=own,
        origin=str(path.resolve()),
        unused={name: cells for name, cells in columns.items() if name not in used},
        passed_over=passed_over,
    )


def _check_flags(flags: np.ndarray, class_names: tuple[str, ...], num_rows: int, what: str) -> None:
    if flags.shape != (num_rows, len(class_names)):
        raise DataError(
            f"{what} should be ({num_rows}, {len(class_names)}), 0 or 1 for each image and class, got {flags.shape}"
        )


ALIKE = 0.9995
"""Cosine from which two images count as near copies: the most alike of 1,005 different aerial scenes have 0.984."""

_CHUNK = 8_000_000


def near_copies(first: np.ndarray, second: np.ndarray | None = None) -> Iterator[tuple[int, int]]:
    """Yields the positions of rows that are of nearly the same direction, as after a round trip through half precision.

    Args:
        first: (N, D) unit norm.
        second: (M, D) to compare with; None compares `first` with itself, each pair once.
    """
    others = first if second is None else second
    step = max(1, _CHUNK // max(1, len(others)))
    for start in range(0, len(first), step):
        i, j = np.nonzero(first[start : start + step] @ others.T >= ALIKE)
        keep = i + start < j if second is None else np.full(len(i), True)
        yield from zip((i[keep] + start).tolist(), j[keep].tolist(), strict=True)


def _one_file(card: Card, name: str, data_root: Path | None) -> Path:
    files = find_files(card, name, data_root)[None]
    if len(files) > 1:
        raise DataError(f"card {card.name}: {name!r} fits {len(files)} files; features are read from one. Name it")
    return files[0]


def _read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a file by their keys; those of an .npy file are called "" as they have none."""
    kinds = (".safetensors", ".npz", ".npy")
    if path.suffix.lower() not in kinds:
        raise DataError(f"features are read from {', '.join(kinds)}, got {shown(path)}")
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.numpy.load_file(path)
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (
        OSError, ValueError, KeyError, EOFError, TypeError, safetensors.SafetensorError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise DataError(
            f"cannot read the features in {shown(path)}: {error}. The file is damaged, or holds Python objects "
            "instead of numbers"
        ) from error
    except (MemoryError, OverflowError) as error:
        raise DataError(
            f"cannot read the features in {shown(path)}: its header asks for more memory than there is. The file is "
            "damaged, or too large for this machine"
        ) from error


def _features(
    card: Card, source: FeaturesSource, path: Path, arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns image features (N, D) or (V, N, D), and text features (C, D) or (C, P, D), that fit together."""
    if path.suffix.lower() == ".npy":
        beside = path.parent / source.text
        if beside.suffix.lower() != ".npy" or not beside.is_file() or beside.parent != path.parent:
            raise DataError(
                f"card {card.name}: {shown(path)} holds image features alone; name the .npy file of the text features "
                f"beside it (`source: {{text: text.npy}}`), got {source.text!r}"
            )
        image, text = arrays[""], _read_arrays(beside)[""]
    else:
        for key in (source.image, source.text):
            if key not in arrays:
                raise DataError(f"{shown(path)} has no array {key!r}. {did_you_mean(key, arrays, lead='It has')}")
        image, text = arrays[source.image], arrays[source.text]
    for what, array, shapes in (
        (source.image, image, "(N, D) or (V, N, D)"),
        (source.text, text, "(C, D) or (C, P, D)"),
    ):
        if array.ndim not in (2, 3) or array.dtype.kind != "f" or not array.size:
            raise DataError(f"{shown(path)}: {what!r} should be {shapes} floats, got {array.dtype} {array.shape}")
    if image.shape[-1] != text.shape[-1]:
        raise DataError(
            f"{shown(path)}: image features are {image.shape[-1]} wide and text features {text.shape[-1]}; they come "
            "from different models, or from before the projection into the shared space"
        )
    names = card.class_names or ()
    if len(text) != len(names):
        raise DataError(
            f"card {card.name} lists {len(names)} class names, and {shown(path)} has text features of {len(text)} "
            "classes; give each class its row, in the same order"
        )
    return image, text


def _unit(features: np.ndarray, what: str) -> np.ndarray:
    """Returns features as float32 rows of unit norm; for the errors see `_norms`."""
    rows = np.asarray(features, dtype=np.float32)
    return (rows / _norms(rows, what)).astype(np.float32)


def _norms(rows: np.ndarray, what: str) -> np.ndarray:
    """Returns the norms (..., 1) of rows, float64; raises DataError where a row is not finite or has no direction."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    bad = ~np.isfinite(norms) | (norms == 0)
    if bad.any():
        number = int(bad.sum())
        which = f"{number:,} {agree(number, 'row', 'rows')} of {what} {agree(number, 'is', 'are')}"
        raise DataError(f"{which} zero or not finite, so that there is no direction")
    return norms


def _read_table(path: Path, num_rows: int) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    table = open_table(path)
    columns: dict[str, list[Any]] = {name: [] for name in table.columns}
    for _, row in table.rows:
        for name in columns:
            columns[name].append(row.get(name))
    found = len(next(iter(columns.values()), []))
    if found != num_rows:
        raise DataError(
            f"{shown(path)} has {found:,} rows and there are features of {num_rows:,} images; the table needs a row "
            "for each, in the same order"
        )
    return columns, tuple(table.passed_over)
