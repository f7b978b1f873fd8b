# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adaptclip.data import read_image
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same_pixels(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def ramp(width: int = 24, height: int = 16) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns * 10, rows * 15, rows + columns], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_comes_back_unchanged(kind):
    image = decode_image(encoded(ramp(), kind), row="r")
    assert image.mode == "RGB"
    assert same_pixels(image, ramp())


def test_reads_a_file(tmp_path):
    (tmp_path / "é.png").write_bytes(encoded(ramp()))
    assert decode_image(tmp_path / "é.png", row="r").size == (24, 16)
    with pytest.raises(DataError, match=r"row 3: cannot read .*none\.png: No such file"):
        decode_image(tmp_path / "none.png", row="row 3")


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    image = decode_image(encoded(ramp(), exif=exif), row="r")
    assert image.size == (16, 24)
    assert same_pixels(image, ramp().rotate(-90, expand=True))


def test_palette_becomes_rgb_before_anything_else():
    palette = ramp().quantize(16)
    assert palette.mode == "P"
    assert same_pixels(decode_image(encoded(palette), row="r"), palette.convert("RGB"))


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = np.asarray(decode_image(encoded(cmyk, "TIFF"), row="r"))
    assert pixels.shape == (8, 8, 3)
    assert tuple(pixels[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LAB"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (8, 8), "white")
    source = Image.new("LAB", (8, 8), (255, 128, 128)) if mode == "LAB" else image.convert(mode)
    pixels = np.asarray(decode_image(encoded(source, "TIFF"), row="r")).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert pixels.min() >= 250


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_over_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    source = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = np.asarray(decode_image(encoded(source), row="r"))
    assert tuple(pixels[3, 3]) == (255, 255, 255)
    assert abs(int(pixels[0, 0, 0]) - 10) <= 1


def test_sixteen_bit_is_scaled_by_the_window_and_refused_without():
    values = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    with pytest.raises(DataError, match=r"row 5: 16-bit grey values from 0 to 4000.*`window: \[0, 4000\]`"):
        decode_image(data, row="row 5")
    pixels = np.asarray(decode_image(data, row="r", window=(1000, 3000)))[..., 0]
    assert pixels.tolist() == [[0, 0], [128, 255]]


def test_float_is_scaled_and_must_be_finite():
    data = encoded(Image.fromarray(np.array([[0.0, 0.5], [1.0, 2.0]], dtype=np.float32)), "TIFF")
    assert np.asarray(decode_image(data, row="r", window=(0.0, 1.0)))[..., 1].tolist() == [[0, 128], [255, 255]]
    with pytest.raises(DataError, match="float grey values"):
        decode_image(data, row="r")
    data = encoded(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="1 pixels are not finite"):
        decode_image(data, row="r", window=(0.0, 1.0))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animations_and_stacks_are_refused(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=rf"row 1: an animation or stack of 3 frames \({kind}\)"):
        decode_image(data, row="row 1")


def test_a_camera_file_with_a_preview_is_a_photograph():
    data = encoded(ramp(), "MPO", save_all=True, append_images=[ramp(12, 8)])
    assert decode_image(data, row="r").size == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_files_are_an_error_that_names_the_row(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(DataError, match=r"row 9 \(a\.jpg\): the image is damaged or truncated .*--on-bad-image skip"):
        decode_image(data[: len(data) // 2], row="row 9 (a.jpg)")


def test_empty_and_unknown_files():
    with pytest.raises(DataError, match="row 2: the image is empty"):
        decode_image(b"", row="row 2")
    with pytest.raises(DataError, match=r"row 2: not an image of a known kind \(text such as HTML or SVG\)"):
        decode_image(b"<!doctype html><p>404", row="row 2")
    with pytest.raises(DataError, match=r"a HEIC photograph.*convert it"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(20), row="r")
    with pytest.raises(DataError, match="a DICOM file"):
        decode_image(bytes(128) + b"DICM" + bytes(20), row="r")


def test_formats_that_start_other_programs_are_not_opened():
    with pytest.raises(DataError, match="not an image of a known kind"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", row="r")


@pytest.mark.parametrize(
    ("side", "message"), [(60_000, "At most 100,000,000 pixels"), (10_001, "10001 x 10001 pixels")]
)
def test_a_file_that_claims_a_huge_size_is_refused_before_it_is_decoded(side, message):
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match=message):
        decode_image(bytes(data), row="r")


def test_a_strip_is_refused():
    with pytest.raises(DataError, match="5 x 505 pixels; a side may be at most 100 times"):
        decode_image(encoded(Image.new("L", (5, 505))), row="r")
    assert decode_image(encoded(Image.new("L", (5, 500))), row="r").size == (5, 500)


def test_every_allowed_format_is_known_to_pil():
    assert set(read_image._formats()) <= set(read_image.FORMATS)
    assert {"JPEG", "PNG", "WEBP", "TIFF"} <= set(read_image._formats())
