# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are images: the one list of endings, and the one way to list a folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptclip.data.links import DANGLING, dangling_kind
from adaptclip.data.masks import MASK, masks_among
from adaptclip.data.read_image import kind_of
from adaptclip.data.trees import TreePath, as_path
from adaptclip.data.video import VIDEO_SUFFIXES
from adaptclip.errors import DataError, shown
from adaptclip.words import is_junk

IMAGE_SUFFIXES = frozenset((
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".heic", ".heif", ".hif", ".dcm", ".dicom", ".dic"),
))  # fmt: skip
"""Endings (lower case) of what counts as an image in a folder; those that cannot be read are reported."""

_NEEDS = {
    ".nii": "volumes are not read: save slices as images",
    ".svs": "slides are not read: cut tiles first",
    ".ndpi": "slides are not read: cut tiles first",
    **dict.fromkeys((".zip", ".tar"), "archives: name one in a card or a table, as `photos.zip` or `photos.zip/a.png`"),
    ".dvc": "pointers of DVC: `dvc pull` fetches what they stand for",
    **DANGLING,
    **dict.fromkeys(VIDEO_SUFFIXES, "videos: say in the card which frames are images, `video: {every_seconds: 1}`"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw"), "raw photographs are not read: develop them"),
    **dict.fromkeys((".psd", ".eps", ".pdf", ".svg", ".jxl"), "not read: convert to PNG"),
}
"""Ending -> why such a file is passed over, where it may well hold an image."""

_NAMED = 3


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        images: the image files, sorted by their path below the folder (Unicode form NFC).
        passed_over: kind of what was not taken -> the files.
    """

    images: tuple[Path, ...]
    passed_over: dict[str, tuple[Path, ...]]

    def words(self) -> str:
        """What was passed over in words, by kind, with how many; empty where nothing was."""
        return passed_over_in_words([self])


def passed_over_in_words(listings: Sequence[Listing]) -> str:
    """Returns what several listings passed over: `.nii x 12 (volumes are not read: ...), no ending x 3 (...)`."""
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for listing in listings:
        for kind, paths in listing.passed_over.items():
            files[kind] += paths
    info = []
    for kind, paths in sorted(files.items(), key=lambda item: (-len(item[1]), item[0])):
        names = [name for name, _ in Counter(path.name for path in paths).most_common(_NAMED)]
        shown = ", ".join(names) + (", ..." if len(names) < len({path.name for path in paths}) else "")
        info.append(f"{kind} x {len(paths)} ({_NEEDS.get(kind) or shown})")
    return ", ".join(info)


def list_images(folder: Path, *, videos: bool = False) -> Listing:
    """Lists the images below a folder, and what is passed over; nothing else decides what a folder's images are.

    Files are taken by their ending, and those without one by their first bytes. Hidden files and folders (`._x.png`,
    `.ipynb_checkpoints`), `__MACOSX`, what viewers leave behind (`Thumbs.db`), links to folders, masks beside their
    images (`adaptclip.data.masks`) and other kinds of file are passed over and counted.

    Args:
        folder: to look into.
        videos: whether clips are taken as well, as what holds images.

    Raises:
        DataError: a folder cannot be looked into.
    """
    taken: list[Path] = []
    passed: defaultdict[str, list[Path]] = defaultdict(list)

    def stop(error: OSError) -> None:
        raise DataError(f"cannot look into {shown(error.filename)}: {error.strerror or error}") from error

    steps = folder.walk() if isinstance(folder, TreePath) else os.walk(folder, onerror=stop)
    for place, folders, names in steps:
        here = as_path(place) if isinstance(place, TreePath) else Path(place)
        for name in sorted(folders):
            path = here / name
            if is_junk(name):
                passed[_junk_kind(name)].append(path)
            elif path.is_symlink():
                passed["link to a folder"].append(path)
        folders[:] = sorted(n for n in folders if not is_junk(n))
        for name in names:
            path = here / name
            kind = _passed_over_as(path)
            if videos and kind in VIDEO_SUFFIXES:
                kind = None
            if kind is None:
                taken.append(path)
            else:
                passed[kind].append(path)
    masks = masks_among(taken, folder)
    if masks:
        passed[MASK] += masks
        taken = [path for path in taken if path not in masks]
    taken.sort(key=lambda path: unicodedata.normalize("NFC", path.relative_to(folder).as_posix()))
    return Listing(tuple(taken), {kind: tuple(sorted(paths)) for kind, paths in sorted(passed.items())})


def _junk_kind(name: str) -> str:
    return "hidden" if name.startswith(".") else "left by a program"


def is_image_file(path: Path) -> bool:
    """Whether a file is taken for an image."""
    return not path.is_dir() and _passed_over_as(path) is None


def _passed_over_as(path: Path) -> str | None:
    """Returns as what a file is passed over, or None where it is taken for an image."""
    if is_junk(path.name):
        return _junk_kind(path.name)
    if not path.is_file():
        return dangling_kind(path) if path.is_symlink() else "no ordinary file"
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    # Names such as 1.2.840.10008.1 are those of DICOM files, which go without an ending.
    if suffix and not re.fullmatch(r"\.\d*", suffix):
        return suffix
    return None if kind_by_bytes(path) == "image" else "no ending"


def kind_by_bytes(path: Path) -> str:
    """Returns what a file without an ending is by its first bytes: "image", or "no ending".

    A file that cannot be opened counts as an image: reading it then says why.
    """
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return "image"
    return "image" if kind_of(start) else "no ending"


def find_images(paths: Sequence[Path]) -> tuple[list[Path], str]:
    """Returns the image files among `paths` and, sorted, below the folders among them; and what was passed over.

    A file that is named itself is taken whatever its ending.

    Raises:
        DataError: a path does not exist, a folder cannot be looked into, or there is no image at all.
    """
    found: list[Path] = []
    listings: list[Listing] = []
    for path in paths:
        if path.is_dir():
            listings.append(list_images(path))
            found += listings[-1].images
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder {shown(path)}")
    passed = passed_over_in_words(listings)
    if not found:
        more = f"; passed over: {passed}" if passed else ""
        raise DataError(
            f"no images below {', '.join(map(shown, paths))}{more}. Images end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return found, passed
