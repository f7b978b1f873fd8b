# SPDX-License-Identifier: Apache-2.0
"""Masks and annotations that look like images: told by their names, and only where their image lies beside them.

A file is left out where its folder or the end of its name says so (`masks/`, `segmentations/`, `annotations/`,
`ground_truth/`, `x_mask.png`, `x_segmentation.png`, `x_mask_1.png`) and an image of the same name lies beside it: in
the same folder, in the folder above, or in a folder `images` in the place of the masks' own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from adaptclip.words import words_of

MASK = "mask or annotation of an image beside it"
"""As what such a file is passed over."""

_FOLDERS = frozenset((
    *("mask", "masks", "seg", "segmentation", "segmentations", "annotation", "annotations", "gt", "groundtruth"),
    *("ground", "truth", "binary", "contours"),
))  # fmt: skip
_OF_IMAGES = frozenset(("images", "image", "imgs", "img", "jpegs", "photos", "originals", "original", "raw", "input"))
_END = re.compile(
    r"(.+?)[ _.-]+(?:mask|masks|seg|segm|segmentation|annotation|annotated|contour|gt|ground[ _-]?truth)"
    r"(?:[ _-]?\d+)?",
    re.IGNORECASE,
)


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks or annotations."""
    words = set(words_of(name))
    return words <= _FOLDERS and bool(words - {"ground", "binary"})


def masks_among(images: Sequence[Path], folder: Path) -> set[Path]:
    """Returns those of the images below a folder that are masks or annotations of others; see above."""
    keys: set[tuple[str, ...]] = set()
    doubtful: list[tuple[Path, tuple[str, ...]]] = []
    for path in images:
        *folders, stem = path.relative_to(folder).with_suffix("").parts
        end = _END.fullmatch(stem)
        kept = [name for name in folders if not is_mask_folder(name) and not set(words_of(name)) <= _OF_IMAGES]
        key = tuple(unicodedata.normalize("NFC", name).casefold() for name in (*kept, end[1] if end else stem))
        if end or any(map(is_mask_folder, folders)):
            doubtful.append((path, key))
        else:
            keys.add(key)
    return {path for path, key in doubtful if key in keys}
