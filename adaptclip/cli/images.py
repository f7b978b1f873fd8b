"""The images that commands are given: files, and folders that are searched for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptclip.errors import DataError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Files that are taken from a folder of images."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Returns the image files among `paths` and, in sorted order, below the folders among them.

    Raises:
        DataError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder {path}")
    if not found:
        raise DataError(f"no images below {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found
