# SPDX-License-Identifier: Apache-2.0
"""Makes files as people have them: trees of small images, and tables beside them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from adaptclip.cli import main


def picture(seed: int) -> bytes:
    """A small PNG whose look depends on the seed alone."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, name: str | bytes, content: bytes | None = None, *, seed: int | None = None) -> None:
    """Writes a file below `root`; by default an image, another one for each name."""
    raw = name.encode() if isinstance(name, str) else name
    path = root / os.fsdecode(raw)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(int.from_bytes(raw, "big") if seed is None else seed) if content is None else content)


def tree(root: Path, folders: Mapping[str, int]) -> Path:
    """Writes so many images into each folder; a name that ends in a file's ending is that file, of no image."""
    for folder, number in folders.items():
        if Path(folder).suffix:
            put(root, folder, b"not an image")
        elif not number:
            (root / folder).mkdir(parents=True)
        for i in range(number if not Path(folder).suffix else 0):
            put(root, f"{folder}/{i}.png")
    return root


def run(argv: Sequence[str]) -> int:
    """Returns the exit code of `adaptclip` with these arguments."""
    try:
        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the command line leaves with a code")
