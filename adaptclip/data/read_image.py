# SPDX-License-Identifier: Apache-2.0
"""From an encoded image to upright 8-bit RGB, with Pillow and numpy (and OpenCV for colour of more than 8 bits).

This file needs nothing else, not even the package it lies in: an export carries a copy, so that whoever uses it
decodes as the model was trained.
"""

from __future__ import annotations

import io
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

WINDOW: tuple[float, float] | None = None
"""(black, white) values of images of more than 8 bits; an export writes those of its model here."""

DECODING = 2
"""Raised when some bytes give other pixels than before, as then what is kept of them must be computed again."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""What may be decoded. PIL reads more, but some of it starts other programs (EPS) or holds no photographs."""

MAX_PIXELS = 100_000_000
"""Largest width x height; as RGB it takes 300 MB. A small file can claim far more."""

MAX_ASPECT = 100
"""Largest ratio of the sides: resizing by the shorter side would blow a thinner strip up beyond all memory."""


class ImageProblem(ValueError):  # noqa: N818 - it is as often the lack of a window as an error
    """These bytes are no image that can be used; reading them again will not help."""


class DamagedImage(ImageProblem):
    """The image is cut off or damaged."""


def read_image(data: bytes | str | Path, window: tuple[float, float] | None = WINDOW) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, at its own size.

    The EXIF rotation is applied. Palette, CMYK, LAB and grey images become RGB here, before any resizing; transparent
    pixels are laid over white. The file is asked for its depth, as a decoder may hide it: values of more than 8 bits
    and floats, grey or colour, are scaled by `window` as they are stored. (AVIF's 10 and 12 bits are shades of a
    display from black to white and become 8 bits by themselves.)

    Args:
        data: the encoded image, or the file that holds it.
        window: (black, white) values for images of more than 8 bits; None refuses them.

    Returns:
        A loaded PIL image in mode RGB.

    Raises:
        ImageProblem: the image is empty, truncated, animated, too large, of an unknown kind, or has more than 8 bits
            and no window.
        OSError, MemoryError, ImportError: the file cannot be read, memory is short, or a decoder is not installed.
    """
    content = data if isinstance(data, bytes) else Path(data).read_bytes()
    if not content:
        raise ImageProblem("the image is empty (0 bytes); it was probably cut off while copying, so fetch it again")
    try:
        with warnings.catch_warnings():
            # PIL's own guards against huge images only warn below twice its limit; `_check_size` decides here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=_formats())
            _check_size(image)
            _check_still(image)
            bits = _depth(image, content)
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            return _upright(_to_rgb(image, content, bits, window), orientation)
    except (ImageProblem, MemoryError, ImportError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem(f"{error} At most {MAX_PIXELS:,} pixels are decoded; {_TOO_LARGE}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageProblem(f"not an image of a known kind ({_describe(content)}). {_READABLE}") from error
    except Exception as error:  # decoders of damaged files raise whatever the damage leads to
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "not available" in str(error) or "not installed" in str(error):
            raise ImportError(f"Pillow was built without a decoder that this image needs ({error})") from error
        raise DamagedImage(
            f"the image is damaged or truncated ({type(error).__name__}: {error}; {len(content):,} bytes)"
        ) from error


_TOO_LARGE = "cut the image into tiles, or scale it down"
_READABLE = "Readable are JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000, AVIF and TGA: convert it to one of them."


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageProblem(f"{width} x {height} pixels are more than {MAX_PIXELS:,}; {_TOO_LARGE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageProblem(f"{width} x {height} pixels; a side may be at most {MAX_ASPECT} times the other: crop it")


def _check_still(image: Image.Image) -> None:
    # MPO is an ordinary camera JPEG with a second view or preview behind it; its first frame is the photograph.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageProblem(
            f"an animation or stack of {frames} frames ({image.format}), and a row needs one image; "
            "save the frames you want as single images"
        )


def _describe(content: bytes) -> str:
    if content.startswith(b"version https://git-lfs") or b"/annex/objects/" in content[:200]:
        return "a Git LFS or git-annex pointer, not the image: `git lfs pull` or `git annex get` fetches it"
    if content[4:8] == b"ftyp" and content[8:11] in {b"hei", b"hev", b"mif"}:
        return "a HEIC photograph"
    if content[4:8] == b"ftyp" and content[8:11] == b"avi":
        return "an AVIF image, which the Pillow installed here cannot read"
    if content[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return "a TIFF whose layout of samples is not read, such as 32-bit colour"
    if content[128:132] == b"DICM":
        return "a DICOM file"
    if content.lstrip()[:1] == b"<":
        return "text such as HTML or SVG"
    return f"{len(content):,} bytes that start with {content[:8]!r}"


def _depth(image: Image.Image, content: bytes) -> int:
    """Bits per value that the file states: PIL's mode says "RGB" for 16-bit colour, and keeps the upper 8."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # pyright: ignore[reportAttributeAccessIssue]
    if image.format == "PPM" and image.mode != "F":
        return _white_of_ppm(content).bit_length()
    at = content.find(b"\xff\x4f\xff\x51") if image.format == "JPEG2000" else -1
    if at >= 0:
        return max((content[at + 42 + 3 * i] & 0x7F) + 1 for i in range(content[at + 41]))
    return 32 if image.mode in ("F", "I") else 8


def _white_of_ppm(content: bytes) -> int:
    """The largest value that the header of a PGM or PPM declares; 1 for PBM, which has none."""
    between = rb"(?:\s|#[^\r\n]*[\r\n])+"
    found = re.match(rb"P[2356]" + (between + rb"(\d+)") * 3, content[:4096])
    return int(found[3]) if found else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    exif = image.getexif()
    exif[0x0112] = orientation
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, content: bytes, bits: int, window: tuple[float, float] | None) -> Image.Image:
    if bits > 8 or image.mode == "F" or image.mode.startswith("I"):
        image = _scaled(image, content, bits, window)
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


def _scaled(image: Image.Image, content: bytes, bits: int, window: tuple[float, float] | None) -> Image.Image:
    """Makes 8 bits (L, RGB or RGBA) of more by the window; the image is loaded."""
    grey = image.mode == "F" or image.mode.startswith("I")
    values, alpha = _grey_values(image, content, bits) if grey else _colour_values(image, content, bits)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageProblem(f"{int((~np.isfinite(values)).sum())} pixels are not finite numbers; replace them")
    if window is None:
        low, high = float(values.min()), float(values.max())
        kind = f"{'float' if image.mode == 'F' else f'{bits}-bit'} {'grey' if grey else 'colour'}"
        raise ImageProblem(
            f"{kind} values from {low:g} to {high:g}, and nothing says which are black and white. "
            f"State it in the card for all images, for example `window: [{low:g}, {high:g}]`."
        )
    black, white = window
    scaled = _by_window(values, black, white)
    if grey and image.format == "TIFF" and image.tag_v2.get(262) == 0:  # pyright: ignore[reportAttributeAccessIssue]
        scaled = 255 - scaled  # the file says that small values are bright
    if alpha is not None:
        colour = scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)
        scaled = np.concatenate([colour, alpha[..., None]], axis=2)
    return Image.fromarray(scaled)


def _by_window(values: np.ndarray, black: float, white: float) -> np.ndarray:
    def scale(numbers: np.ndarray) -> np.ndarray:
        return (np.clip((numbers.astype(np.float64) - black) / (white - black), 0, 1) * 255).round().astype(np.uint8)

    if values.dtype == np.uint16:  # by a table: eight bytes for each value of a large image would be too much
        return scale(np.arange(65536))[values]
    return np.concatenate([scale(part) for part in np.array_split(values, max(1, values.size // 4_000_000))])


def _grey_values(image: Image.Image, content: bytes, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The (H, W) values as they are stored, and (H, W) uint8 opacity or None."""
    values = np.asarray(image)
    if image.format == "PPM" and image.mode == "I":
        # Pillow stretches to 65535 whatever the file's largest value is; rounding gives back what is stored.
        values = np.round(values * (_white_of_ppm(content) / 65535)).astype(np.uint16)
    elif image.format == "JPEG2000":
        values = values >> (16 - bits)  # Pillow shifts to the top of 16 bits
    clear = image.info.get("transparency")
    return values, None if clear is None else np.where(values == clear, 0, 255).astype(np.uint8)


def _colour_values(image: Image.Image, content: bytes, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The (H, W, 3) values as they are stored, which Pillow cannot hold, and (H, W) uint8 opacity or None."""
    if image.mode not in {"RGB", "RGBA"}:
        raise ImageProblem(f"{bits}-bit {image.mode} is not read; convert it to RGB, or to 8 bits")
    import cv2

    quiet = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        read: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(quiet)
    if read is None or read.dtype != np.uint16 or read.ndim != 3 or read.shape[:2] != (image.height, image.width):
        raise ImageProblem(f"{bits}-bit colour that is not read; convert it to 16-bit PNG, or to 8 bits")
    values, alpha = read[..., 2::-1], None
    extra = image.tag_v2.get(338, (2,))[0] if image.format == "TIFF" else 2  # pyright: ignore[reportAttributeAccessIssue]
    if (read.shape[2] == 4 and image.mode == "RGBA") or "transparency" in image.info:
        alpha = (read[..., 3] >> (bits - 8)).astype(np.uint8)
    # Two decoders read the file: what Pillow keeps must be the upper 8 bits of what OpenCV gives.
    if extra != 1 and image.format != "PPM":
        upper = (values >> (bits - 8)).astype(np.int16) - np.asarray(image)[..., :3]
        if np.abs(upper).max() > 1:
            raise ImageProblem(f"{bits}-bit colour that two decoders read differently; convert it to 16-bit PNG")
    if extra == 1 and alpha is not None:  # colours are stored multiplied by the opacity
        opacity = np.maximum(read[..., 3:].astype(np.float32), 1) / (2**bits - 1)
        values = np.minimum(values / opacity, 2**bits - 1).round().astype(np.uint16)
    return values, alpha
