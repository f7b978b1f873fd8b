# SPDX-License-Identifier: Apache-2.0
"""From an encoded image to upright 8-bit RGB, with Pillow and numpy (and OpenCV for colour of more than 8 bits).

This file and its sisters (read_values, read_dicom, read_tiff) need nothing else, not even the package they lie in: an
export carries a copy, so that whoever uses it decodes as the model was trained. What reads DICOM, HEIC and rare layouts
of TIFF comes with extras.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from adaptclip.data.read_dicom import dicom_frames, dicom_image
from adaptclip.data.read_tiff import tiff_frames, tiff_image
from adaptclip.data.read_values import (
    MAX_FRAMES,
    MAX_PIXELS,
    TOO_LARGE,
    DamagedImage,
    ImageProblem,
    check_size,
    frame_number,
    needs,
    upright,
    windowed,
)

WINDOW: tuple[float, float] | None = None
"""(black, white) values of images of more than 8 bits; an export writes those of its model here."""

FRAMES: str | int | None = None
"""Which frame of an animation or a stack is read; an export writes what its model learnt from here."""

DECODING = 2
"""Raised when some bytes give other pixels than before, as then what is kept of them must be computed again."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "JXL", "HEIF")
"""What may be decoded. PIL reads more, but some of it starts other programs (EPS) or holds no photographs."""


def read_image(
    data: bytes | str | Path, window: tuple[float, float] | None = WINDOW, frames: str | int | None = FRAMES
) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, at its own size.

    What the file is, its first bytes say and never its name. The EXIF rotation is applied. Palette, CMYK, LAB and grey
    images become RGB here, before any resizing; transparent pixels are laid over white. The file is asked for its
    depth, as a decoder may hide it: values of more than 8 bits and floats, grey or colour, are scaled by `window` as
    they are stored, and those of DICOM after their rescaling, by the file's own window where `window` is None. (10 and
    12 bits of AVIF and HEIC are shades of a display from black to white and become 8 bits by themselves.)

    Args:
        data: the encoded image, or the file that holds it.
        window: (black, white) values for images of more than 8 bits; None refuses them.
        frames: which frame of an animation, a stack or a multi-frame file is read: "first", "middle" (number N // 2 of
            N, counted from 0) or a number; None refuses what has several. Of a pyramid, the largest level that is not
            too large is read.

    Returns:
        A loaded PIL image in mode RGB.

    Raises:
        ImageProblem: the image is empty, truncated, too large, of an unknown kind, has more than 8 bits and no window,
            or several frames and nothing says which to take.
        OSError, MemoryError, ImportError: the file cannot be read, memory is short, or a decoder is not installed.
    """
    content = data if isinstance(data, bytes) else Path(data).read_bytes()
    kind = kind_of(content[:132])
    return _guarded(content, kind, lambda: _READ.get(kind, _by_pillow)(content, kind, window, frames))


def count_frames(content: bytes) -> int:
    """Returns how many frames `read_image` can choose from; 1 for a plain image.

    Raises:
        ImageProblem, MemoryError, ImportError: see `read_image`.
    """
    kind = kind_of(content[:132])
    return _guarded(content, kind, lambda: _COUNT.get(kind, _pillow_frames)(content, kind))


_READABLE = (
    "Readable are JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000, AVIF and TGA, and with extras DICOM and HEIC: "
    "convert it to one of them."
)

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

SIGNATURES: dict[str, Callable[[bytes], object]] = {
    "JPEG": lambda b: b.startswith(b"\xff\xd8\xff"),
    "PNG": lambda b: b.startswith(b"\x89PNG\r\n\x1a\n"),
    "GIF": lambda b: b.startswith((b"GIF87a", b"GIF89a")),
    "TIFF": lambda b: b[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"},
    "WebP": lambda b: b[:4] == b"RIFF" and b[8:12] == b"WEBP",
    "PPM": lambda b: re.match(rb"P[1-6][\s#]", b),
    "JPEG 2000": lambda b: b.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")),
    "AVIF": lambda b: b[4:8] == b"ftyp" and b[8:12] in {b"avif", b"avis"},
    "HEIC": lambda b: b[4:8] == b"ftyp" and b[8:12] in _HEIF_BRANDS,
    "JPEG XL": lambda b: b.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")),
    # Before 1993, and from some devices still, without the 128 bytes and "DICM".
    "DICOM": lambda b: b[128:132] == b"DICM" or re.match(rb"[\x02\x08]\0[\0-\x20]\0(UL|UI|CS|OB|SH|DA)", b),
    "BMP": lambda b: b[:2] == b"BM" and b[6:10] == bytes(4),
}
"""Kind of image -> whether its first 132 bytes look like that."""


def kind_of(start: bytes) -> str:
    """Returns the kind of image that a file is by its first bytes (132 are enough); "" for none of SIGNATURES."""
    return next((kind for kind, fits in SIGNATURES.items() if fits(start)), "")


def _by_pillow(content: bytes, kind: str, window: tuple[float, float] | None, frames: str | int | None) -> Image.Image:
    image = _opened(content, kind)
    _to_frame(image, frames)
    check_size(*image.size)
    bits = _depth(image, content)
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    return upright(_to_rgb(image, content, bits, window), orientation)


def _pillow_frames(content: bytes, kind: str) -> int:
    image = _opened(content, kind)
    # MPO is an ordinary camera JPEG with a second view or preview behind it; its first frame is the photograph.
    return 1 if image.format == "MPO" else len(_pages(image))


def _opened(content: bytes, kind: str) -> Image.Image:
    """Reads the header of what Pillow decodes."""
    if kind == "HEIC":
        _add_heif()
        _check_heif(content)
    if kind != "TIFF":
        return Image.open(io.BytesIO(content), formats=_formats())
    try:  # not by Image.open, which refuses a pyramid for the size of its largest level
        return TiffImagePlugin.TiffImageFile(io.BytesIO(content))
    except SyntaxError as error:
        raise Image.UnidentifiedImageError(str(error)) from error


def _tiff(content: bytes, kind: str, window: tuple[float, float] | None, frames: str | int | None) -> Image.Image:
    """Reads by Pillow, and by tifffile the layouts of samples and the levels that Pillow does not."""
    try:
        return _by_pillow(content, kind, window, frames)
    except (Image.UnidentifiedImageError, _OtherLayout):
        return tiff_image(content, window, frames)


def _count_tiff(content: bytes, kind: str) -> int:
    try:
        return _pillow_frames(content, kind)
    except Image.UnidentifiedImageError:
        return tiff_frames(content)


_READ: dict[str, Callable[[bytes, str, tuple[float, float] | None, str | int | None], Image.Image]] = {
    "DICOM": lambda content, kind, window, frames: dicom_image(content, window, frames),
    "TIFF": _tiff,
}
_COUNT: dict[str, Callable[[bytes, str], int]] = {
    "DICOM": lambda content, kind: dicom_frames(content),
    "TIFF": _count_tiff,
}
"""What reads a kind of image, and what counts its frames; Pillow all others."""


class _OtherLayout(ImageProblem):
    """Pillow does not read it; tifffile may."""


def _check_heif(content: bytes) -> None:
    """Raises DamagedImage where the names of a file's items are no text, on which pi_heif ends the whole program."""
    for found in re.finditer(rb"(....)infe([\x02\x03])", content, re.DOTALL):
        end = found.start() + int.from_bytes(found[1], "big")
        names = content[found.end() + (7 if found[2] == b"\x02" else 9) : end]
        if len(names) < 5 or not re.fullmatch(rb"[ -~]{4}[\0 -~]*", names):
            raise DamagedImage("the HEIC photograph is damaged or truncated: an item has no name")


@cache
def _add_heif() -> None:
    try:
        import pi_heif
    except ImportError as error:
        raise ImportError(needs("pi_heif", "heic", "HEIC")) from error
    pi_heif.register_heif_opener()
    _formats.cache_clear()


def _guarded(content: bytes, kind: str, read: Callable[[], Any]) -> Any:
    """Calls `read`, and words what the decoders raise."""
    if not content:
        raise ImageProblem("the image is empty (0 bytes); it was probably cut off while copying, so fetch it again")
    try:
        with warnings.catch_warnings():
            # PIL's own guards against huge images only warn below twice its limit; `check_size` decides here.
            warnings.simplefilter("ignore")
            return read()
    except (ImageProblem, MemoryError, ImportError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem(f"{error} At most {MAX_PIXELS:,} pixels are decoded; {TOO_LARGE}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageProblem(f"not an image of a known kind ({_describe(content, kind)}). {_READABLE}") from error
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


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _to_frame(image: Image.Image, frames: str | int | None) -> None:
    """Goes to the frame that `frames` means, and of a pyramid to the largest level that is not too large."""
    if image.format == "MPO":
        return
    pages = _pages(image)
    levels = pages[frame_number(len(pages), frames, str(image.format))]
    for number in levels:
        image.seek(number)
        if image.width * image.height <= MAX_PIXELS:
            return
    image.seek(levels[0])
    if image.format == "TIFF" and 330 in image.tag_v2:  # pyright: ignore[reportAttributeAccessIssue]
        raise _OtherLayout(f"{image.width} x {image.height} pixels, with smaller levels beside them")


def _pages(image: Image.Image) -> list[list[int]]:
    """The pages of a file, each as the numbers of its frames: itself, and what of a TIFF are its smaller copies."""
    count = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or count > MAX_FRAMES:
        return [[number] for number in range(count)]
    pages: list[list[int]] = []
    for number in range(count):
        image.seek(number)
        kind = image.tag_v2.get(254, 0)  # pyright: ignore[reportAttributeAccessIssue]
        if kind & 1 and pages:
            pages[-1].append(number)
        elif not kind & 4 or not pages:  # else: a mask of the page before
            pages.append([number])
    image.seek(0)
    return pages


def _describe(content: bytes, kind: str) -> str:
    if content.startswith(b"version https://git-lfs") or b"/annex/objects/" in content[:200]:
        return "a Git LFS or git-annex pointer, not the image: `git lfs pull` or `git annex get` fetches it"
    words = {
        "HEIC": "a HEIC photograph that is damaged or of a coding that is not read",
        "AVIF": "an AVIF image, which the Pillow installed here cannot read",
        "JPEG XL": "a JPEG XL image, which the Pillow installed here cannot read",
        "TIFF": "a TIFF whose layout of samples is not read, such as 32-bit colour",
    }
    if kind in words:
        return words[kind]
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
    kind = f"{'float' if image.mode == 'F' else f'{bits}-bit'} {'grey' if grey else 'colour'}"
    scaled = windowed(values, window, kind)
    if grey and image.format == "TIFF" and image.tag_v2.get(262) == 0:  # pyright: ignore[reportAttributeAccessIssue]
        scaled = 255 - scaled  # the file says that small values are bright
    if alpha is not None:
        colour = scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)
        scaled = np.concatenate([colour, alpha[..., None]], axis=2)
    return Image.fromarray(scaled)


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
    planes = image.format == "TIFF" and image.tag_v2.get(284) == 2  # pyright: ignore[reportAttributeAccessIssue]
    if planes or (image.format == "TIFF" and image.tell()):
        raise _OtherLayout("OpenCV reads neither planes nor later pages")
    import cv2

    quiet = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        read: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(quiet)
    if read is None or read.dtype != np.uint16 or read.ndim != 3 or read.shape[:2] != (image.height, image.width):
        problem = _OtherLayout if image.format == "TIFF" else ImageProblem
        raise problem(f"{bits}-bit colour that is not read; convert it to 16-bit PNG, or to 8 bits")
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
