# SPDX-License-Identifier: Apache-2.0
"""Images as people hand them over: every kind gives the pixels that a file of it would, and a wrong kind gets words."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from PIL import Image, ImageCms

from adaptclip.data.dataset import FileStore, ImageDataset
from adaptclip.data.given_images import each_image, one_image
from adaptclip.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
CLEAR = np.dstack([RGB, np.where(GREY > 99, 255, 0).astype(np.uint8)])
OVER_WHITE = np.where(CLEAR[..., 3:] == 255, RGB, 255)
AS_GREY = np.repeat(GREY[..., None], 3, axis=2)
BILEVEL = np.where(AS_GREY > 99, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "é 1.png"
    Image.fromarray(RGB).save(path)
    return path


def pixels(x: Any, window: tuple[float, float] | None = None) -> list[np.ndarray]:
    return [np.asarray(image.decoded(window)) for image in each_image(x)]


def pil(mode: str) -> Image.Image:
    """An image of a mode, as PIL makes it."""
    image = Image.fromarray(RGB)
    by_way_of = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        found = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert found is not None
        return found
    return image.convert(by_way_of.get(mode, mode)).convert(mode)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (RGB, RGB),
        (CLEAR, OVER_WHITE),
        (GREY, AS_GREY),
        (GREY[..., None], AS_GREY),
        (GREY > 99, BILEVEL),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1) / 255, RGB),
        (torch.from_numpy(GREY)[None], AS_GREY),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}",
)
def test_one_array_of_pixels_is_one_image_by_itself_and_in_a_list(given, wanted):
    for x in (given, [given], (given,), iter([given])):
        (found,) = pixels(x)
        np.testing.assert_array_equal(found, wanted)


def test_half_precision_is_as_near_as_it_can_be():
    (found,) = pixels(torch.from_numpy(RGB / 255).bfloat16())
    assert np.abs(found.astype(int) - RGB).max() <= 1


@pytest.mark.parametrize(
    "stack",
    [np.stack([RGB, RGB]), torch.from_numpy(np.stack([RGB, RGB])).permute(0, 3, 1, 2), np.stack([RGB, RGB]) / 255],
    ids=["numpy", "tensor", "floats"],
)
def test_a_stack_is_its_images(stack):
    assert [found.tolist() for found in pixels(stack)] == [RGB.tolist()] * 2
    assert [found.tolist() for found in pixels(np.stack([GREY] * 5))] == [AS_GREY.tolist()] * 5


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "PA", "La", "RGBa", "LAB"]
)
def test_pil_images_of_any_mode_come_out_as_pil_shows_them(mode):
    image = pil(mode)
    (found,) = pixels(image)
    if mode == "LAB":  # PIL converts it by a profile; back again it is a few shades off
        assert np.abs(found.astype(int) - RGB).mean() <= 2
    else:
        plain = image.convert("LA") if mode == "La" else image
        np.testing.assert_array_equal(found, np.asarray(plain.convert("RGB")))


def test_what_is_clear_lies_over_white_and_the_rotation_is_applied():
    palette = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7) % 2, "P")
    palette.putpalette([200, 0, 0, 0, 10, 20, 30, 255], "RGBA")
    np.testing.assert_array_equal(pixels(palette)[0][0, :2], [[255, 255, 255], [10, 20, 30]])
    np.testing.assert_array_equal(pixels(Image.fromarray(CLEAR))[0], OVER_WHITE)
    turned = Image.fromarray(RGB)
    turned.getexif()[0x0112] = 6
    np.testing.assert_array_equal(pixels(turned)[0], np.rot90(RGB, -1))
    colour = Image.fromarray(RGB).convert("YCbCr")
    colour.getexif()[0x0112] = 6
    np.testing.assert_array_equal(pixels(colour)[0], np.rot90(np.asarray(colour.convert("RGB")), -1))


def test_files_bytes_and_columns_of_them(file):
    content = file.read_bytes()
    cells = [{"bytes": content, "path": "a.png"}, {"bytes": None, "path": str(file)}]
    for x in (
        file, str(file), content, bytearray(content), memoryview(content), io.BytesIO(content), file.open("rb"),
        [file, str(file)], np.array([str(file)]), np.array([file], dtype=object), pandas.Series([str(file)], index=[7]),
        pandas.DataFrame({"path": [file]})["path"], pyarrow.array([str(file)]), pyarrow.chunked_array([[content]]),
        cells, cells[0], pyarrow.array(cells), (path for path in [file]), {"a": file}.values(), [io.BytesIO(content)],
        ImageDataset(FileStore([file]), np.arange(1), ("a",), ("x",), np.zeros(1, int), ("",)),
    ):  # fmt: skip
        found = pixels(x)
        assert found, type(x)
        for one in found:
            np.testing.assert_array_equal(one, RGB)


def test_they_keep_their_names(file):
    content = file.read_bytes()
    given = [file, content, {"bytes": content, "path": "a/b.png"}, file.open("rb"), io.BytesIO(content), RGB]
    names = [image.name for image in each_image(given)]
    assert names == [str(file), "1", "a/b.png", str(file), "4", "5"]
    assert [image.where for image in each_image(given, "X")][1] == "X[1]"
    data = ImageDataset(FileStore([file]), np.arange(1), ("a",), ("s1/x.png",), np.zeros(1, int), ("",))
    assert one_image(data).name == "s1/x.png"


def test_nothing_is_read_before_it_is_needed(file):
    def endless():
        while True:
            yield file

    images = each_image(endless())
    assert next(images).name == next(images).name == str(file)


def test_more_than_8_bits_go_by_the_window_as_in_files():
    deep = GREY.astype(np.uint16) * 16
    for x in (deep, deep.astype(np.int16), deep.astype(np.int64), deep.astype(np.float32)):
        np.testing.assert_array_equal(pixels([x], (0, 4080))[0], AS_GREY)
    np.testing.assert_array_equal(pixels(RGB.astype(np.uint16) * 16, (0, 4080))[0], RGB)
    np.testing.assert_array_equal(pixels(Image.fromarray(deep), (0, 4080))[0], AS_GREY)
    for mode in ("I;16", "I;16B", "I", "F"):
        image = Image.fromarray(deep) if mode.startswith("I;16") else Image.fromarray(GREY).convert(mode)
        with pytest.raises(DataError, match="nothing says which are black and white"):
            pixels(image)
    np.testing.assert_array_equal(pixels(Image.fromarray(GREY), (0, 4080))[0], AS_GREY)  # 8 bits need no window


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "images should be one image or a list of them, got None; images are paths, PIL images"),
        (3, "got int"),
        ([], "images is empty"),
        (np.zeros((0, 4, 4, 3), np.uint8), "images is empty"),
        (iter([]), "images is empty"),
        ({"image": []}, r'images is a dict with image; give one column of it, such as images["image"]'),
        ({}, "images is a dict with nothing"),
        ({"a", "b"}, "is a set, which has no order"),
        (pandas.DataFrame({"path": ["a"], "label": ["b"]}), "is a DataFrame with path, label; give one column"),
        (pyarrow.table({"path": ["a"]}), "is a Table with path; give one column"),
        ([None], "images[0] should be an image, got None"),
        (["a photo of a dog"], "there is no file a photo of a dog; a text is taken for the path of an image"),
        ("https://host/a.png", "https://host/a.png is an address and no file: fetch it first"),
        ("data:image/png;base64," + "A" * 9000, "(9,022 characters) is an address and no file"),
        (str(Path(__file__).parent), "is a folder: give its images, for example sorted(Path("),
        ([[[0.1, 0.2]]], "images[0] should be an image, got list"),
        ([("image", "label")], "images[0] should be an image, got tuple"),
        (np.zeros((5, 512), np.float32), "features go to `predict_proba` and `fit`"),
        (np.zeros((3, 9, 9), np.uint8), "no stack of images for certain: give a list"),
        (np.zeros(9, np.uint8), "no image and no stack"),
        ([np.zeros((9, 9, 2), np.uint8)], "(H, W, 3) or (H, W, 4) pixels, got uint8 of shape (9, 9, 2)"),
        ([np.zeros((0, 9, 3), np.uint8)], "of shape (0, 9, 3)"),
        ([np.zeros((9, 9), complex)], "got an array of complex128"),
        ([RGB.astype(np.float32)], "divide by 255, or say .astype('uint8')"),
        ([RGB / 64 - 2], "transformed pixels are not taken"),
        ([np.full((4, 4), np.nan)], "16 pixels are not finite numbers"),
        ([RGB.astype(np.int64)], ".astype('uint8') makes them shades"),
        ([GREY.astype(np.uint16) * 16], "nothing says which are black and white; scale them to floats from 0 to 1"),
        ([io.StringIO("text")], "is open as text; open images with mode 'rb'"),
        ([io.BytesIO()], "nothing left to read; seek(0)"),
        ([b"no image"], "not an image of a known kind"),
        ([Image.new("RGB", (0, 4))], "this PIL image (RGB, 0 x 4) cannot be read"),
    ],
)  # fmt: skip
def test_a_wrong_kind_gets_words(given, words):
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        pixels(given)
    assert len(str(caught.value)) < 700


def test_a_closed_or_damaged_file_gets_words(file, tmp_path):
    handle = file.open("rb")
    handle.close()
    with pytest.raises(DataError, match="the file cannot be read: read of closed file"):
        pixels([handle])
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:-40])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(DataError, match=r"this PIL image .* cannot be read"):
        pixels([image])
    with pytest.raises(DataError, match=r"colour of|is not read; give uint16"):
        pixels([RGB.astype(np.int32)], (0, 4080))


def test_one_image_is_one():
    with pytest.raises(DataError, match="the image should be one image, got 2"):
        one_image([RGB, RGB])
