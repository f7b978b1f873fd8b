# SPDX-License-Identifier: Apache-2.0
"""Image files as people have them: what becomes of each kind is written beside it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zoo import heic

from adaptclip.data import read_image, read_tiff
from adaptclip.data.image_files import find_images, list_images
from adaptclip.data.read_image import count_frames
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError, ResourceError

cv2 = pytest.importorskip("cv2")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("pi_heif")

VALUES = np.random.default_rng(0).integers(0, 4096, (40, 48, 3), dtype=np.uint16)
"""12-bit values, as microscopes and X-ray detectors give them in 16 bits."""
WINDOW = (0, 4095)
COLOUR = (VALUES >> 4).astype(np.uint8)
BY_WINDOW = np.round(VALUES / 4095 * 255).astype(np.uint8)
SMOOTH = np.asarray(Image.fromarray(COLOUR[:5, :6]).resize((48, 40), Image.Resampling.BICUBIC))


def saved(pixels: np.ndarray | Image.Image, form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form, **how)
    return buffer.getvalue()


def by_opencv(ending: str, rgb: np.ndarray) -> bytes:
    bgr = rgb if rgb.ndim == 2 else np.concatenate([rgb[..., 2::-1], rgb[..., 3:]], axis=2)
    return cv2.imencode(ending, np.ascontiguousarray(bgr))[1].tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(values: np.ndarray, kind: int, *more: bytes) -> bytes:
    """A 16-bit PNG by the specification: kind 0 grey, 2 colour, 4 grey with alpha, 6 colour with alpha."""
    height, width = values.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + end


def turned(pixels: np.ndarray, form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(pixels, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


def twelve_bit_jpeg2000() -> bytes:
    """Pillow writes 16 bits only; by moving the level, the same code words say 12 bits."""
    data = bytearray(saved(VALUES[..., 0] - np.uint16(2048) + np.uint16(32768), "JPEG2000", irreversible=False))
    at = data.find(b"\xff\x4f\xff\x51")
    data[at + 42] = 11
    data[data.find(b"ihdr") + 4 + 10] = 11
    return bytes(data)


def tiff(values: np.ndarray, photometric: int, extra: int | None = None, orientation: int = 1) -> bytes:
    """An uncompressed 16-bit TIFF by the specification."""
    height, width, samples = values.shape
    data = values.astype("<u2").tobytes()
    at = 8 + len(data)
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, samples, at if samples > 2 else 16), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, 8), (274, 3, 1, orientation), (277, 3, 1, samples), (278, 3, 1, height),
        (279, 4, 1, len(data)), *([(338, 3, 1, extra)] if extra is not None else []),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    out = b"II*\0" + struct.pack("<I", at + 2 * samples) + data + struct.pack(f"<{samples}H", *[16] * samples)
    return out + struct.pack("<H", len(entries)) + table + struct.pack("<I", 0)


PALETTE = Image.fromarray(COLOUR).quantize(16)
OPACITY = np.where(np.arange(48) < 24, 0, 65535)[None].repeat(40, 0).astype(np.uint16)
CLEAR = np.concatenate([VALUES, OPACITY[..., None]], axis=2)
OVER_WHITE = np.where(OPACITY[..., None] == 0, np.uint8(255), BY_WINDOW)
GREY = BY_WINDOW[..., :1].repeat(3, 2)
TRNS = struct.pack(">3H", *VALUES[0, 0].tolist())
HIDDEN = (VALUES[0, 0] == VALUES).all(-1, keepdims=True)
HIDDEN_GREY = VALUES[..., :1] == VALUES[0, 0, 0]


def several(form: str, **how: object) -> bytes:
    """An animation or stack of COLOUR, it upside down, and it mirrored."""
    others = [Image.fromarray(np.ascontiguousarray(one)) for one in (COLOUR[::-1], COLOUR[:, ::-1])]
    return saved(COLOUR, form, save_all=True, append_images=others, **how)


def by_tifffile(*pages: np.ndarray, **how: object) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for page in pages:
            file.write(page, **how)
    return buffer.getvalue()


def pyramid(*, beside: bool) -> bytes:
    """COLOUR with two smaller levels, as pages that follow or beside the page (SubIFD)."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(COLOUR, photometric="rgb", **({"subifds": 2} if beside else {}))
        for step in (2, 4):
            file.write(COLOUR[::step, ::step], photometric="rgb", subfiletype=1)
    return buffer.getvalue()


def bomb_of_tiff() -> bytes:
    """A strip of 32-bit colour that unpacks to 4 MB instead of 23,040 bytes."""
    good = bytearray(by_tifffile(VALUES.astype(np.float32), photometric="rgb", compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(good))) as file:
        page = file.pages[0]
        start, tags = page.dataoffsets[0], page.tags
        length = tags["StripByteCounts"]
    bomb = zlib.compress(bytes(4_000_000), 9)
    good[start : start + len(bomb)] = bomb
    good[length.valueoffset : length.valueoffset + 4] = struct.pack("<I", len(bomb))
    return bytes(good)


READ: dict[str, tuple[bytes, np.ndarray, int]] = {
    "8-bit colour PNG": (saved(COLOUR, "PNG"), COLOUR, 0),
    "8-bit grey PNG": (saved(COLOUR[..., 0], "PNG"), COLOUR[..., :1].repeat(3, 2), 0),
    "1-bit PNG": (
        saved(Image.fromarray(COLOUR[..., 0] > 127), "PNG"), np.where(COLOUR[..., :1] > 127, 255, 0).repeat(3, 2), 0,
    ),
    "palette GIF": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
    "BMP": (saved(COLOUR, "BMP"), COLOUR, 0),
    "TGA": (saved(COLOUR, "TGA"), COLOUR, 0),
    "8-bit PPM": (saved(COLOUR, "PPM"), COLOUR, 0),
    "lossless JPEG 2000": (saved(COLOUR, "JPEG2000", irreversible=False), COLOUR, 0),
    "lossless WebP": (saved(COLOUR, "WEBP", lossless=True), COLOUR, 0),
    "AVIF": (saved(SMOOTH, "AVIF", quality=95), SMOOTH, 24),
    "JPEG turned by EXIF": (turned(SMOOTH, "JPEG", 6), np.rot90(SMOOTH, -1), 20),
    "PNG turned by EXIF": (turned(COLOUR, "PNG", 3), np.rot90(COLOUR, 2), 0),
    "CMYK TIFF": (saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR, 0),
    "camera file with a preview": (
        saved(Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[Image.fromarray(COLOUR)], quality=95),
        SMOOTH, 20,
    ),
    "16-bit grey PNG": (deep_png(VALUES[..., 0], 0), GREY, 0),
    "16-bit grey PNG with a clear value": (
        deep_png(VALUES[..., 0], 0, chunk(b"tRNS", TRNS[:2])), np.where(HIDDEN_GREY, np.uint8(255), GREY), 0,
    ),
    "16-bit grey PNG with alpha": (
        deep_png(CLEAR[..., [0, 3]], 4), np.where(OPACITY[..., None] == 0, np.uint8(255), GREY), 0,
    ),
    "16-bit colour PNG": (deep_png(VALUES, 2), BY_WINDOW, 0),
    "16-bit colour PNG with a clear value": (
        deep_png(VALUES, 2, chunk(b"tRNS", TRNS)), np.where(HIDDEN, np.uint8(255), BY_WINDOW), 0,
    ),
    "16-bit colour PNG with alpha": (deep_png(CLEAR, 6), OVER_WHITE, 0),
    "16-bit grey TIFF": (tiff(VALUES[..., :1], 1), GREY, 0),
    "16-bit grey TIFF, small is bright": (tiff(VALUES[..., :1], 0), 255 - GREY, 0),
    "16-bit colour TIFF": (tiff(VALUES, 2), BY_WINDOW, 0),
    "16-bit colour TIFF, compressed": (by_opencv(".tiff", VALUES), BY_WINDOW, 0),
    "16-bit colour TIFF, turned": (tiff(VALUES, 2, orientation=3), np.rot90(BY_WINDOW, 2), 0),
    "16-bit colour TIFF, turned by a quarter": (tiff(VALUES, 2, orientation=6), np.rot90(BY_WINDOW, -1), 0),
    "16-bit colour TIFF with alpha": (tiff(CLEAR, 2, extra=2), OVER_WHITE, 0),
    "16-bit colour TIFF, colours times alpha": (
        tiff(np.where(CLEAR[..., 3:] == 0, 0, CLEAR).astype(np.uint16), 2, extra=1), OVER_WHITE, 0,
    ),
    "16-bit colour TIFF with a fourth sample": (tiff(CLEAR, 2, extra=0), BY_WINDOW, 0),
    "12-bit grey PGM": (b"P5\n# a comment\n48 40\n4095\n" + VALUES[..., 0].astype(">u2").tobytes(), GREY, 0),
    "12-bit colour PPM": (b"P6 48 40 4095\n" + VALUES.astype(">u2").tobytes(), BY_WINDOW, 0),
    "12-bit grey JPEG 2000": (twelve_bit_jpeg2000(), GREY, 0),
    "HEIC": (heic.PLAIN, heic.shades(), 6),
    # A HEIC is turned by its own boxes; its EXIF orientation tells of a time before them.
    "HEIC with an EXIF orientation": (heic.TURNED, heic.shades(), 6),
    "TIFF pyramid": (pyramid(beside=False), COLOUR, 0),
    "TIFF pyramid with levels beside its page": (pyramid(beside=True), COLOUR, 0),
    "BigTIFF": (by_tifffile(COLOUR, photometric="rgb"), COLOUR, 0),
    "8-bit colour TIFF by planes": (
        by_tifffile(np.moveaxis(COLOUR, 2, 0), photometric="rgb", planarconfig="separate"), COLOUR, 0,
    ),
    "16-bit colour TIFF by planes": (
        by_tifffile(np.moveaxis(VALUES, 2, 0), photometric="rgb", planarconfig="separate"), BY_WINDOW, 0,
    ),
    "float colour TIFF": (by_opencv(".tiff", VALUES.astype(np.float32)), BY_WINDOW, 0),
    "float colour TIFF, Deflate": (
        by_tifffile(VALUES.astype(np.float32), photometric="rgb", compression="zlib"), BY_WINDOW, 0,
    ),
    "32-bit grey TIFF": (by_tifffile(VALUES[..., 0].astype(np.uint32), photometric="minisblack"), GREY, 0),
    "float TIFF": (saved(VALUES[..., 0].astype(np.float32), "TIFF"), GREY, 0),
}  # fmt: skip
"""Kind -> the file, its pixels with WINDOW, and how far a lossy encoding may be off."""

DEEP = [kind for kind in READ if kind.startswith(("16-bit", "12-bit", "32-bit", "float"))]
FRAMES = [COLOUR, COLOUR[::-1], COLOUR[:, ::-1]]
STACKS: dict[str, tuple[bytes, list[np.ndarray], int]] = {
    "animated GIF": (several("GIF"), FRAMES, 140),  # its palettes are of 256 colours
    "animated WebP": (several("WEBP", lossless=True), FRAMES, 0),
    "animated PNG": (several("PNG"), FRAMES, 0),
    "TIFF stack": (several("TIFF"), FRAMES, 0),
    "TIFF stack of 16-bit grey": (
        by_tifffile(*(VALUES[..., i] for i in range(3)), photometric="minisblack"),
        [BY_WINDOW[..., i, None].repeat(3, 2) for i in range(3)], 0,
    ),
    "TIFF stack of 16-bit colour": (
        by_tifffile(VALUES, VALUES[::-1], VALUES[:, ::-1], photometric="rgb"),
        [BY_WINDOW, BY_WINDOW[::-1], BY_WINDOW[:, ::-1]], 0,
    ),
    "TIFF stack of float colour": (
        by_tifffile(*(one.astype(np.float32) for one in (VALUES, VALUES[::-1])), photometric="rgb"),
        [BY_WINDOW, BY_WINDOW[::-1]], 0,
    ),
    "two HEIC photographs": (heic.TWO, [heic.shades(), heic.shades()[::-1]], 6),
    "animated AVIF": (
        saved(SMOOTH, "AVIF", quality=95, save_all=True, append_images=[Image.fromarray(SMOOTH[::-1].copy())]),
        [SMOOTH, SMOOTH[::-1]], 60,
    ),
}  # fmt: skip
"""Kind -> the file, its frames, and how far a lossy encoding may be off."""

REFUSED: dict[str, tuple[bytes, str]] = {
    "animation": (
        saved(COLOUR, "GIF", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]), "stack of 2 frames",
    ),
    "TIFF stack": (
        saved(COLOUR, "TIFF", save_all=True, append_images=[Image.fromarray(COLOUR)] * 2), "stack of 3 frames",
    ),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s9--00.png\n", "git annex get"),
    "saved web page": (b"<!doctype html><title>404</title>", "text such as HTML or SVG"),
    "DICOM of nothing": (bytes(128) + b"DICM" + bytes(40), "a DICOM file|the DICOM file"),
    "HEIC of nothing": (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC photograph|damaged or truncated"),
    "HEIC with names that are no text": (heic.TURNED.replace(b"Exif", b"E\xaaif", 1), "an item has no name"),
    "cut-off HEIC": (heic.PLAIN[:600], "damaged or truncated|a HEIC photograph"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "a JPEG XL image"),
    "cut-off GIF": (saved(PALETTE, "GIF")[:900], "damaged or truncated"),
    "cut-off WebP": (saved(COLOUR, "WEBP", lossless=True)[:1500], "damaged or truncated|not an image"),
    "cut-off JPEG 2000": (saved(COLOUR, "JPEG2000", irreversible=False)[:900], "damaged or truncated"),
    "cut-off AVIF": (saved(SMOOTH, "AVIF", quality=95)[:400], "damaged or truncated|an AVIF image"),
    "cut-off TIFF": (tiff(VALUES, 2)[:3000], "damaged or truncated|not an image"),
    "animated WebP": (several("WEBP", lossless=True), "stack of 3 frames"),
    "animated PNG": (several("PNG"), "stack of 3 frames"),
    "two HEIC photographs": (heic.TWO, "stack of 2 frames"),
    "a video under another name": (b"\0\0\0\x18ftypisom" + bytes(200), "not an image of a known kind"),
    "a ZIP archive under another name": (b"PK\x03\x04" + bytes(60), "not an image of a known kind"),
    "empty file": (b"", r"empty \(0 bytes\)"),
    "cut-off PNG": (saved(COLOUR, "PNG")[:2000], "damaged or truncated"),
    "cut-off 16-bit colour PNG": (deep_png(VALUES, 2)[:2000], "damaged or truncated"),
    "PNG with a hole": (saved(COLOUR, "PNG")[:1000] + bytes(500) + saved(COLOUR, "PNG")[1500:], "damaged|truncated"),
    "16-bit CMYK TIFF": (tiff(CLEAR, 5), "16-bit CMYK is not read"),
    "64-bit complex TIFF": (by_tifffile(VALUES[..., 0].astype(np.complex64)), "layout of samples is not read"),
    "TIFF with a strip that is a bomb": (bomb_of_tiff(), "unpacks to more than|damaged or truncated"),
    "small file that claims 60,000 pixels a side": (
        saved(COLOUR[..., 0], "PNG")[:16] + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
        + struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)))
        + saved(COLOUR[..., 0], "PNG")[33:], "100,000,000 pixels",
    ),
    "strip": (saved(np.zeros((4, 500), np.uint8), "PNG"), "crop it"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image of a known kind"),
}  # fmt: skip
"""Kind -> the file, and what the error says."""


def test_the_zoo_is_large_enough():
    assert len(READ) + len(REFUSED) + len(STACKS) >= 80
    assert len(DEEP) == 23


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind):
    content, expected, off = READ[kind]
    pixels = np.asarray(decode_image(content, row="r", window=WINDOW)).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= off


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_need_a_window(kind):
    with pytest.raises(DataError, match=r"(\d\d-bit|float) (grey|colour) values from [\d.]+ to \d+, .*`window: \["):
        decode_image(READ[kind][0], row="r")


@pytest.mark.parametrize("kind", [kind for kind in READ if kind not in DEEP])
def test_a_window_does_nothing_to_8_bits(kind):
    plain, windowed = (decode_image(READ[kind][0], row="r", window=w) for w in (None, (7, 9)))
    assert plain.tobytes() == windowed.tobytes()


@pytest.mark.parametrize("kind", STACKS)
def test_frames_of_a_stack(kind):
    content, frames, off = STACKS[kind]
    assert count_frames(content) == len(frames)
    for how, number in (("first", 0), ("middle", len(frames) // 2), *((i, i) for i in range(len(frames)))):
        pixels = np.asarray(decode_image(content, row="r", window=WINDOW, frames=how)).astype(int)
        assert np.abs(pixels - frames[number]).max() <= off
    others = [np.abs(frames[0].astype(int) - one).mean() for one in frames[1:]]
    assert min(others) > 20  # another frame would be seen
    with pytest.raises(DataError, match=r"`frames: first`, `frames: middle`, or `frames: all`"):
        decode_image(content, row="r", window=WINDOW)


def test_a_pyramid_is_read_at_the_largest_level_that_is_not_too_large(monkeypatch):
    for module in (read_image, read_tiff):
        monkeypatch.setattr(module, "MAX_PIXELS", 500)
    for beside in (False, True):
        assert decode_image(pyramid(beside=beside), row="r").tobytes() == COLOUR[::2, ::2].tobytes()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    content, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        decode_image(content, row="r", window=WINDOW)


TAKEN = [
    *["1.2.840.10008.1", "1.dcm", "2.dcm"],  # by its first bytes, and by their ending
    *["a.JPG", "b.jfif", "c.avif", "d.pgm", "e.ppm", "f.jp2", "g.tga", "h", "i.heic"], *"klmnop", "sub/j.webp",
]  # fmt: skip


def test_a_folder_as_people_have_it(tmp_path):
    files: dict[str, bytes] = {
        "a.JPG": saved(SMOOTH, "JPEG"), "b.jfif": saved(SMOOTH, "JPEG"), "c.avif": READ["AVIF"][0],
        "d.pgm": READ["12-bit grey PGM"][0], "e.ppm": READ["8-bit PPM"][0], "f.jp2": READ["lossless JPEG 2000"][0],
        "g.tga": READ["TGA"][0], "h": saved(SMOOTH, "JPEG"), "i.heic": READ["HEIC"][0],
        "sub/j.webp": READ["lossless WebP"][0],
        "k": READ["8-bit colour PNG"][0], "l": READ["BMP"][0], "m": READ["16-bit grey TIFF"][0],
        "n": READ["lossless JPEG 2000"][0], "o": READ["AVIF"][0], "p": READ["8-bit PPM"][0],
        **dict.fromkeys(("1.dcm", "2.dcm", "1.2.840.10008.1"), REFUSED["DICOM of nothing"][0]),
        "Thumbs.db": b"x", ".DS_Store": b"x", "._a.JPG": b"x", ".ipynb_checkpoints/a-checkpoint.jpg": b"x",
        "__MACOSX/._a.JPG": b"x", "labels.txt": b"x", "README": b"words", "film.mp4": b"x", "a.JPG.part": b"x",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub", target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_images(tmp_path)
    taken = [path.relative_to(tmp_path).as_posix() for path in listing.images]
    assert taken == TAKEN
    words = listing.words()
    for said in (
        "no ending x 1 (README)",
        ".txt x 1 (labels.txt)",
        "hidden x 3 (.DS_Store, ._a.JPG, .ipynb_checkpoints)",
        "left by a program x 2 (",
        ".mp4 x 1 (videos: say in the card which frames are images",
        ".part x 1",
        "link to a folder x 1 (elsewhere)",
        "link to nothing x 1 (gone.png)",
        "no ordinary file x 1 (pipe.png)",
    ):
        assert said in words
    # Nothing is lost: every entry is taken or passed over.
    entries = sum(len(paths) for paths in listing.passed_over.values()) + len(taken)
    assert entries == len(files) + 3  # a hidden folder and __MACOSX count once each, as their files do in `files`
    assert find_images([tmp_path]) == (list(listing.images), words)
    # A file that is named itself is taken whatever it is called.
    assert find_images([tmp_path / "a.JPG.part"]) == ([tmp_path / "a.JPG.part"], "")


def test_a_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "1.nii").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images below .*passed over: \.nii x 1 \(volumes are not read"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="no image or folder"):
        find_images([tmp_path / "none"])


@pytest.mark.parametrize(
    "problem", [MemoryError(), OSError(24, "Too many open files"), OSError(5, "Input/output error")]
)
def test_what_the_machine_lacks_is_not_the_images_fault(tmp_path, monkeypatch, problem):
    (tmp_path / "a.png").write_bytes(READ["8-bit colour PNG"][0])

    def fail(*_: object, **__: object) -> None:
        raise problem

    for place in (
        f"{Path.__module__}.Path.read_bytes",
        "PIL.Image.Image.convert",
        "PIL.PngImagePlugin.PngImageFile.load",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(ResourceError, match=r"a\.png: (there is not enough memory|cannot|it cannot)") as caught:
                decode_image(tmp_path / "a.png", row="a.png")
            assert "damaged" not in str(caught.value)
    assert decode_image(tmp_path / "a.png", row="a.png").size == (48, 40)


def test_the_shared_cases():
    folder = Path(__file__).resolve().parents[3] / "shared" / "cases" / "images"
    if not folder.is_dir():
        pytest.skip(f"there are no cases at {folder}")
    listing = list_images(folder)
    assert listing.passed_over == {}
    assert {"photo.jfif", "photo.avif", "photo.pgm", "photo.ppm", "photo.jp2", "photo.tga", "photo_without_ending"} < {
        path.name for path in listing.images
    }
    with pytest.raises(DataError, match="16-bit colour values from"):
        decode_image(folder / "colour_16bit_12bit_values.png", row="r")
    image = decode_image(folder / "colour_16bit_12bit_values.png", row="r", window=WINDOW)
    assert np.asarray(image).max() > 200
    with pytest.raises(DataError, match="Git LFS"):
        decode_image(folder / "git_lfs_pointer.png", row="r")
