# SPDX-License-Identifier: Apache-2.0
"""An export carries the decoding that its model was trained with, and decodes every kind of image as the model does."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from adaptclip.data import read_dicom, read_image, read_tiff, read_values
from adaptclip.data.transforms import decode_image
from adaptclip.errors import ArtifactError, DataError
from adaptclip.files import write_text
from adaptclip.seeding import numpy_generator

if TYPE_CHECKING:
    from adaptclip.artifact.adapted_model import AdaptedModel

DECODER_FILE = "read_image.py"
"""The modules of PARTS as one file beside the weights, with the window and the frames of this model in it."""

PARTS = (read_values, read_dicom, read_tiff, read_image)
"""What decodes an image, in the order in which they need each other."""


def window_of(model: AdaptedModel) -> tuple[float, float] | None:
    """Returns the (black, white) values that the model was trained with, or None."""
    window = model.manifest.get("window")
    return (float(window[0]), float(window[1])) if window else None


def frames_of(model: AdaptedModel) -> str | None:
    """Returns which frame of an animation or a stack the model was trained with, or None."""
    return model.manifest.get("frames")


def write_decoder(folder: Path, model: AdaptedModel) -> None:
    """Writes DECODER_FILE."""
    future = "from __future__ import annotations\n"
    own = re.compile(r"^from adaptclip\.data\.\w+ import (\([^)]*\)|.*)\n", re.MULTILINE)
    parts = [own.sub("", inspect.getsource(part)).replace(future, "") for part in PARTS]
    source = future + "\n\n".join(parts)
    for name, kind, value in (
        ("WINDOW", "tuple[float, float] | None", window_of(model)),
        ("FRAMES", "str | int | None", frames_of(model)),
    ):
        before = f"{name}: {kind} = None\n"
        assert source.count(before) == 1
        source = source.replace(before, f"{name}: {kind} = {value!r}\n")
    write_text(folder / DECODER_FILE, source)


def load_decoder(folder: Path) -> Callable[[bytes], Image.Image]:
    """Loads the `read_image` of an export that was just written."""
    # Compiled here and not imported, which would leave compiled code in the export.
    names: dict[str, Any] = {"__name__": "exported_read_image"}
    exec(compile((folder / DECODER_FILE).read_text(encoding="utf-8"), DECODER_FILE, "exec"), names)
    return names["read_image"]


def check_decoding(folder: Path, model: AdaptedModel) -> dict[str, Image.Image]:
    """Compares the decoding of an export with the model's own on every kind of image.

    Returns:
        Kind -> the decoded image; without a window, those of more than 8 bits are missing, as both refuse them.

    Raises:
        ArtifactError: a kind is decoded otherwise, or refused by one of the two only.
    """
    window, frames, decoder, decoded = window_of(model), frames_of(model), load_decoder(folder), {}
    for kind, content in image_kinds(window or (0, 4095)).items():
        try:
            own = decode_image(content, row=kind, window=window, frames=frames)
        except DataError:
            own = None
        try:
            other = decoder(content)
        except ValueError:
            other = None
        if (own is None) != (other is None) or (own and other and own.tobytes() != other.tobytes()):
            raise ArtifactError(
                f"the export decodes an image of the kind {kind!r} otherwise than the model does, and was not kept. "
                "Please report it with the versions of Pillow and opencv-python-headless."
            )
        if own is not None:
            decoded[kind] = own
    return decoded


def image_kinds(window: tuple[float, float]) -> dict[str, bytes]:
    """Returns a small encoded image of every kind that is read: modes, depths, encodings, orientation.

    Args:
        window: (black, white) that the values of more than 8 bits lie between.
    """
    import cv2

    coarse = numpy_generator(0, "kinds of images").integers(0, 256, (5, 6, 3), dtype=np.uint8)
    colour = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
    opacity = Image.linear_gradient("L").resize(colour.size)
    clear = colour.copy()
    clear.putalpha(opacity)
    turned = Image.Exif()
    turned[0x0112] = 6
    black, white = window
    deep = np.clip(black + (white - black) * (np.asarray(colour) / 255), 0, 65535).astype(np.uint16)
    floats = (black + (white - black) * (np.asarray(colour)[..., 0] / 255)).astype(np.float32)
    kinds = {
        "8-bit colour": _encoded(colour, "PNG"),
        "8-bit grey": _encoded(colour.convert("L"), "PNG"),
        "black and white": _encoded(colour.convert("1"), "PNG"),
        "palette": _encoded(colour.quantize(32), "PNG"),
        "palette, transparent": _encoded(clear.quantize(32), "PNG"),
        "colour, transparent": _encoded(clear, "PNG"),
        "grey, transparent": _encoded(clear.convert("LA"), "PNG"),
        "CMYK": _encoded(colour.convert("CMYK"), "TIFF"),
        "JPEG, turned by EXIF": _encoded(colour, "JPEG", exif=turned, quality=95),
        "16-bit grey": _encoded(Image.fromarray(deep[..., 0]), "PNG"),
        "16-bit grey TIFF": _encoded(Image.fromarray(deep[..., 0]), "TIFF"),
        "12-bit grey PGM": b"P5 48 40 4095\n" + np.minimum(deep[..., 0], 4095).astype(">u2").tobytes(),
        "float": _encoded(Image.fromarray(floats), "TIFF"),
    }
    for kind, ending in (("16-bit colour", ".png"), ("16-bit colour TIFF", ".tiff")):
        kinds[kind] = cv2.imencode(ending, deep[..., ::-1])[1].tobytes()
    return kinds


def _encoded(image: Image.Image, form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()
