# SPDX-License-Identifier: Apache-2.0
"""Digests of images: of their bytes (same file), and of what they show (same image), kept on disk between runs.

The hash was chosen by measuring all pairs of three real sets (1,360 flowers, 5,421 shelf photographs, 3,661 skin
lesions) and, of 150 images each, copies that were re-encoded (JPEG quality 50), halved in size, brightened (20 %) or
cropped (3 % on every side). imagehash's 64-bit `phash` within 2 bits takes no two lesions for one, but misses 9 % of
the brightened copies; within 4 bits it mistakes 11 pairs of lesions, within 6 bits 64; `dhash` alone within 4 bits
mistakes 102. `phash` within 6 AND `dhash` within 4 mistakes none, and finds 98-100 % of the re-encoded, 99-100 % of the
halved, 93-99 % of the brightened and 33-55 % of the cropped copies. It finds 68 pairs among the flowers and 10 among
the shelves (the 58 looked at show one scene, some shot moments apart), and none among 8,000 thumbnails of 64 px.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from adaptclip.data.read_image import DECODING
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError, StorageError
from adaptclip.files import digest, read_parquet, write_parquet
from adaptclip.progress import progress_bar

if TYPE_CHECKING:
    import imagehash

_log = logging.getLogger(__name__)

PHASH_RADIUS = 6
DHASH_RADIUS = 4
MIN_CONTRAST = 4.0
"""Standard deviation of the grey values (0 to 255) of a 32 x 32 thumbnail below which an image counts as flat: the
hashes of a flat image describe its noise, and two different ones would seem equal."""

_HASH_VERSION = f"phash+dhash 1, decoding {DECODING}"
_NAMELESS = "the image"
NOT_KEPT = "!"
"""Begins what is computed again next time. No failure is ever kept: a permission, a decoder that was not installed or a
hiccup of a network is no property of the bytes, and nothing tells these from damage for certain."""
_BLOCK = 256
_CHUNK = 1_000_000
"""Pairs compared at a time; with what is computed of them they take 60 MB."""


@dataclass(frozen=True)
class Fingerprint:
    """What was found when an image was decoded.

    Attributes:
        phash: 64-bit hash of its low frequencies.
        dhash: 64-bit hash of its horizontal differences.
        flat: too little contrast for the hashes to mean anything.
        problem: why it cannot be decoded; empty when it can.
    """

    phash: int = 0
    dhash: int = 0
    flat: bool = False
    problem: str = ""

    @property
    def comparable(self) -> bool:
        """Whether its hashes may be compared."""
        return not self.flat and not self.problem


def cache_root() -> Path:
    """Returns the folder for what can be computed again: ADAPTCLIP_CACHE, or ~/.cache/adaptclip."""
    return Path(os.environ.get("ADAPTCLIP_CACHE") or Path.home() / ".cache" / "adaptclip").expanduser()


def file_stamp(path: Path) -> str:
    """Returns a key that changes with a file's place, size or times of change; also for a file that is not there."""
    try:
        stat = path.stat()
        times = (str(stat.st_mtime_ns), str(stat.st_ctime_ns))  # the first can be set back, the second cannot
        return digest([str(path.resolve()), str(stat.st_size), *times])[:32]
    except OSError:
        return digest([str(path), "missing"])[:32]


def file_stamps(paths: Sequence[Path]) -> list[str]:
    """Returns the stamp of each file; those at addresses are asked for side by side."""
    if all(isinstance(path, Path) for path in paths):
        return [file_stamp(path) for path in paths]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(file_stamp, paths))


def content_digest(data: bytes) -> str:
    """Returns the SHA-256 of encoded bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def content_digests(read: Callable[[int], bytes], stamps: Sequence[str], *, store: str) -> tuple[str, ...]:
    """Returns the SHA-256 of each image's encoded bytes; what was hashed before is not read again.

    Args:
        read: row -> encoded bytes. A row that cannot be read gets a digest of its own, not kept; `fingerprints`
            says why.
        stamps: N keys that change with the bytes.
        store: name of the file under `cache_root()` in which they are kept.
    """

    def compute(row: int) -> str:
        try:
            return content_digest(read(row))
        except DataError:
            return NOT_KEPT + digest("unreadable", stamps[row])

    found = remembered(compute, stamps, store=f"bytes-{store}", title="reading images")
    return tuple(value.removeprefix(NOT_KEPT) for value in found)


def fingerprints(
    read: Callable[[int], bytes],
    contents: Sequence[str],
    *,
    where: Callable[[int], str],
    window: tuple[float, float] | None,
    frames: str | None = None,
    store: str | None,
) -> list[Fingerprint]:
    """Decodes every image once and returns what was found; what was decoded before is not decoded again.

    What could not be decoded is tried again every time.

    Args:
        read: row -> encoded bytes.
        contents: N content digests, the keys under which the results are kept.
        where: row -> what to call it in a problem.
        window: see `decode_image`.
        frames: likewise.
        store: name of the file under `cache_root()`; None keeps nothing.
    """

    def compute(row: int) -> str:
        try:
            return _pack(fingerprint_of(decode_image(read(row), row=_NAMELESS, window=window, frames=frames)))
        except DataError as error:
            return NOT_KEPT + str(error).removeprefix(f"{_NAMELESS}: ")

    how = f"{window}|{frames}" if frames else str(window)
    keys = [f"{content}|{how}|{_HASH_VERSION}" for content in contents]
    found = remembered(compute, keys, store=f"pictures-{store}" if store else None, title="checking images")
    return [_unpack(text, where(row)) for row, text in enumerate(found)]


def fingerprint_of(image: Image.Image) -> Fingerprint:
    """Returns the hashes of a decoded image."""
    import imagehash

    grey = image.convert("L")
    contrast = float(np.asarray(grey.resize((32, 32), Image.Resampling.BOX), dtype=np.float32).std())
    # Scaling with the box filter first is three times faster than imagehash's own on large photographs.
    small = grey if max(grey.size) <= 256 else grey.reduce(max(1, min(grey.size) // 128))
    return Fingerprint(_bits(imagehash.phash(small)), _bits(imagehash.dhash(small)), contrast < MIN_CONTRAST)


def _bits(value: imagehash.ImageHash) -> int:
    return int.from_bytes(np.packbits(value.hash.flatten()).tobytes(), "big")


def _pack(one: Fingerprint) -> str:
    return f"{one.phash:016x}{one.dhash:016x}{int(one.flat)}"


def _unpack(text: str, name: str) -> Fingerprint:
    if text.startswith(NOT_KEPT):
        return Fingerprint(problem=f"{name}: {text[1:]}")
    return Fingerprint(int(text[:16], 16), int(text[16:32], 16), text[32] == "1")


def remembered(compute: Callable[[int], str], keys: Sequence[str], *, store: str | None, title: str) -> list[str]:
    """Returns one text per key, from the store or computed (in threads, as decoding leaves Python's lock).

    Args:
        compute: row -> its text; one that begins with NOT_KEPT is computed again next time.
        keys: N keys, all different where the texts may be.
        store: name of the file under `cache_root()`; None keeps nothing.
        title: what the progress bar says.
    """
    path = cache_root() / "fingerprints" / f"{store}.parquet" if store else None
    known = _load(path) if path else {}
    missing = {key: row for row, key in enumerate(keys) if key not in known}
    todo, fresh = list(missing.items()), {}
    bar = progress_bar(total=len(todo), desc=title, unit="image", leave=False)
    try:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, bar:
            # Block by block, as the pool finishes all it was given before Ctrl-C gets through.
            for start in range(0, len(todo), _BLOCK):
                block = todo[start : start + _BLOCK]
                fresh |= zip([key for key, _ in block], pool.map(compute, [row for _, row in block]), strict=True)
                bar.update(len(block))
    finally:
        if path and fresh:
            wanted = set(keys)
            good = {key: value for key, value in (known | fresh).items() if not value.startswith(NOT_KEPT)}
            _save(path, {key: value for key, value in good.items() if key in wanted})
    result = known | fresh
    return [result[key] for key in keys]


def _load(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        table, info = read_parquet(path)
        keys, values = table["key"].to_pylist(), table["value"].to_pylist()
        if info.get("digest") != digest(keys, values):
            raise ValueError(f"{path} does not hold what was written")
        return {key: value for key, value in zip(keys, values, strict=True) if not value.startswith(NOT_KEPT)}
    except (StorageError, KeyError, ValueError, TypeError, AttributeError) as error:
        _log.warning("the cached image digests are damaged and are computed again: %s", error)
        return {}


def _save(path: Path, values: Mapping[str, str]) -> None:
    import pyarrow as pa

    try:
        info = {"digest": digest(values.keys(), values.values())}
        write_parquet(path, pa.table({"key": list(values), "value": list(values.values())}), info)
    except StorageError as error:
        _log.warning("image digests are not kept for the next run: %s", error)


def similar_pairs(
    first: Sequence[Fingerprint], second: Sequence[Fingerprint] | None = None
) -> Iterator[tuple[int, int]]:
    """Yields the positions of images that look the same, except to who looks closely.

    Args:
        first: images; those that are flat or unreadable match nothing.
        second: images to compare them with; None compares `first` with itself, each pair once.

    Yields:
        (position in `first`, position in `second`); with itself, the first is smaller.
    """
    rows_a, phash_a, dhash_a = _columns(first)
    rows_b, phash_b, dhash_b = (rows_a, phash_a, dhash_a) if second is None else _columns(second)
    found = [np.zeros((2, 0), dtype=np.int64)]
    for i, j in _equal_in_a_part(dhash_a, dhash_b, parts=DHASH_RADIUS + 1):
        keep = np.bitwise_count(dhash_a[i] ^ dhash_b[j]) <= DHASH_RADIUS
        i, j = i[keep], j[keep]
        keep = np.bitwise_count(phash_a[i] ^ phash_b[j]) <= PHASH_RADIUS
        if second is None:
            keep &= i < j
        found.append(np.stack([rows_a[i[keep]], rows_b[j[keep]]]))
    # A pair that is equal in two parts was found twice.
    yield from map(tuple, np.unique(np.concatenate(found, axis=1), axis=1).T.tolist())


def _equal_in_a_part(a: np.ndarray, b: np.ndarray, *, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields positions of words that are equal in one of so many parts of their bits, some of them repeatedly.

    Words that differ in fewer bits than there are parts have a part without a difference. That leaves few of all pairs
    to be compared: time grows with the number of images rather than with its square, unless most look alike.
    """
    edges = [64 * part // parts for part in range(parts + 1)]
    for low, high in progress_bar(list(pairwise(edges)), desc="comparing images", leave=False):
        shift, mask = np.uint64(low), np.uint64(2 ** (high - low) - 1)
        key_a, key_b = (a >> shift) & mask, (b >> shift) & mask
        order = np.argsort(key_b, kind="stable")
        start = np.searchsorted(key_b[order], key_a, side="left")
        counts = np.searchsorted(key_b[order], key_a, side="right") - start
        block = 0
        while block < len(a):
            ends = np.cumsum(counts[block:])
            size = max(1, int(np.searchsorted(ends, _CHUNK, side="right")))
            rows = slice(block, block + size)
            i = np.repeat(np.arange(len(a))[rows], counts[rows])
            nth = np.arange(len(i)) - np.repeat(ends[:size] - counts[rows], counts[rows])
            yield i, order[np.repeat(start[rows], counts[rows]) + nth]
            block += size


def _columns(found: Sequence[Fingerprint]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [row for row, one in enumerate(found) if one.comparable]
    phash = np.array([found[row].phash for row in rows], dtype=np.uint64)
    return np.array(rows, dtype=np.int64), phash, np.array([found[row].dhash for row in rows], dtype=np.uint64)
