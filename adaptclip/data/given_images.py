# SPDX-License-Identifier: Apache-2.0
"""Images as people hand them over in Python: paths, PIL images, arrays of pixels, bytes, open files, columns of them.

Every door that takes images (`fit`, `predict`, search) comes through here, and everything leaves as a path or as the
bytes of a file, so that what is given in memory is decoded as a file of the same pixels would be.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptclip.data.dataset import ImageDataset
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError, shown

ACCEPTED = (
    "paths, PIL images, encoded bytes, open binary files, or pixels: (H, W), (H, W, 3) or (H, W, 4) arrays or tensors "
    "of uint8, of bool, or of floats from 0 to 1"
)

Window = tuple[float, float]
"""(black, white) values of images of more than 8 bits, see `decode_image`."""


@dataclass(frozen=True)
class GivenImage:
    """One image as it was given; nothing of it has been looked at.

    Attributes:
        name: its path, or its position among the images where it has none.
        where: what to call it in a message.
        item: the image.
    """

    name: str
    where: str
    item: Any

    def encoded(self, window: Window | None = None) -> bytes | Path:
        """Returns the file, or what would be the bytes of one.

        Args:
            window: what arrays of more than 8 bits will be scaled by; without, whole numbers of more than 8 bits are
                refused, as files of them are, and floats are shades from 0 (black) to 1 (white).

        Raises:
            DataError: it is no image, or one that cannot be read so.
        """
        item = self.item
        if isinstance(item, dict) and item and set(item) <= {"bytes", "path"}:  # as Parquet and `datasets` keep images
            item = item.get("path") if item.get("bytes") is None else item["bytes"]
        if isinstance(item, bytes | bytearray | memoryview):
            return bytes(item)
        if isinstance(item, str | os.PathLike):
            return _path(item, self.where)
        if isinstance(item, Image.Image):
            return _of_pil(item, self.where)
        if hasattr(item, "read"):
            return _of_file(item, self.where)
        pixels = _as_array(item)
        if pixels is None or not pixels.ndim:
            raise DataError(f"{self.where} should be an image, got {_kind(self.item)}; images are {ACCEPTED}")
        return _of_pixels(pixels, self.where, window)

    def decoded(self, window: Window | None = None, frames: str | None = None) -> Image.Image:
        """Decodes the image to RGB, upright, as `decode_image` does; raises what that and `encoded` raise."""
        return decode_image(self.encoded(window), row=self.where, window=window, frames=frames)


def each_image(x: Any, what: str = "images") -> Iterator[GivenImage]:
    """Yields images one by one, without looking at them.

    An array of numbers is one image, or a stack of them by its first axis: (H, W), (H, W, 1), (H, W, 3) and (H, W, 4)
    are one; tensors may have their channels first instead. Other collections are gone through lazily.

    Args:
        x: one image, or a list, tuple, generator, array, column of a table or `ImageDataset` of them.
        what: what to call them in a message.

    Raises:
        DataError: it is neither, or empty.
    """
    if isinstance(x, ImageDataset):
        if not x.has_pixels:
            raise DataError(f"{what} is a data set of features that were computed elsewhere; it has no images")
        items: Iterator[GivenImage] = (GivenImage(name, x.where(i), _Row(x, i)) for i, name in enumerate(x.ids))
    elif _is_one(x):
        items = iter([_given(x, 0, what)])
    else:
        items = (_given(item, i, f"{what}[{i}]") for i, item in enumerate(_collection(x, what)))
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise DataError(f"{what} is empty; give at least one image")


def one_image(x: Any, what: str = "the image") -> GivenImage:
    """Returns the only image of what was given. Raises DataError where it is none, or several."""
    found = list(each_image(x, what))
    if len(found) != 1:
        raise DataError(f"{what} should be one image, got {len(found)}")
    return found[0]


@dataclass(frozen=True)
class _Row:
    """A row of a data set, read when it is needed."""

    dataset: ImageDataset
    index: int

    def read(self) -> bytes:
        return self.dataset.read(self.index)


def _given(item: Any, position: int, where: str) -> GivenImage:
    path = item.get("path") if isinstance(item, dict) else item if isinstance(item, str | os.PathLike) else None
    path = getattr(item, "name", None) if path is None and hasattr(item, "read") else path
    if not isinstance(path, str | os.PathLike):
        return GivenImage(str(position), where, item)
    name = os.fsdecode(path)
    return GivenImage(name, _short(name), item)


def _is_one(x: Any) -> bool:
    if isinstance(x, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(x, "read"):
        return True
    return isinstance(x, dict) and bool(x) and set(x) <= {"bytes", "path"}


def _collection(x: Any, what: str) -> Any:
    """What can be gone through image by image. Raises DataError for what has no images in an order."""
    if isinstance(x, dict | set | frozenset) or hasattr(x, "columns") or hasattr(x, "column_names"):
        names = getattr(x, "column_names", None)
        names = getattr(x, "columns", None) if names is None else names
        if isinstance(x, set | frozenset):
            raise DataError(f"{what} is a set, which has no order; give a list")
        listed = ", ".join(_short(name) for name in list(x if names is None else names)[:8])
        raise DataError(
            f'{what} is a {_kind(x)} with {listed or "nothing"}; give one column of it, such as {what}["image"]'
        )
    if hasattr(x, "to_pylist"):  # pyarrow
        return x.to_pylist()
    if hasattr(x, "to_numpy"):  # pandas, polars
        x = x.to_numpy()
    pixels = None if isinstance(x, list | tuple) else _as_array(x)
    if pixels is None or pixels.dtype.kind in "OUSV":
        if not hasattr(x, "__iter__") or (pixels is not None and pixels.ndim != 1):
            raise DataError(f"{what} should be one image or a list of them, got {_kind(x)}; images are {ACCEPTED}")
        return x
    return _stack(pixels, what, tensor=hasattr(x, "detach"))


def _stack(pixels: np.ndarray, what: str, *, tensor: bool) -> Any:
    """An array of numbers as a list of images."""
    shape, floats = pixels.shape, pixels.dtype.kind == "f"
    if pixels.ndim == 4 or (pixels.ndim == 2 and not floats):
        return pixels if pixels.ndim == 4 else [pixels]
    if pixels.ndim == 3:
        if shape[2] in _CHANNELS or (tensor and shape[0] in _CHANNELS):
            return [pixels]
        if not floats and shape[0] not in (3, 4):
            return pixels
    raise DataError(
        f"{what} is {pixels.dtype} of shape {shape}, which is no image and no stack of images for certain: give a list "
        f"of images, or a stack (N, H, W, 3){'; features go to `predict_proba` and `fit`' if floats else ''}"
    )


def _as_array(x: Any) -> np.ndarray | None:
    """Arrays and tensors of any library as a numpy array; None for anything else."""
    if hasattr(x, "detach") and hasattr(x, "is_floating_point"):  # a tensor; numpy has no bfloat16
        x = x.detach().cpu()
        return (x.float() if x.is_floating_point() else x).numpy()
    return np.asarray(x) if hasattr(x, "__array__") else None


_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)


def _path(item: Any, where: str) -> Path:
    text = os.fsdecode(item)
    if _ADDRESS.match(text) and not os.path.lexists(text):
        raise DataError(
            f"{where} is an address and no file: fetch it first and give its bytes, for example "
            "requests.get(address).content, or the path of the file that you saved"
        )
    try:
        mode = Path(text).stat().st_mode
    except FileNotFoundError as error:
        raise DataError(
            f"there is no file {where}; a text is taken for the path of an image, seen from {Path.cwd()}"
        ) from error
    except (OSError, ValueError):  # who reads the file says what is the matter
        return Path(text)
    if stat.S_ISDIR(mode):
        raise DataError(f"{where} is a folder: give its images, for example sorted(Path({text!r}).glob('*.jpg'))")
    return Path(text)


def _of_file(item: Any, where: str) -> bytes:
    if isinstance(item, _Row):
        return item.read()
    try:
        content = item.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: the file cannot be read: {error}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError(f"{where} is open as text; open images with mode 'rb'")
    if not content:
        raise DataError(f"{where}: the file has nothing left to read; seek(0) if it was read before")
    return bytes(content)


_AS_PNG = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
_AS_TIFF = frozenset(("F", "I", "CMYK", "LAB"))
_FIRST = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA", "I;16B": "I", "I;16L": "I", "I;16N": "I"}
"""Modes that no file keeps -> what says the same; all others are colour (YCbCr, HSV, RGBX) and become RGB."""

_ORIENTATION = 0x0112


def _of_pil(image: Image.Image, where: str) -> bytes:
    """A PIL image of any mode as the bytes of a file without loss; its EXIF rotation goes with it."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.mode not in _AS_PNG | _AS_TIFF:
            image = image.convert(_FIRST.get(image.mode, "RGB"))
        elif image.palette is not None and image.mode == "P" and image.palette.mode == "RGBA":
            image = image.convert("RGBA")
        exif, buffer = Image.Exif(), io.BytesIO()
        if orientation != 1:
            exif[_ORIENTATION] = orientation
        image.save(buffer, format="TIFF" if image.mode in _AS_TIFF else "PNG", exif=exif)
    except MemoryError:
        raise
    except Exception as error:  # PIL reads a file only now, and a damaged one raises whatever the damage leads to
        raise DataError(
            f"{where}: this PIL image ({image.mode}, {image.width} x {image.height}) cannot be read: {error}"
        ) from error
    return buffer.getvalue()


_CHANNELS = (1, 3, 4)


def _of_pixels(pixels: np.ndarray, where: str, window: Window | None) -> bytes:
    """An array of pixels as the bytes of a file without loss."""
    if pixels.ndim == 3 and pixels.shape[2] not in _CHANNELS and pixels.shape[0] in _CHANNELS:
        pixels = np.moveaxis(pixels, 0, 2)
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in _CHANNELS) or 0 in shape:
        raise DataError(f"{where} should be (H, W), (H, W, 3) or (H, W, 4) pixels, got {pixels.dtype} of shape {shape}")
    pixels = pixels[..., 0] if shape[2:] == (1,) else pixels
    if pixels.dtype.kind == "b":
        pixels = pixels * np.uint8(255)
    elif pixels.dtype.kind == "f" and window is None:
        pixels = _of_shades(pixels, where)
    elif pixels.dtype.kind not in "uif":
        raise DataError(f"{where} should be an image, got an array of {pixels.dtype}; images are {ACCEPTED}")
    if pixels.dtype == np.uint8:
        return _of_pil(Image.fromarray(np.ascontiguousarray(pixels)), where)
    return _of_deep_pixels(pixels, where, window)


def _of_shades(pixels: np.ndarray, where: str) -> np.ndarray:
    """Floats from 0 to 1 as uint8."""
    if not np.isfinite(pixels).all():
        raise DataError(f"{where}: {int((~np.isfinite(pixels)).sum())} pixels are not finite numbers; replace them")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1e-6 or high > 1 + 1e-6:
        known = low >= 0 and high <= 255
        how = "divide by 255, or say .astype('uint8')" if known else (
            "transformed pixels are not taken: give images as they were before the transform"
        )  # fmt: skip
        raise DataError(
            f"{where}: floats from {low:g} to {high:g}, and an image's go from 0 (black) to 1 (white); {how}"
        )
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _of_deep_pixels(pixels: np.ndarray, where: str, window: Window | None) -> bytes:
    """Values of more than 8 bits, which only a window makes shades of."""
    if window is None:
        low, high = pixels.min(), pixels.max()
        how = ".astype('uint8') makes them shades" if low >= 0 and high <= 255 else "scale them to floats from 0 to 1"
        raise DataError(
            f"{where}: {pixels.dtype} values from {low} to {high}, and nothing says which are black and white; {how}"
        )
    if pixels.ndim == 2 and pixels.dtype.kind == "f":
        return _of_pil(Image.fromarray(pixels.astype(np.float32)), where)
    if pixels.ndim == 2 and pixels.min() >= -(2**31) and pixels.max() < 2**31:
        return _of_pil(Image.fromarray(pixels if pixels.dtype == np.uint16 else pixels.astype(np.int32)), where)
    if pixels.ndim == 2 or pixels.dtype != np.uint16:
        raise DataError(f"{where}: {pixels.dtype} of shape {pixels.shape} is not read; give uint16 or uint8")
    import cv2

    order = [2, 1, 0, 3][: pixels.shape[2]]
    return cv2.imencode(".png", np.ascontiguousarray(pixels[..., order]))[1].tobytes()


def _kind(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def _short(text: Any, most: int = 200) -> str:
    said = shown(text)
    return said if len(said) <= most else f"{said[:most]}… ({len(said):,} characters)"
