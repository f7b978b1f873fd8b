# SPDX-License-Identifier: Apache-2.0
"""What every reader of images shares: its limits, its errors, which frame is meant, and values that become 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
"""Largest width x height; as RGB it takes 300 MB. A small file can claim far more."""

MAX_ASPECT = 100
"""Largest ratio of the sides: resizing by the shorter side would blow a thinner strip up beyond all memory."""

MAX_FRAMES = 10_000
"""Most frames of an animation, a stack or a clip."""

TOO_LARGE = "cut the image into tiles, or scale it down"


class ImageProblem(ValueError):  # noqa: N818 - it is as often the lack of a window as an error
    """These bytes are no image that can be used; reading them again will not help."""


class DamagedImage(ImageProblem):
    """The image is cut off or damaged."""


def needs(package: str, extra: str, what: str) -> str:
    """Returns the sentence that says what to install."""
    return f"{what} needs {package}, which is not installed: `pip install 'adaptclip[{extra}]'`"


def check_size(width: int, height: int) -> None:
    """Raises ImageProblem where an image is too large, or too thin a strip."""
    if width * height > MAX_PIXELS:
        raise ImageProblem(f"{width} x {height} pixels are more than {MAX_PIXELS:,}; {TOO_LARGE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageProblem(f"{width} x {height} pixels; a side may be at most {MAX_ASPECT} times the other: crop it")


def frame_number(count: int, frames: str | int | None, what: str) -> int:
    """Returns the number, from 0, of the frame that `frames` means.

    Args:
        count: how many there are.
        frames: "first", "middle" (number N // 2 of N), a number, or None.
        what: the kind of file, for the error.

    Raises:
        ImageProblem: there are several and nothing says which, or there is no such frame.
    """
    if count > MAX_FRAMES:
        raise ImageProblem(f"{count:,} frames ({what}) are more than {MAX_FRAMES:,}; cut it into shorter files")
    if isinstance(frames, int) and 0 <= frames < count:
        return frames
    if count == 1:
        return 0
    if frames in ("first", "middle"):
        return 0 if frames == "first" else count // 2
    raise ImageProblem(
        f"an animation or stack of {count} frames ({what}), and a row needs one image. Say in the card which of them "
        "show what the label says: `frames: first`, `frames: middle`, or `frames: all` for an image of each; or save "
        "the frames you want as single images"
    )


def windowed(values: np.ndarray, window: tuple[float, float] | None, kind: str) -> np.ndarray:
    """Returns values as uint8, black to white by the window; works in parts, as eight bytes a value would be too much.

    Args:
        values: whole numbers or floats of any shape.
        window: (black, white).
        kind: what the values are, for the error.

    Raises:
        ImageProblem: there is no window, or a value is not a finite number.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageProblem(f"{int((~np.isfinite(values)).sum())} pixels are not finite numbers; replace them")
    if window is None:
        low, high = float(values.min()), float(values.max())
        raise ImageProblem(
            f"{kind} values from {low:g} to {high:g}, and nothing says which are black and white. "
            f"State it in the card for all images, for example `window: [{low:g}, {high:g}]`."
        )
    black, white = window

    def scale(numbers: np.ndarray) -> np.ndarray:
        return (np.clip((numbers.astype(np.float64) - black) / (white - black), 0, 1) * 255).round().astype(np.uint8)

    if values.dtype == np.uint16:
        return scale(np.arange(65536))[values]
    return np.concatenate([scale(part) for part in np.array_split(values, max(1, values.size // 4_000_000))])


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns the image turned by its EXIF orientation (1 to 8)."""
    if orientation == 1:
        return image
    exif = image.getexif()
    exif[0x0112] = orientation
    return ImageOps.exif_transpose(image)
