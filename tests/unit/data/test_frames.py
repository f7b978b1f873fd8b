# SPDX-License-Identifier: Apache-2.0
"""Files with several images as rows of a card, and columns from DICOM headers, of which some things are never said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zoo import test_dicom
from zoo.making import put, run

from adaptclip.data.card import parse_card
from adaptclip.data.frames import spread
from adaptclip.data.sources import READERS, open_data
from adaptclip.errors import CardError, DataError, ResourceError

av = pytest.importorskip("av")
pytest.importorskip("pydicom")


def card(block: str, folder: Path) -> Any:
    return parse_card(f"---\nadaptclip:\n{block}\n---\n", name="c", path=folder / "c.md")


def rows(block: str, folder: Path) -> Any:
    made = card(block, folder)
    return spread(READERS[made.source.kind](made, None), made)


def shades(number: int, at: int = 0) -> np.ndarray:
    """A frame that says which it is: its brightness, and a bright corner."""
    frame = np.full((48, 64, 3), 20 + 10 * number, np.uint8)
    frame[:12, at : at + 16] = 250
    return frame


def clip(path: Path, *, frames: int = 20, rate: int = 4, at: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4" if path.suffix != ".webm" else "libvpx", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        for number in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(shades(number, at), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


FOLDER = "  source: {kind: image_folder, path: .}\n  splits: {fractions: {train: 0.6, test: 0.4}}\n"


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "webm", "mov", "ts", "mpg"])
def test_frames_of_a_clip(tmp_path, ending):
    """20 frames at 4 a second: at 0, 1, 2, 3 and 4 seconds the frames 0, 4, 8, 12 and 16 are shown."""
    clip(tmp_path / "cat" / f"a.{ending}", rate=4 if ending != "mpg" else 25, frames=20 if ending != "mpg" else 21)
    put(tmp_path, "dog/b.png")
    seconds = 1 if ending != "mpg" else 4 / 25
    found = rows(FOLDER + f"  video: {{every_seconds: {seconds}}}", tmp_path)
    names = found.values[found.columns.id]
    count = 5 if ending != "mpg" else 6
    assert names[: count + 1] == [*(f"cat/a.{ending}@{seconds * i:g}s" for i in range(count)), "dog/b.png"]
    assert found.values["label"] == ["cat"] * count + ["dog"]
    assert found.values[found.columns.cluster] == [f"cat/a.{ending}"] * count + [None]
    for row in range(count):
        pixels = np.asarray(Image.open(io.BytesIO(found.store.read(row))))
        assert abs(int(pixels[30:, 30:].mean()) - (20 + 40 * row)) <= 8
        assert pixels[:8, :10].mean() > 200
        assert found.store.where(row).endswith(f"a.{ending}@{seconds * row:g}s")


def test_a_clip_is_never_in_two_parts(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            clip(tmp_path / name / f"{number}.mp4", at=12 * number + 4 * (name == "dog"))
    block = FOLDER + "  video: {every_seconds: 0.5}\n  allow: [similar_images, duplicate_images, label_conflicts]"
    data = open_data(card(block, tmp_path))
    assert len(data.train) + len(data.test) == 60
    assert not set(data.train.clusters or ()) & set(data.test.clusters or ())
    assert data.test.where(0) == str(tmp_path.resolve() / data.test.ids[0])


def test_without_a_rule_clips_are_passed_over_and_said(tmp_path):
    clip(tmp_path / "cat" / "a.mp4")
    for name in ("cat/b.png", "dog/c.png"):
        put(tmp_path, name)
    found = rows(FOLDER, tmp_path)
    assert len(found) == 2
    assert "a.mp4" not in str(found.values)
    assert any(".mp4 x 1 (videos: say in the card" in sentence for sentence in found.passed_over)


HOSTILE = {
    "a list of other addresses": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", "not an image of a known kind"),
    "a list of other files": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not an image of a known kind"),
    "empty": (b"", "0 bytes"),
    "no video": (b"\0\0\0\x18ftypisom" + bytes(300), "damaged or truncated"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_clips(tmp_path, kind):
    content, message = HOSTILE[kind]
    put(tmp_path, "cat/a.mp4", content)
    put(tmp_path, "dog/b.png")
    with pytest.raises(DataError, match=message):
        open_data(card(FOLDER + "  video: {every_seconds: 1}", tmp_path))


def test_a_cut_off_clip_says_so(tmp_path):
    clip(tmp_path / "cat" / "a.mp4")
    content = (tmp_path / "cat" / "a.mp4").read_bytes()
    (tmp_path / "cat" / "a.mp4").write_bytes(content[: len(content) // 2])
    put(tmp_path, "dog/b.png")
    with pytest.raises(DataError, match=r"a\.mp4.*(damaged or truncated|not an image)"):
        open_data(card(FOLDER + "  video: {every_seconds: 1}", tmp_path))


def test_too_many_frames_are_said(tmp_path):
    clip(tmp_path / "cat" / "a.mp4")
    with pytest.raises(DataError, match=r"a\.mp4.*5 seconds has 50,000 frames .*raise `video: \{every_seconds"):
        rows(FOLDER + "  video: {every_seconds: 0.0001}", tmp_path)
    with pytest.raises(CardError, match=r"video\.every_seconds.*greater than 0"):
        card(FOLDER + "  video: {every_seconds: 0}", tmp_path)
    with pytest.raises(CardError, match=r"video\.seconds: unknown key.*every_seconds"):
        card(FOLDER + "  video: {seconds: 1}", tmp_path)


def test_without_pyav_the_command_is_said(tmp_path, monkeypatch):
    clip(tmp_path / "cat" / "a.mp4")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ResourceError, match=r"a video needs PyAV.*`pip install 'adaptclip\[video\]'`"):
        rows(FOLDER + "  video: {every_seconds: 1}", tmp_path)


def test_every_frame_of_a_stack_is_an_image(tmp_path):
    frames = [Image.fromarray(shades(i)) for i in range(3)]
    (tmp_path / "cat").mkdir()
    frames[0].save(tmp_path / "cat" / "s.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "cat" / "x").write_bytes(test_dicom.written(test_dicom.STACK))
    put(tmp_path, "dog/b.png")
    found = rows(FOLDER + "  frames: all\n  window: [0, 4095]", tmp_path)
    assert found.values[found.columns.id] == [
        "cat/s.tif#0", "cat/s.tif#1", "cat/s.tif#2", "cat/x#0", "cat/x#1", "cat/x#2", "cat/x#3", "dog/b.png",
    ]  # fmt: skip
    assert found.values[found.columns.cluster] == ["cat/s.tif"] * 3 + ["cat/x"] * 4 + [None]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.store.read(1)))), shades(1))
    expected = test_dicom.black_white(test_dicom.STACK[2].astype(float), 0, 4095)
    assert np.abs(np.asarray(Image.open(io.BytesIO(found.store.read(5))))[..., 0] - expected).max() <= 1
    wider = rows(FOLDER + "  frames: all\n  window: [0, 5000]", tmp_path)
    assert wider.stamps[5] != found.stamps[5]  # other pixels are other contents
    assert wider.stamps[7] == found.stamps[7]


def test_a_frame_by_rule_is_what_the_card_says(tmp_path):
    frames = [Image.fromarray(shades(i)) for i in range(4)]
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            frames[i].save(tmp_path / name / f"{i}.gif", save_all=True, append_images=frames[i + 1 :] or [frames[0]])
    allow = "\n  allow: [similar_images, duplicate_images, label_conflicts]"
    with pytest.raises(DataError, match=r"stack of 4 frames \(GIF\)"):
        open_data(card(FOLDER + allow, tmp_path))
    data = open_data(card(FOLDER + "  frames: middle" + allow, tmp_path))
    by_name = {Path(data.train.where(i)).name: data.train.image(i) for i in range(len(data.train))}
    by_name |= {Path(data.test.where(i)).name: data.test.image(i) for i in range(len(data.test))}
    assert np.asarray(by_name["0.gif"])[40, 60, 0] == 40  # frame 2 of 4
    first = open_data(card(FOLDER + "  frames: first" + allow, tmp_path))
    assert first.digest != data.digest
    with pytest.raises(CardError, match=r"frames.*'first', 'middle' or 'all'"):
        card(FOLDER + "  frames: last", tmp_path)


def dicom_folder(folder: Path, **more: Any) -> None:
    rng = np.random.default_rng(0)
    for name in ("benign", "malignant"):
        for patient in range(4):
            for view in range(2):
                pixels = rng.integers(0, 4096, (6, 6)).astype(np.uint16)
                pixels = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((40, 40))).astype(np.uint16)
                about = {
                    "PatientID": f"SECRET-{patient}",
                    "PatientSex": "FM"[patient % 2],
                    "PatientAge": f"{30 + patient:03d}Y",
                }
                content = test_dicom.written(pixels, **test_dicom.RESCALED, **test_dicom.SOFT, **{**about, **more})
                put(folder, f"{name}/{patient}{view}", content)


DICOM = (
    FOLDER
    + "  dicom: {cluster: PatientID, groups: {sex: PatientSex, age: PatientAge}}\n  groups: {age: {bins: [0, 32]}}"
)


def test_patients_are_clusters_and_never_said(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))
    dicom_folder(tmp_path / "scans")
    (tmp_path / "scans" / "c.md").write_text(f"---\nlicense: other\nadaptclip:\n{DICOM}\n---\n# c\n")
    made = card(DICOM, tmp_path / "scans")
    data = open_data(made)
    everything = [*data.train.clusters, *data.test.clusters]  # pyright: ignore[reportOptionalIterable]
    assert len(everything) == 16
    assert len(set(everything)) == 4
    assert not set(data.train.clusters or ()) & set(data.test.clusters or ())
    assert {*data.train.groups["sex"], *data.test.groups["sex"]} == {"F", "M"}
    assert {*data.train.groups["age"], *data.test.groups["age"]} == {"0 to <32", "32 and above"}
    assert run(["card", "check", str(tmp_path / "scans" / "c.md")]) == 0
    info = capsys.readouterr()
    said = info.out + info.err + caplog.text + repr(data) + str(everything)
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for secret in ("SECRET", "Doe", "1.2.3.4"):
        assert secret not in said
        assert secret.encode() not in written


def test_a_patient_is_the_same_in_another_set(tmp_path):
    for name in ("one", "two"):
        dicom_folder(tmp_path / name)
    one, two = (rows(DICOM, tmp_path / name) for name in ("one", "two"))
    assert one.values[one.columns.cluster] == two.values[two.columns.cluster]


WRONG = {
    "dicom: {cluster: PatientId}": r"'PatientId' is no attribute. .*PatientID",
    "dicom: {groups: [PatientName]}": r"PatientName can tell who a patient is.*cluster: PatientName",
    "dicom: {groups: [PatientBirthDate]}": "can tell who a patient is",
    "dicom: {groups: [StudyInstanceUID]}": "can tell who a patient is",
    "dicom: {groups: [AccessionNumber]}": "can tell who a patient is",
    "dicom: {cluster: PatientSex, groups: [PatientSex]}": "can tell who a patient is",
    "dicom: {group: [PatientSex]}": r"dicom\.group: unknown key.*groups",
    "dicom: {cluster: PatientID}\n  columns: {cluster: who}": "both columns.cluster and dicom.cluster",
    "dicom: {groups: {a: PatientSex}}\n  columns: {groups: {a: b}}": "both have 'a'",
}


@pytest.mark.parametrize("rule", WRONG)
def test_what_a_card_may_not_ask_of_a_header(tmp_path, rule):
    dicom_folder(tmp_path)
    with pytest.raises(CardError, match=WRONG[rule]):
        rows(FOLDER + "  " + rule, tmp_path)


def test_a_header_without_the_attribute_is_unknown_and_alone(tmp_path):
    dicom_folder(tmp_path, PatientSex="", PatientID="")
    put(tmp_path, "benign/b.png")
    put(tmp_path, "benign/c.dcm", b"no DICOM")
    found = rows(DICOM, tmp_path)
    assert set(found.values[found.columns.cluster]) == {None}
    assert set(found.values[found.columns.groups["sex"]]) == {None}
