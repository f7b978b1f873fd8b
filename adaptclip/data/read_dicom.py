# SPDX-License-Identifier: Apache-2.0
"""DICOM by pydicom: one frame as 8-bit RGB, and attributes of the header.

Grey values go the way of PS3.3 C.11: stored values, rescaling (or its table), window (or its table), and MONOCHROME1
inverted. Nothing of a header stands in any message: it holds names.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from adaptclip.data.read_values import DamagedImage, ImageProblem, check_size, frame_number, needs, windowed

MAX_INFLATED = 512 * 2**20
"""Most bytes of a data set that is stored deflated."""

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_RLE = "1.2.840.10008.1.2.5"


def dicom_image(content: bytes, window: tuple[float, float] | None, frames: str | int | None) -> Image.Image:
    """Decodes a frame to RGB; see `read_image`.

    Args:
        content: the file.
        window: (black, white) after the rescaling, for example Hounsfield units; it goes before the file's own. None
            takes the file's: its table, else its first window. Values of at most 8 bits without rescaling and without a
            window are what is shown.
        frames: see `read_image`.

    Raises:
        ImageProblem, ImportError: see `read_image`.
    """
    dataset = _read_dataset(io.BytesIO(content), content)
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageProblem(
            "a DICOM file without pixel data, such as a report or a directory, or one that is cut off before them"
        )
    number = frame_number(_count(dataset), frames, "DICOM")
    _check_frame(dataset, number)
    stored = _decoded(dataset, number)
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        colours = apply_color_lut(stored, dataset)
        return Image.fromarray((colours >> 8).astype(np.uint8) if colours.dtype.itemsize > 1 else colours)
    if stored.ndim == 3:
        bits = int(dataset.BitsStored)
        pixels = stored if bits == 8 and stored.dtype == np.uint8 else windowed(stored, window, f"{bits}-bit colour")
        return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageProblem("a DICOM file whose kind of colour is not read; convert it to MONOCHROME2 or RGB")
    pixels = _shown(stored, dataset, number, window)
    # PS3.3 C.7.6.3.1.2: the smallest value is white. C.11.6.1.2: or a shape says so.
    if kind == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        pixels = 255 - pixels
    return Image.fromarray(pixels).convert("RGB")


def dicom_frames(content: bytes) -> int:
    """Returns the number of frames."""
    return _count(_read_dataset(io.BytesIO(content), content, pixels=False))


def header_texts(file: BinaryIO, start: bytes, keywords: list[str]) -> dict[str, str]:
    """Returns keyword -> text of an attribute of the header; "" where it is empty or not there.

    Args:
        file: the file.
        start: its first bytes.
        keywords: the standard's names of attributes.

    Raises:
        ImageProblem, ImportError: see `read_image`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        dataset = _read_dataset(file, start, pixels=False, only=keywords)
        try:
            return {keyword: str(dataset.get(keyword) or "").strip() for keyword in keywords}
        except Exception as error:  # as much as its text
            raise DamagedImage(f"the DICOM file is damaged or truncated ({type(error).__name__})") from None


def _read_dataset(file: BinaryIO, content: bytes, *, pixels: bool = True, only: list[str] | None = None) -> Any:
    """Reads a DICOM file as pydicom's `Dataset`; `content` are its first bytes, `only` the keywords to read."""
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(needs("pydicom", "dicom", "DICOM")) from error
    logger = logging.getLogger("pydicom")
    if logger.level != logging.DEBUG:
        logger.setLevel(logging.CRITICAL + 1)  # its warnings quote values
    _check_deflated(content)
    try:
        return pydicom.dcmread(file, force=True, stop_before_pixels=not pixels, specific_tags=only)
    except MemoryError:
        raise
    except Exception as error:  # its text may quote the header
        raise DamagedImage(f"the DICOM file is damaged or truncated ({type(error).__name__})") from None


def _check_deflated(content: bytes) -> None:
    """Raises ImageProblem where a small file unpacks to more than the memory should hold."""
    if _DEFLATED not in content[:2048]:
        return
    length = re.search(rb"\x02\0\0\0UL\x04\0(....)", content[:256], re.DOTALL)
    start = length.end() + struct.unpack("<I", length[1])[0] if length else 0
    unpack, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, content[start:]
    while rest and not unpack.eof:
        size += len(unpack.decompress(rest, 2**20))
        rest = unpack.unconsumed_tail
        if size > MAX_INFLATED:
            raise ImageProblem(f"a deflated DICOM file that unpacks to more than {MAX_INFLATED:,} bytes")


def _count(dataset: Any) -> int:
    try:
        return max(1, int(dataset.get("NumberOfFrames") or 1))
    except (TypeError, ValueError):
        raise DamagedImage("a DICOM file whose number of frames is no number") from None


def _check_frame(dataset: Any, number: int) -> None:
    """Raises ImageProblem unless the frame has the size that the header says, and one that is not too large."""
    try:
        size = int(dataset.Columns), int(dataset.Rows)
        values = size[0] * size[1] * int(dataset.SamplesPerPixel) * (int(dataset.get("BitsAllocated", 8)) + 7) // 8
        _ = dataset.PhotometricInterpretation, dataset.file_meta.TransferSyntaxUID
    except (AttributeError, TypeError, ValueError):
        raise DamagedImage("a DICOM file that lacks the size or the kind of its pixels") from None
    if min(size) < 1:
        raise DamagedImage("a DICOM file of no pixels")
    check_size(*size)
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.is_deflated:
        return
    from pydicom.encaps import get_frame

    try:
        frame = get_frame(dataset.PixelData, number, number_of_frames=_count(dataset))
    except Exception as error:
        raise DamagedImage(f"the DICOM file is damaged or truncated ({type(error).__name__})") from None
    if syntax == _RLE:
        if _unpacked_rle(frame) > 2 * values + 1024:
            raise ImageProblem("a DICOM frame that unpacks to more than its size says")
    elif (inner := _coded_size(frame)) is not None and inner != size:
        raise ImageProblem(
            f"a DICOM frame that claims {inner[0]} x {inner[1]} pixels in a file of {size[0]} x {size[1]}"
        )


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) by the code of a JPEG, JPEG-LS or JPEG 2000 frame itself; None for others."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at >= 0:
        right, bottom, left, top = struct.unpack(">4I", frame[at + 8 : at + 24])
        return right - left, bottom - top
    at = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while at + 9 < len(frame):
        if frame[at] != 0xFF:
            at += 1
            continue
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">HH", frame[at + 5 : at + 9])
            return width, height
        at += 2 + (0 if marker in (0xFF, 0x01) else struct.unpack(">H", frame[at + 2 : at + 4])[0])
        at -= marker == 0xFF
    return None


def _unpacked_rle(frame: bytes) -> int:
    """Bytes that an RLE frame (PS3.5 annex G) unpacks to."""
    at, total = 64, 0
    while at < len(frame):
        step = frame[at]
        total += step + 1 if step < 128 else (257 - step) % 129
        at += step + 2 if step < 128 else (1 if step == 128 else 2)
    return total


def _decoded(dataset: Any, number: int) -> np.ndarray:
    """The stored values of a frame, (H, W), or (H, W, 3) RGB."""
    from pydicom.pixels.utils import pixel_array

    syntax: Any = dataset.file_meta.TransferSyntaxUID
    try:
        values = pixel_array(dataset, index=number, decoding_plugin="pylibjpeg" if str(syntax) in _JPEG_2000 else "")
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if "missing dependencies" in str(error) or "not supported" in str(error):
            raise ImageProblem(
                f"a DICOM file compressed as {syntax.name}, which nothing installed here decodes. Decompress it "
                "(`dcmdjpeg` of DCMTK, `gdcmconv --raw`), or install what pydicom decodes it with: for lossless JPEG "
                "that is pylibjpeg-libjpeg, which is under the GPL and so in no extra"
            ) from error
        raise DamagedImage(f"the pixels of the DICOM file are damaged or truncated ({error})") from error
    bits, stored, high = int(dataset.get("BitsAllocated", 8)), int(dataset.get("BitsStored", 8)), dataset.get("HighBit")
    native = values.ndim == 2 and values.dtype.kind in "iu" and not syntax.is_compressed
    if native and 8 * values.dtype.itemsize == bits and 0 < stored <= int(high or 0) + 1 <= bits != stored:
        # Other bits may hold overlays: PS3.5 8.1.1.
        values = np.right_shift(np.left_shift(values, bits - 1 - int(high)), bits - stored)
    return values


def _shown(stored: np.ndarray, dataset: Any, number: int, window: tuple[float, float] | None) -> np.ndarray:
    """Grey values as uint8, before any inversion."""
    rescale = _of_frame(dataset, number, "PixelValueTransformationSequence", "RescaleSlope")
    table = dataset.get("ModalityLUTSequence")
    voi = dataset.get("VOILUTSequence")
    windows = _of_frame(dataset, number, "FrameVOILUTSequence", "WindowCenter")
    bits = int(dataset.get("BitsStored", 8 * stored.dtype.itemsize))
    as_stored = stored.dtype.kind == "u" and bits <= 8 and not table and _is_identity(rescale)
    kind = f"{'float' if stored.dtype.kind == 'f' else f'{bits}-bit'} grey"

    def physical(values: np.ndarray) -> np.ndarray:
        if table:
            return _by_table(values, table[0])
        if rescale is None:
            return values
        return values * float(rescale.RescaleSlope) + float(rescale.get("RescaleIntercept") or 0)

    def shown(values: np.ndarray) -> np.ndarray:
        values = physical(values.astype(np.float64))
        if window is not None and not as_stored:
            return windowed(values, window, kind)
        if voi:
            top = 2 ** int(voi[0].LUTDescriptor[2]) - 1
            return np.round(_by_table(values, voi[0]) * (255 / top)).clip(0, 255).astype(np.uint8)
        if windows is not None:
            return np.round(_by_window(values, windows) * 255).astype(np.uint8)
        return windowed(values, (0.0, float(2**bits - 1)) if as_stored else None, kind)

    if stored.dtype.kind == "f":
        return np.concatenate([shown(part) for part in np.array_split(stored, max(1, stored.size // 4_000_000))])
    low, high = int(stored.min()), int(stored.max())
    if high - low < 2**16:  # each value once
        looked_up = shown(np.arange(low, high + 1))
        parts = np.array_split(stored, max(1, stored.size // 4_000_000))
        return np.concatenate([looked_up[part.astype(np.int64) - low] for part in parts])
    return np.concatenate([shown(part) for part in np.array_split(stored, max(1, stored.size // 4_000_000))])


def _is_identity(rescale: Any) -> bool:
    return rescale is None or (float(rescale.RescaleSlope) == 1 and float(rescale.get("RescaleIntercept") or 0) == 0)


def _of_frame(dataset: Any, number: int, sequence: str, keyword: str) -> Any:
    """What holds an attribute for a frame: its own functional group, the shared one, or the file; None for none."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*own[number : number + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]]
    places = [items[0] for group in groups if (items := group.get(sequence))]
    return next((place for place in (*places, dataset) if place.get(keyword) not in (None, "")), None)


def _by_window(values: np.ndarray, place: Any) -> np.ndarray:
    """Shares of white, 0 to 1, by the first window of the file (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    first = [place.get(key) for key in ("WindowCenter", "WindowWidth")]
    try:
        center, width = (float(one[0] if hasattr(one, "__iter__") else one) for one in first)
    except (TypeError, ValueError, IndexError):
        raise DamagedImage(
            "a DICOM file whose window is no pair of numbers; the card's `window:` goes before it"
        ) from None
    function = str(place.get("VOILUTFunction") or "LINEAR")
    if not width >= (1 if function == "LINEAR" else 1e-9) or not np.isfinite([center, width]).all():
        raise ImageProblem("a DICOM file whose window has no width; the card's `window:` goes before it")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    half = (width - 1) / 2
    inside = (values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    return np.where(values <= center - 0.5 - half, 0, np.where(values > center - 0.5 + half, 1, inside))


def _by_table(values: np.ndarray, item: Any) -> np.ndarray:
    """Values looked up in a table (PS3.3 C.11.1.1.1): the first and last entry go on to both sides."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if bits <= 8 and len(data) <= (count or 65536) else "<u2")
    entries = np.asarray(data, dtype=np.float64)
    if not len(entries):
        raise DamagedImage("a DICOM file with an empty table of values")
    return entries[np.clip(np.round(values) - first, 0, len(entries) - 1).astype(np.int64)]
