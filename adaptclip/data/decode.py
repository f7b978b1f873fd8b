"""The one way from an encoded image to RGB pixels, for training, evaluation and serving alike."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from adaptclip.errors import DataError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""What may be decoded. PIL reads more, but some of it starts other programs (EPS) or holds no photographs."""

MAX_PIXELS = 100_000_000
"""Largest width x height; as RGB it takes 300 MB. A small file can claim far more."""

MAX_ASPECT = 100
"""Largest ratio of the sides: resizing by the shorter side would blow a thinner strip up beyond all memory."""


def decode_image(data: bytes | Path, *, row: str, window: tuple[float, float] | None = None) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, at its own size.

    The EXIF rotation is applied. Palette, CMYK, LAB and grey images become RGB here, before any resizing; transparent
    pixels are laid over white. Grey values of 16 or 32 bits and floats are scaled by `window`. Colour images of 16
    bits per channel keep the upper 8, as PIL reads no more.

    Args:
        data: the encoded image, or the file that holds it.
        row: what to call the image in an error.
        window: (black, white) values for 16-bit, 32-bit and float images; None refuses them.

    Returns:
        A loaded PIL image in mode RGB.

    Raises:
        DataError: the image is missing, empty, truncated, animated, too large, of an unknown kind, or has more than 8
            bits and no window.
    """
    content = _read(data, row) if isinstance(data, Path) else data
    if not content:
        raise DataError(
            f"{row}: the image is empty (0 bytes); it was probably cut off while copying, so fetch it again"
        )
    try:
        with warnings.catch_warnings():
            # PIL's own guards against huge images only warn below twice its limit; `_check_size` decides here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=_formats())
            _check_size(image, row)
            _check_still(image, row)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), row, window)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{row}: {error} At most {MAX_PIXELS:,} pixels are decoded; {_TOO_LARGE}") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{row}: not an image of a known kind ({_describe(content)}). {_READABLE}") from error
    except Exception as error:  # decoders of damaged files raise whatever the damage leads to
        raise DataError(
            f"{row}: the image is damaged or truncated ({type(error).__name__}: {error}; {len(content):,} bytes). "
            "Fetch it again, or leave such images out with `--on-bad-image skip`."
        ) from error


_TOO_LARGE = "cut the image into tiles, or scale it down"
_READABLE = "Readable are JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000, AVIF and TGA: convert it to one of them."


def _read(path: Path, row: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{row}: cannot read {path}: {error.strerror or error}") from error


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image, row: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{row}: {width} x {height} pixels are more than {MAX_PIXELS:,}; {_TOO_LARGE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"{row}: {width} x {height} pixels; a side may be at most {MAX_ASPECT} times the other: crop it"
        )


def _check_still(image: Image.Image, row: str) -> None:
    # MPO is an ordinary camera JPEG with a second view or preview behind it; its first frame is the photograph.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(
            f"{row}: an animation or stack of {frames} frames ({image.format}), and a row needs one picture; "
            "save the frames you want as single images"
        )


def _describe(content: bytes) -> str:
    if content[4:8] == b"ftyp" and content[8:11] in {b"hei", b"hev", b"mif"}:
        return "a HEIC photograph"
    if content[128:132] == b"DICM":
        return "a DICOM file"
    if content.lstrip()[:1] == b"<":
        return "text such as HTML or SVG"
    return f"{len(content):,} bytes that start with {content[:8]!r}"


def _to_rgb(image: Image.Image, row: str, window: tuple[float, float] | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scale(image, row, window)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


def _scale(image: Image.Image, row: str, window: tuple[float, float] | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{row}: {int((~np.isfinite(values)).sum())} pixels are not finite numbers; replace them")
    low, high = float(values.min()), float(values.max())
    if window is None:
        kind = "float" if image.mode == "F" else "16-bit" if "16" in image.mode else "32-bit"
        raise DataError(
            f"{row}: {kind} grey values from {low:g} to {high:g}, and nothing says which are black and white. "
            f"State it in the card for all images, for example `window: [{low:g}, {high:g}]`."
        )
    black, white = window
    scaled = np.clip((values - black) / (white - black), 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))
