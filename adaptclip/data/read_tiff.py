# SPDX-License-Identifier: Apache-2.0
"""TIFF that Pillow does not read, by tifffile.

Colour of 32 bits and of floats, later pages of 16-bit colour, and levels of a pyramid that lie beside its page.
"""

from __future__ import annotations

import io
import logging
import zlib
from typing import Any

import numpy as np
from PIL import Image

from adaptclip.data.read_values import (
    MAX_FRAMES,
    MAX_PIXELS,
    DamagedImage,
    ImageProblem,
    check_size,
    frame_number,
    needs,
    upright,
    windowed,
)

_COMPRESSIONS = {1: "none", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"}
"""What is unpacked without further libraries, and within bounds."""

_KINDS = {0: "grey, small is bright", 1: "grey", 2: "RGB"}


def tiff_image(content: bytes, window: tuple[float, float] | None, frames: str | int | None) -> Image.Image:
    """Decodes a page to RGB, of a pyramid the largest level that is not too large; see `read_image`.

    Raises:
        ImageProblem, ImportError: see `read_image`.
    """
    with _opened_tiff(content) as file:
        levels = _levels(file)
        page = levels[frame_number(len(levels), frames, "TIFF")]
        level = next((one for one in page if one.imagewidth * one.imagelength <= MAX_PIXELS), page[0])
        check_size(level.imagewidth, level.imagelength)
        _check_layout(level)
        _check_unpacked(level, content)
        values = level.asarray(maxworkers=1)
        return _tiff_to_rgb(level, values, window)


def tiff_frames(content: bytes) -> int:
    """Returns the number of pages, without the smaller levels of a pyramid."""
    with _opened_tiff(content) as file:
        return len(_levels(file))


def _opened_tiff(content: bytes) -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(needs("tifffile", "tiff", "a TIFF whose layout of samples Pillow does not know")) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what is wrong is said once, by the error
    return tifffile.TiffFile(io.BytesIO(content))


def _levels(file: Any) -> list[list[Any]]:
    """The pages, each with its levels: itself, those beside it, and the smaller copies that follow it."""
    found: list[list[Any]] = []
    for number, page in enumerate(file.pages):
        if number >= MAX_FRAMES:
            raise ImageProblem(f"more than {MAX_FRAMES:,} pages; cut it into shorter files")
        if page.subfiletype & 1 and found:
            found[-1].append(page)
        elif not page.subfiletype & 4 or not found:
            beside = [one for one in page.pages or () if one.subfiletype & 1] if page.subifds else []
            found.append([page, *beside])
    if not found:
        raise DamagedImage("the TIFF is damaged or truncated: it has no page")
    return found


def _check_layout(page: Any) -> None:
    kind, samples = int(page.photometric), page.samplesperpixel
    plain = kind in _KINDS and (samples in (3, 4) if kind == 2 else samples in (1, 2))
    numbers = np.dtype(page.dtype or object).kind in "uif"
    if not plain or not numbers or page.imagedepth != 1 or int(page.compression) not in _COMPRESSIONS:
        raise ImageProblem(
            f"a TIFF whose layout of samples is not read ({samples} of {page.bitspersample} bits, "
            f"{page.photometric.name}, compression {page.compression.name}); save it as grey or RGB, uncompressed or "
            "by Deflate"
        )


def _check_unpacked(page: Any, content: bytes) -> None:
    """Raises ImageProblem where a strip or tile is larger than it says, so that unpacking it would fill the memory."""
    width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    height = min(height, max(page.imagelength, 65536)) or page.imagelength
    if width * height > 2 * MAX_PIXELS:
        raise ImageProblem(f"a TIFF with tiles of {width} x {height} pixels; save it with smaller ones")
    expected = width * height * page.samplesperpixel * page.dtype.itemsize
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        unpacked = length if int(page.compression) == 1 else 0
        if int(page.compression) == 32773:  # at most 128 from 2
            unpacked = length * 64 if length > 2 * expected else 0
        elif int(page.compression) != 1:
            unpack, rest = zlib.decompressobj(), content[start : start + length]
            unpacked = len(unpack.decompress(rest, expected + 65))
        if unpacked > expected + 64:
            raise ImageProblem(f"a strip of the TIFF unpacks to more than the {expected:,} bytes that it should hold")


def _tiff_to_rgb(page: Any, values: np.ndarray, window: tuple[float, float] | None) -> Image.Image:
    values = values.reshape(values.shape if values.ndim > 2 else (*values.shape, 1))
    if int(page.planarconfig) == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    colours = 3 if int(page.photometric) == 2 else 1
    kind = (
        f"{'float' if values.dtype.kind == 'f' else f'{page.bitspersample}-bit'} {'colour' if colours > 1 else 'grey'}"
    )
    deep = page.bitspersample > 8 or values.dtype != np.uint8
    opacity = next((int(kind) for kind in page.extrasamples or ()), 0)
    if opacity == 1 and deep:
        raise ImageProblem(f"{kind} multiplied by its opacity is not read; save it without the opacity")
    pixels = windowed(values[..., :colours], window, kind) if deep else values[..., :colours]
    pixels = 255 - pixels if int(page.photometric) == 0 else pixels
    image = Image.fromarray(np.ascontiguousarray(np.repeat(pixels, 3 // colours, axis=2)))
    if opacity == 2 and values.shape[2] > colours:
        top = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
        image.putalpha(Image.fromarray(windowed(values[..., colours], (0.0, top), kind)))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return upright(image, int(page.tags[274].value) if 274 in page.tags else 1)
