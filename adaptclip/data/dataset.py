# SPDX-License-Identifier: Apache-2.0
"""Images with their labels and attributes, decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from adaptclip.data.links import store_of, why_absent
from adaptclip.data.transforms import decode_image, read_file
from adaptclip.errors import DataError, ResourceError, listed, shown
from adaptclip.files import digest

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from adaptclip.data.card import Card

UNKNOWN = "unknown"
"""The group of a row whose attribute is missing."""

ALONE = "alone:"
"""Start of the cluster id of an image whose row names no cluster."""

UNLABELLED = "image"
"""The one class of images that have captions and no classes."""


def inside(folder: Path, name: str) -> Path:
    """Returns the path of the file `name` relative to `folder`.

    Raises:
        DataError: it leaves the folder, be it by an absolute path, by `..` or by a link, other than into a store that
            `adaptclip.data.links` knows.
    """
    root = folder.resolve()
    path = (root / name).resolve()
    if path.is_relative_to(root):
        return path
    written = Path(os.path.normpath(root / name))
    if not written.is_relative_to(root):
        raise DataError(f"the image path {name!r} leaves {folder}; a table may only name files below its own folder")
    if store_of(path, root) is None:
        raise DataError(
            f"the image path {name!r} leaves {folder} by a link to {shown(path)}; a table may only name files below "
            "its own folder, and links into a store of the hub, DVC or git-annex beside the data. Copy what it points "
            "to (`cp -rL`), or put the table into a folder that holds both"
        )
    return written


class ImageStore(Protocol):
    """Encoded images by row number. Reading never changes it, and it may be read from several threads."""

    def read(self, row: int) -> bytes:
        """Returns the encoded image; raises DataError when it cannot be read."""
        ...

    def where(self, row: int) -> str:
        """Returns what to call the row in a message, so that a person can find the image."""
        ...


@dataclass(frozen=True)
class MemoryStore:
    """Encoded images held in memory, for small embedded sets."""

    images: Sequence[bytes] = field(repr=False)
    names: Sequence[str] = field(repr=False)

    def read(self, row: int) -> bytes:
        """Returns the encoded image."""
        return self.images[row]

    def where(self, row: int) -> str:
        """Returns the row's name."""
        return f"image {self.names[row]}"


@dataclass(frozen=True)
class FileStore:
    """One file per image, read when asked for."""

    paths: Sequence[Path] = field(repr=False)

    def read(self, row: int) -> bytes:
        """Returns the file's bytes; raises DataError when there is no such file."""
        try:
            return read_file(self.paths[row])
        except DataError as error:
            absent = why_absent(self.paths[row])
            raise DataError(f"{error}; {absent}" if absent else str(error)) from error

    def where(self, row: int) -> str:
        """Returns the path, as it can be printed."""
        return shown(self.paths[row])


@dataclass(frozen=True)
class ArrowStore:
    """Images in memory-mapped Arrow files.

    Attributes:
        dataset: has a column of {bytes, path}, not decoded.
        column: its name.
        root: folder that paths must not leave; None trusts them (files that `datasets` itself downloaded).
    """

    dataset: Dataset
    column: str
    root: Path | None = None

    def read(self, row: int) -> bytes:
        """Returns the bytes in the table, or those of the file it names; raises DataError when there are neither."""
        value = self.dataset[row][self.column] or {}
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise DataError(f"column {self.column!r} is empty in this row")
        return read_file(inside(self.root, value["path"]) if self.root else Path(value["path"]))

    def where(self, row: int) -> str:
        """Returns the row's number and the file name it came with."""
        name = (self.dataset[row][self.column] or {}).get("path")
        return f"row {row}" + (f" ({name})" if name else "")


def file_names(store: ImageStore, root: str) -> tuple[str, ...] | None:
    """Returns the name of each image's file as its source has it: below `root`, or as the table says.

    Args:
        store: the images.
        root: folder that paths start from.

    Returns:
        N names, "" for an image that came without one; None where images have no files.
    """
    if isinstance(store, FileStore):
        start = f"{Path(root).as_posix()}/"  # text, as paths in archives and at addresses are no `Path`
        return tuple(
            (path.as_posix() if isinstance(path, Path) else str(path)).removeprefix(start) for path in store.paths
        )
    if not isinstance(store, ArrowStore):
        return None
    import pyarrow.compute as pc

    cells = store.dataset.with_format("arrow")[:][store.column]
    paths = pc.struct_field(cells, "path").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(path or "" for path in paths) if any(paths) else None


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Features that were computed elsewhere, in the place of images; what stands for an image's bytes are its features.

    Attributes:
        values: (V, N, D) float32, unit norm; view 0 is the evaluation transform, the others are crops to learn from.
        text: (C, D) or (C, P, D) features of the classes, of any norm.
        class_names: C names as prompts say them, in the order of `text`.
        logit_scale: of the model that made them, exp() applied.
        logit_bias: likewise, or None.
        file: what they were read from, for messages.
    """

    values: np.ndarray
    text: np.ndarray
    class_names: tuple[str, ...]
    logit_scale: float
    logit_bias: float | None
    file: str

    def read(self, row: int) -> bytes:
        """Returns the bytes of the row's features."""
        return self.values[:, row].tobytes()

    def where(self, row: int) -> str:
        """Returns the row's number and the file."""
        return f"row {row} of {self.file}"


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images of one part (train, validation or test) with their labels.

    Attributes:
        store: where the encoded images are.
        rows: (N,) int64 rows of the store.
        class_names: C names in the order of the label ids.
        ids: N stable ids, all different over all parts.
        labels: (N,) int64 class ids.
        contents: N SHA-256 digests of the encoded bytes; the same image file has the same digest in any data set.
        clusters: N cluster ids, or None where each image is its own.
        groups: attribute -> N values as text; UNKNOWN where missing.
        levels: taxonomy level -> C coarse names, one per class; coarse to fine.
        window: (black, white) values for images of more than 8 bits, see `decode_image`.
        frames: which frame of an animation or a stack, likewise.
        captions: N tuples of one or more captions, or None where the card has no such column.
        fixed_classes: whether the study fixed how many images there are of each class (card: sampling).
        multi_hot: (N, C) int8 where an image may show several classes, or none of them: 1 shows it, 0 does not, -1
            nobody knows. None where each has the one of `labels`, which otherwise is the first that it shows, or 0.
        files: N names of the images' files as the source has them, "" where an image has none; or None without files.
        cluster_name: what the source calls the clusters, such as patient_id; "" where it says nothing.
    """

    store: ImageStore
    rows: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    contents: tuple[str, ...]
    clusters: tuple[str, ...] | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    window: tuple[float, float] | None = None
    frames: str | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    fixed_classes: bool = False
    multi_hot: np.ndarray | None = None
    files: tuple[str, ...] | None = None
    cluster_name: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        """One line; the images themselves are `image(i)`."""
        more = f", groups {', '.join(self.groups)}" if self.groups else ""
        units = "" if self.clusters is None else f", {len(set(self.clusters)):,} clusters"
        what = "images" if self.has_pixels else "rows of features"
        return f"<ImageDataset: {len(self):,} {what}, {listed(self.class_names, 'classes')}{units}{more}>"

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of image `index` (0 to N - 1)."""
        return self.store.read(int(self.rows[index]))

    def where(self, index: int) -> str:
        """Returns what to call image `index` in a message."""
        return self.store.where(int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        """Decodes image `index` (0 to N - 1) to RGB, upright, at its own size.

        Raises:
            DataError: it cannot be read or decoded, or there are features and no pixels; the message names the row.
            ResourceError: the machine could not read or decode it now.
        """
        where = self.where(index)
        if not self.has_pixels:
            raise DataError(f"{where}: the card holds features that were computed elsewhere, and no images")
        try:
            data = self.read(index)
        except (DataError, ResourceError) as error:
            raise type(error)(f"{where}: {error}") from error
        return decode_image(data, row=where, window=self.window, frames=self.frames)

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """Returns the images at `indices` (0 to N - 1), in that order; class names and levels stay whole."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        return replace(
            self,
            rows=self.rows[chosen],
            ids=tuple(self.ids[i] for i in chosen),
            labels=self.labels[chosen],
            contents=tuple(self.contents[i] for i in chosen),
            clusters=None if self.clusters is None else tuple(self.clusters[i] for i in chosen),
            groups={name: tuple(values[i] for i in chosen) for name, values in self.groups.items()},
            captions=None if self.captions is None else tuple(self.captions[i] for i in chosen),
            multi_hot=None if self.multi_hot is None else self.multi_hot[chosen],
            files=None if self.files is None else tuple(self.files[i] for i in chosen),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """N names by which a person finds the images: those of their files, or the id of one that has none."""
        return self.ids if self.files is None else tuple(f or row for f, row in zip(self.files, self.ids, strict=True))

    @property
    def has_pixels(self) -> bool:
        """Whether there are images to decode; otherwise their features are all that is known (`FeatureRows`)."""
        return not isinstance(self.store, FeatureRows)

    @property
    def several(self) -> bool:
        """Whether an image may show several classes, or none of them."""
        return self.multi_hot is not None

    def class_counts(self) -> np.ndarray:
        """Returns (C,) int64 numbers of images that show each class."""
        if self.multi_hot is not None:
            return (self.multi_hot == 1).sum(axis=0)
        return np.bincount(self.labels, minlength=len(self.class_names))

    def shows(self, c: int) -> np.ndarray:
        """Returns (N,) bool, whether each image shows class c."""
        return self.labels == c if self.multi_hot is None else self.multi_hot[:, c] == 1

    def lacks(self, c: int) -> np.ndarray:
        """Returns (N,) bool, whether each image is known not to show class c."""
        return self.labels != c if self.multi_hot is None else self.multi_hot[:, c] == 0

    def kinds(self) -> list[tuple[int, ...]]:
        """Returns for each image what it counts to in a draw: its classes, or C for one that shows none of them."""
        if self.multi_hot is None:
            return [(label,) for label in self.labels.tolist()]
        none = (len(self.class_names),)
        return [tuple(np.flatnonzero(row == 1).tolist()) or none for row in self.multi_hot]

    def require_one_class(self, what: str) -> None:
        """Raises DataError where an image may show several classes; `what` begins the sentence."""
        if self.several:
            raise DataError(f"{what} is about images of one class each, and these may show several, or none of them")

    def nothing_known(self, index: int) -> bool:
        """Whether nobody knows of any class whether image `index` shows it."""
        return self.multi_hot is not None and bool((self.multi_hot[index] < 0).all())

    def label_text(self, index: int) -> str:
        """Returns the name of the class of image `index`; of several with commas between, of none "none"."""
        if self.multi_hot is None:
            return self.class_names[self.labels[index]]
        if self.nothing_known(index):
            return "not known"
        return ", ".join(self.class_names[c] for c in np.flatnonzero(self.multi_hot[index] == 1)) or "none"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over classes, ids, labels, contents, clusters, groups, levels and captions, in their order."""
        parts: list[Sequence[str]] = [self.class_names, self.ids, list(map(str, self.labels)), self.contents]
        parts.append(
            [
                str(self.window),
                *([self.frames] if self.frames else []),
                *("none" if self.clusters is None else self.clusters),
            ]
        )
        parts += [[name, *values] for columns in (self.groups, self.levels) for name, values in columns.items()]
        parts += self.captions or ()
        parts += (
            [] if self.multi_hot is None else [["several labels", *(row.tobytes().hex() for row in self.multi_hot)]]
        )
        return digest(*(digest(part) for part in parts))


@dataclass(frozen=True, eq=False)
class DomainData:
    """A data card's images in their three parts.

    Attributes:
        card: the card they were opened with.
        class_names: C names in the order of the label ids.
        train: images to learn from.
        validation: images to choose settings with; may be empty.
        test: images that are judged once, after every choice is made.
        skipped: sentences about rows that were left out.
        notes: sentences about problems that were found and that the card allows.
        worries: those of them that put every result in doubt, such as an allowed leak.
        unused_columns: column of the source that the card does not name -> number of its different values.
    """

    card: Card
    class_names: tuple[str, ...]
    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    worries: tuple[str, ...] = ()
    unused_columns: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: the parts and the classes."""
        parts = ", ".join(f"{name} {len(part):,}" for name, part in self.parts.items())
        classes = listed(self.class_names, "classes") if self.has_classes else "captions and no classes"
        return f"<DomainData {shown(self.card.name)}: images {parts}; {classes}>"

    @property
    def has_classes(self) -> bool:
        """Whether the images have labels; without, all are of the one class UNLABELLED and there are captions."""
        return self.card.columns.has_classes

    @property
    def several(self) -> bool:
        """Whether an image may show several classes, or none of them."""
        return self.test.several

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The C names as prompts say them: the card's alias where there is one.

        Raises:
            DataError: the card has captions and no classes.
        """
        if not self.has_classes:
            raise DataError(
                f"card {self.card.name} has captions and no classes, so nothing can be classified with it. Name a "
                "column of classes (columns.label), or learn from the captions with recipes/contrastive.py"
            )
        return tuple(self.card.aliases.get(name, name) for name in self.class_names)

    @property
    def parts(self) -> dict[str, ImageDataset]:
        """Part name -> images, in the order train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the three parts."""
        return digest([part.digest for part in self.parts.values()])
