# SPDX-License-Identifier: Apache-2.0
"""Rows of what lies in files with several images (stacks, clips), and of what DICOM files say of themselves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from adaptclip.data.columns import as_text, is_missing
from adaptclip.data.dataset import FileStore, ImageStore
from adaptclip.data.dicom import dicom_columns
from adaptclip.data.feature_rows import FeatureRows
from adaptclip.data.fingerprints import NOT_KEPT, remembered
from adaptclip.data.read_image import count_frames, kind_of
from adaptclip.data.transforms import decode_image, worded
from adaptclip.data.video import frame_at, frame_count, video_kind
from adaptclip.errors import DataError
from adaptclip.files import digest

if TYPE_CHECKING:
    from adaptclip.data.card import Card
    from adaptclip.data.readers import RawRows

_FILE, _ID = "frames:file", "frames:id"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """Which image of a file is meant: a frame by its number from 0, or, of a clip, by its time."""

    number: int
    seconds: float | None = None

    def __str__(self) -> str:
        return f"#{self.number}" if self.seconds is None else f"@{self.seconds:g}s"


@dataclass(frozen=True)
class FrameStore:
    """Frames of files that hold several, decoded when asked for; as bytes they are PPM files of 8 bits.

    Attributes:
        store: the files.
        rows: N rows of `store`.
        parts: N parts; None where the file is the image.
        window: (black, white) values of what has more than 8 bits.
    """

    store: ImageStore
    rows: Sequence[int]
    parts: Sequence[Part | None]
    window: tuple[float, float] | None = None

    def read(self, row: int) -> bytes:
        """Returns the file, or the frame as a PPM file; raises DataError when it cannot be read."""
        part, file = self.parts[row], self.rows[row]
        if part is None:
            return self.store.read(file)
        if part.seconds is None:
            image = decode_image(self.store.read(file), row=str(part), window=self.window, frames=part.number)
        else:
            with _opened(self.store, file) as stream:
                image = worded(str(part), lambda: frame_at(stream, part.seconds or 0))
        return b"P6 %d %d 255\n" % image.size + image.tobytes()

    def where(self, row: int) -> str:
        """Returns what the file is called, and which frame or time."""
        part = self.parts[row]
        return self.store.where(self.rows[row]) + (str(part) if part else "")


def _opened(store: ImageStore, row: int) -> BinaryIO:
    """The encoded bytes of a row as a file; a file on the disk is not read as a whole."""
    return store.paths[row].open("rb") if isinstance(store, FileStore) else io.BytesIO(store.read(row))


def spread(raw: RawRows, card: Card) -> RawRows:
    """Makes a row of every frame where the card wants that, and adds the columns of DICOM headers that it names.

    Frames of a file stay together: without a cluster of the card's, the file is one.

    Raises:
        DataError: a column of DICOM headers cannot be had, or a clip has too many frames.
        ResourceError: what reads the files is not installed.
    """
    if isinstance(raw.store, FeatureRows):
        return raw
    if card.dicom.cluster or card.dicom.groups:
        raw = dicom_columns(raw, card.dicom, lambda row: _opened(raw.store, row))
    if card.frames != "all" and card.video is None:
        return raw
    parts = _parts_of(raw, card)
    rows = [row for row, own in enumerate(parts) for _ in own]
    chosen = [part for own in parts for part in own]
    columns, values = raw.columns, {name: _taken(cells, rows) for name, cells in raw.values.items()}
    files = [_name(raw, row) for row in range(len(raw))]
    several = [files[row] if part else None for row, part in zip(rows, chosen, strict=True)]
    if columns.cluster is None:
        values[_FILE] = several
    else:
        own = values[columns.cluster]
        values[_FILE] = [f if is_missing(cell) else cell for f, cell in zip(several, own, strict=True)]
    ids = [files[row] for row in rows] if columns.id is None else [as_text(cell) for cell in values[columns.id]]
    values[_ID] = [name + (str(part) if part else "") for name, part in zip(ids, chosen, strict=True)]
    named = columns.id is not None or isinstance(raw.store, FileStore)
    return replace(
        raw,
        store=FrameStore(raw.store, rows, chosen, card.window),
        stamps=[_stamp(raw.stamps[row], part, card) for row, part in zip(rows, chosen, strict=True)],
        values=values,
        columns=columns.model_copy(update={"cluster": _FILE} | ({"id": _ID} if named else {})),
        splits=None if raw.splits is None else _taken(raw.splits, rows),
        unused={name: _taken(cells, rows) for name, cells in raw.unused.items()},
    )


def _parts_of(raw: RawRows, card: Card) -> list[list[Part | None]]:
    """The images of each file; one that cannot be read stays as it is, and decoding it says why."""
    every = card.video.every_seconds if card.video else None

    def counted(row: int) -> str:
        kind = "stack"
        try:
            with _opened(raw.store, row) as file:
                start = file.read(192)
                file.seek(0)
                if every is not None and video_kind(start) and not kind_of(start):
                    kind, seconds = "clip", every
                    return f"{kind} {worded(raw.store.where(row), lambda: frame_count(file, seconds))}"
                number = worded(raw.store.where(row), lambda: count_frames(file.read())) if card.frames == "all" else 1
                return f"{kind} {number}"
        except (DataError, OSError) as error:
            if "every_seconds" in str(error):
                raise
            return f"{NOT_KEPT}{kind} 1"

    kept = digest(raw.origin, str(every), str(card.frames))[:24]
    keys = [f"{stamp}|{row}" for row, stamp in enumerate(raw.stamps)]
    found: list[list[Part | None]] = []
    for text in remembered(counted, keys, store=f"frames-{kept}", title="counting frames"):
        kind, number = text.removeprefix(NOT_KEPT).split()
        if kind == "clip" and every is not None:
            found.append([Part(i, i * every) for i in range(int(number))])
        else:
            found.append([Part(i) for i in range(int(number))] if int(number) > 1 else [None])
    return found


def _taken(cells: Sequence[_T], rows: Sequence[int]) -> list[_T]:
    return [cells[row] for row in rows]


def _name(raw: RawRows, row: int) -> str:
    """What a file is called in ids: its path below the source, so that ids are the same in any place."""
    if not isinstance(raw.store, FileStore):
        return raw.store.where(row)
    path = raw.store.paths[row]
    return path.relative_to(raw.origin).as_posix() if path.is_relative_to(raw.origin) else str(path)


def _stamp(stamp: str, part: Part | None, card: Card) -> str:
    return stamp if part is None else digest(stamp, str(part), str(card.window))[:32]
