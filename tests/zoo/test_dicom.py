# SPDX-License-Identifier: Apache-2.0
"""DICOM files as clinics have them, written by pydicom; the expected pixels are computed by the standard's own text."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptclip.data import read_dicom
from adaptclip.data.read_image import count_frames
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError, ResourceError

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

PLAIN, BIG, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
BASELINE, JPEG_2000, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
LOSSLESS, JPEG_LS = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"
CT = np.random.default_rng(0).integers(0, 4096, (20, 24), dtype=np.uint16)
"""12-bit stored values of 0 to 4095, with the intercept -1024 Hounsfield units of -1024 to 3071."""
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
STACK = np.stack([CT, CT[::-1], CT[:, ::-1], CT // 2])
NAME, ID = "Doe^Jane", "PID-4711-SECRET"


def written(pixels: np.ndarray | None, *, syntax: str = PLAIN, **more: Any) -> bytes:
    """A DICOM file of grey (H, W), stacked grey (F, H, W) or colour (H, W, 3) values."""
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID, dataset.PatientSex, dataset.PatientAge = NAME, ID, "F", "045Y"
    dataset.StudyInstanceUID, dataset.Modality = "1.2.3.4", "CT"
    if isinstance(pixels, np.ndarray):
        colour = pixels.ndim == 3 and pixels.shape[2] == 3
        height, width = pixels.shape[:2] if colour else pixels.shape[-2:]
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = height, width, 3 if colour else 1
        dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        dataset.BitsAllocated = 8 * pixels.dtype.itemsize
        dataset.BitsStored = 12 if pixels.dtype == np.uint16 else dataset.BitsAllocated
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        if colour:
            dataset.PlanarConfiguration = 0
        elif pixels.ndim == 3:
            dataset.NumberOfFrames = len(pixels)
        content = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
        dataset.PixelData = content + b"\0" * (len(content) % 2)
    for keyword, value in more.items():
        setattr(dataset, keyword, value)
    if "FloatPixelData" in more:
        del dataset.PixelData
    elif isinstance(pixels, np.ndarray):
        dataset.HighBit = more.get("HighBit", dataset.BitsStored - 1)
        dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.UID("1.2.840.10008.5.1.4.1.1.2")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.UID("1.2.3.5")
    if dataset.file_meta.TransferSyntaxUID.is_compressed and syntax != DEFLATED and "PixelData" in dataset:
        dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def compressed(syntax: str, encoded: bytes, like: np.ndarray, **more: Any) -> bytes:
    return written(like, syntax=syntax, PixelData=encapsulate([encoded]), **more)


def saved(pixels: np.ndarray, form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **how)
    return buffer.getvalue()


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2, pixel by pixel as it is written there, with 0 to 255 as the output."""
    out = np.empty(values.shape)
    for at, x in np.ndenumerate(values.astype(float)):
        if x <= center - 0.5 - (width - 1) / 2:
            out[at] = 0
        elif x > center - 0.5 + (width - 1) / 2:
            out[at] = 255
        else:
            out[at] = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.round(out)


def black_white(values: np.ndarray, black: float, white: float) -> np.ndarray:
    return np.round(np.clip((values - black) / (white - black), 0, 1) * 255)


def item(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def table(entries: np.ndarray, first: int, bits: int) -> Sequence:
    made = item(LUTDescriptor=[len(entries), first, bits], LUTData=entries.astype("<u2").tobytes())
    made["LUTDescriptor"].VR, made["LUTData"].VR = "US", "OW"
    return Sequence([made])


def palette(bits: int) -> dict[str, Any]:
    shift = bits - 8
    made: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for number, name in enumerate(("Red", "Green", "Blue")):
        made[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        entries = PALETTE[:, number].astype(np.uint16) << shift
        made[f"{name}PaletteColorLookupTableData"] = entries.astype("<u2" if bits > 8 else np.uint8).tobytes()
    return made


PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
INDICES = np.arange(480).astype(np.uint8).reshape(20, 24)
HU = CT.astype(float) - 1024
SOFT: dict[str, Any] = {"WindowCenter": 40, "WindowWidth": 400}
RESCALED: dict[str, Any] = {"RescaleSlope": 1, "RescaleIntercept": -1024}
VOI = np.linspace(0, 4095, 4096).round() ** 2 // 4095
OVERLAID = CT | (np.random.default_rng(3).integers(0, 16, CT.shape, dtype=np.uint16) << 12)
FRAME_WINDOWS = Sequence(
    [item(FrameVOILUTSequence=Sequence([item(WindowCenter=500 * (i + 1), WindowWidth=800)])) for i in range(4)]
)
SHARED = Sequence([item(PixelValueTransformationSequence=Sequence([item(RescaleSlope=2, RescaleIntercept=-10)]))])
YBR = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
GREY8 = COLOUR[..., 0]
THREE = {"frames": "middle"}
CARD = {"window": (-160.0, 240.0)}
SMOOTH = np.asarray(Image.fromarray(COLOUR[:4, :5]).resize((24, 20), Image.Resampling.BICUBIC))

CODE = saved(CT, "JPEG2000", irreversible=False, no_jp2=True)
JPEG = saved(SMOOTH, "JPEG", quality=98, subsampling=0)

READ: dict[str, tuple[bytes, np.ndarray, dict[str, Any]]] = {
    "CT, the file's window": (written(CT, **RESCALED, **SOFT), linear(HU, 40, 400), {}),
    "CT, the card's window goes before the file's": (
        written(CT, **RESCALED, **SOFT), black_white(HU, -160, 240), CARD,
    ),
    "CT, two windows: the first": (
        written(CT, **RESCALED, WindowCenter=[40, 500], WindowWidth=[400, 2000]), linear(HU, 40, 400), {},
    ),
    "CT, signed values": (written(HU.astype(np.int16), BitsStored=16, **SOFT), linear(HU, 40, 400), {}),
    "CT, big-endian": (written(CT, syntax=BIG, **RESCALED, **SOFT), linear(HU, 40, 400), {}),
    "CT, deflated": (written(CT, syntax=DEFLATED, **RESCALED, **SOFT), linear(HU, 40, 400), {}),
    "CT, lossless JPEG 2000": (
        compressed(JPEG_2000, CODE, CT, BitsStored=16, **RESCALED, **SOFT),
        linear(HU, 40, 400), {},
    ),
    "window of one value": (written(CT, WindowCenter=2000, WindowWidth=1), linear(CT, 2000, 1), {}),
    "exactly linear window": (
        written(CT, WindowCenter=2000, WindowWidth=900, VOILUTFunction="LINEAR_EXACT"),
        np.round(np.clip((CT - 2000.0) / 900 + 0.5, 0, 1) * 255), {},
    ),
    "sigmoid window": (
        written(CT, WindowCenter=2000, WindowWidth=900, VOILUTFunction="SIGMOID"),
        np.round(255 / (1 + np.exp(-4 * (CT - 2000.0) / 900))), {},
    ),
    "slope of less than one": (
        written(CT, RescaleSlope="0.25", RescaleIntercept=-3, WindowCenter=500, WindowWidth=600),
        linear(CT * 0.25 - 3, 500, 600), {},
    ),
    "table of the rescaling": (
        written(CT, ModalityLUTSequence=table(np.arange(4096) // 2, 0, 16), WindowCenter=900, WindowWidth=900),
        linear(CT // 2, 900, 900), {},
    ),
    "table in the place of a window": (
        written(CT, VOILUTSequence=table(VOI, 0, 12), **SOFT), np.round(VOI[CT] * 255 / 4095), {},
    ),
    "x-ray, MONOCHROME1": (
        written(CT, PhotometricInterpretation="MONOCHROME1", WindowCenter=2048, WindowWidth=3000),
        255 - linear(CT, 2048, 3000), {},
    ),
    "x-ray, MONOCHROME1, the card's window": (
        written(CT, PhotometricInterpretation="MONOCHROME1"), 255 - black_white(CT, 0, 4095), {"window": (0.0, 4095.0)},
    ),
    "inverse by its presentation": (
        written(CT, PresentationLUTShape="INVERSE", WindowCenter=2048, WindowWidth=3000),
        255 - linear(CT, 2048, 3000), {},
    ),
    "8 bits without a window": (written(GREY8), GREY8, {}),
    "8 bits, the card's window does nothing": (written(GREY8), GREY8, CARD),
    "8 bits, MONOCHROME1": (written(GREY8, PhotometricInterpretation="MONOCHROME1"), 255 - GREY8, {}),
    "8 bits, the file's window": (
        written(GREY8, WindowCenter=100, WindowWidth=120), linear(GREY8, 100, 120), {},
    ),
    "RLE": (
        compressed(RLE, pydicom.pixels.encoders.RLELosslessEncoder.encode(
            GREY8, rows=20, columns=24, samples_per_pixel=1, bits_allocated=8, bits_stored=8, pixel_representation=0,
            photometric_interpretation="MONOCHROME2", number_of_frames=1,
        ), GREY8), GREY8, {},
    ),
    "other bits hold an overlay": (written(OVERLAID, WindowCenter=2048, WindowWidth=3000), linear(CT, 2048, 3000), {}),
    "RGB": (written(COLOUR), COLOUR, {}),
    "RGB by planes": (
        written(COLOUR, PlanarConfiguration=1, PixelData=np.moveaxis(COLOUR, 2, 0).tobytes()), COLOUR, {},
    ),
    "YBR": (written(YBR, PhotometricInterpretation="YBR_FULL"), COLOUR, {"off": 3}),
    "colour JPEG": (
        compressed(BASELINE, JPEG, SMOOTH, PhotometricInterpretation="YBR_FULL"),
        SMOOTH, {"off": 12},
    ),
    "palette of 16 bits": (written(INDICES, **palette(16)), PALETTE[INDICES], {}),
    "palette of 8 bits": (written(INDICES, **palette(8)), PALETTE[INDICES], {}),
    "frames: the first": (written(STACK, **RESCALED, **SOFT), linear(HU, 40, 400), {"frames": "first"}),
    "frames: the middle": (
        written(STACK, **RESCALED, **SOFT), linear(STACK[2].astype(float) - 1024, 40, 400), THREE,
    ),
    "frames with windows of their own": (
        written(STACK, PerFrameFunctionalGroupsSequence=FRAME_WINDOWS, SharedFunctionalGroupsSequence=SHARED),
        linear(STACK[2] * 2.0 - 10, 1500, 800), THREE,
    ),
    "floats": (
        written(
            np.zeros((20, 24), np.uint16), BitsAllocated=32, FloatPixelData=(HU / 10).astype("<f4").tobytes(),
            WindowCenter=4, WindowWidth=40,
        ),
        linear((HU / 10).astype(np.float32), 4, 40), {},
    ),
    "without its preamble": (written(CT, **RESCALED, **SOFT)[132:], linear(HU, 40, 400), {}),
}  # fmt: skip
"""Kind -> the file, its pixels, and how it is read."""


def bomb_of_jpeg_2000() -> bytes:
    """A code that claims 60,000 x 60,000 pixels, in a file of 24 x 20."""
    code = bytearray(saved(CT, "JPEG2000", irreversible=False, no_jp2=True))
    for at in (8, 12, 24, 28):  # the image's and the tiles' width and height
        code[at : at + 4] = (60000).to_bytes(4, "big")
    return compressed(JPEG_2000, bytes(code), CT)


def bomb_of_jpeg() -> bytes:
    code = bytearray(saved(GREY8, "JPEG"))
    at = code.find(b"\xff\xc0")
    code[at + 5 : at + 9] = b"\xff\xdc" * 2
    return compressed(BASELINE, bytes(code), GREY8)


def bomb_of_rle() -> bytes:
    head = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    return compressed(RLE, head + b"\x81\0" * 50_000, GREY8)


def bomb_of_deflate() -> bytes:
    plain = written(CT, syntax=DEFLATED)
    start = plain.find(b"DICM") + 16 + int.from_bytes(plain[140:144], "little")
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(pack.compress(bytes(2**20)) for _ in range(2)) + pack.flush()
    return plain[:start] + packed


REFUSED: dict[str, tuple[bytes, str, dict[str, Any]]] = {
    "12 bits without any window": (
        written(CT, **RESCALED), r"12-bit grey values from -1024 to 30\d\d, .*`window: \[-1024, 30", {},
    ),
    "without pixel data": (written(None), "without pixel data", {}),
    "of several frames": (written(STACK, **SOFT), r"stack of 4 frames \(DICOM\).*`frames: first`", {}),
    "cut off in the pixels": (written(CT, **SOFT)[:-300], "damaged or truncated", {}),
    "cut off in the header": (written(CT, **SOFT)[:300], "without pixel data, .* or one that is cut off", {}),
    "no DICOM but its name": (b"a text that somebody called x.dcm", "not an image of a known kind", {}),
    "a window of no width": (written(CT, WindowCenter=40, WindowWidth=0), "window has no width", {}),
    "too large": (written(CT, Rows=60000, Columns=60000, **SOFT), "more than 100,000,000", {}),
    "a strip": (written(np.zeros((2, 900), np.uint8)), "crop it", {}),
    "bomb in a JPEG 2000 frame": (bomb_of_jpeg_2000(), "claims 60000 x 60000 pixels in a file of 24 x 20", {}),
    "bomb in a JPEG frame": (bomb_of_jpeg(), "claims 65500 x 65500 pixels in a file of 24 x 20", {}),
    "bomb in an RLE frame": (bomb_of_rle(), "unpacks to more than its size says", {}),
    "bomb in a deflated file": (bomb_of_deflate(), "unpacks to more than 1,048,576 bytes", {}),
    "no kind of colour": (written(CT, PhotometricInterpretation="HSV", **SOFT), "whose kind of colour is not read", {}),
    "a million frames": (written(CT, NumberOfFrames=10**6, **SOFT), "1,000,000 frames", THREE),
    "floats that are no numbers": (
        written(
            np.zeros((20, 24), np.uint16), BitsAllocated=32, WindowCenter=4, WindowWidth=40,
            FloatPixelData=np.full((20, 24), np.nan, "<f4").tobytes(),
        ),
        "480 pixels are not finite", {"window": (0.0, 1.0)},
    ),
}  # fmt: skip
"""Kind -> the file, what the error says, and how it is read."""


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind):
    content, expected, how = READ[kind]
    how = dict(how)
    off = how.pop("off", 1)  # a half may be rounded either way
    pixels = np.asarray(decode_image(content, row="r", **how)).astype(int)
    expected = np.asarray(expected).astype(int)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= off
    assert (pixels != expected).mean() < (0.005 if off == 1 else 1)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, monkeypatch):
    content, message, how = REFUSED[kind]
    monkeypatch.setattr(read_dicom, "MAX_INFLATED", 2**20)
    with pytest.raises(DataError, match=message) as caught:
        decode_image(content, row="r", **how)
    assert "Doe" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_jpeg_ls():
    jpeg_ls = pytest.importorskip("jpeg_ls")
    code = bytes(jpeg_ls.encode_array(CT))
    content = compressed(JPEG_LS, code, CT, **RESCALED, **SOFT)
    assert np.abs(np.asarray(decode_image(content, row="r"))[..., 0] - linear(HU, 40, 400)).max() <= 1
    at = code.find(b"\xff\xf7")
    bomb = code[: at + 5] + b"\xff\xdc" * 2 + code[at + 9 :]
    with pytest.raises(DataError, match="claims 65500 x 65500"):
        decode_image(compressed(JPEG_LS, bomb, CT, **SOFT), row="r")


def test_lossless_jpeg_is_refused_with_the_ways_out():
    code = b"\xff\xd8\xff\xc3\0\x0b\x10\0\x14\0\x18\1\1\x11\0" + bytes(60)
    with pytest.raises(DataError, match=r"compressed as JPEG Lossless.*dcmdjpeg.*GPL"):
        decode_image(compressed(LOSSLESS, code, CT, **SOFT), row="r")


def test_frames_are_counted():
    assert count_frames(written(STACK)) == 4
    assert count_frames(written(CT)) == 1


def test_nothing_of_a_header_is_said(recwarn, caplog):
    """Values that pydicom would quote in warnings and logs."""
    bad = written(CT, **SOFT)
    at = bad.find(b"1.2.3.4\0")
    bad = bad[:at] + b"DOE 4711" + bad[at + 8 :]
    assert read_dicom.header_texts(io.BytesIO(bad), bad, ["StudyInstanceUID"]) == {"StudyInstanceUID": "DOE 4711"}
    decode_image(bad, row="r")
    said = caplog.text + "".join(str(one.message) for one in recwarn)
    assert "4711" not in said


def test_without_pydicom_the_command_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ResourceError, match=r"DICOM needs pydicom.*`pip install 'adaptclip\[dicom\]'`"):
        decode_image(written_before, row="r")


written_before = written(CT)
