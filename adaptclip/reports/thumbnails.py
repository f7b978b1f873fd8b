"""Small pictures of judged images, written into the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable

from PIL import Image

SIDE = 112
"""Longest side in pixels."""

_QUALITY = 80


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """Returns a data: URI of the image as a JPEG whose longest side is at most `side` pixels; nothing is cropped."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # No metadata is carried over: what a camera wrote into the file (place, serial number) stays out of the report.
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnails(ids: Iterable[str], picture: Callable[[str], Image.Image | None]) -> dict[str, str]:
    """Makes thumbnails of the images that `picture` knows, one per id.

    Args:
        ids: row ids, repeated ones are read once.
        picture: RGB image of a row id, or None where there is none.

    Returns:
        id -> data: URI.
    """
    found = {row: picture(row) for row in dict.fromkeys(ids)}
    return {row: thumbnail(image) for row, image in found.items() if image is not None}
