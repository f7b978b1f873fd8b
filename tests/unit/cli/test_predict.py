# SPDX-License-Identifier: Apache-2.0
"""`adaptclip predict` on folders as people have them: rows as they come, bad images, junk, files, spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made_artifacts import save
from PIL import Image

from adaptclip.artifact import load
from adaptclip.artifact.adapted_model import Unreadable
from adaptclip.cli import main
from adaptclip.clip import load_backbone
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.errors import DataError, ResourceError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "artifact"
    data = open_data(load_card("digits"), check=False)
    save(folder, "zero_shot", load_backbone(tiny), data, templates=["the digit {}."])
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images, the third of them damaged, and what programs leave behind."""
    made = tmp_path / "images"
    (made / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(5):
        picture(i).save(made / f"{i}.png")
    (made / "2.png").write_bytes((made / "2.png").read_bytes()[:500])
    for junk in ("._0.png", ".ipynb_checkpoints/0-checkpoint.png", "Thumbs.db", "scan.nii"):
        (made / junk).write_bytes(b"junk")
    return made


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def names(text: str) -> list[str]:
    return [Path(json.loads(line)["image"]).stem for line in text.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_bad_image_costs_no_other_row(artifact, folder, capsys, batch_size):
    command = ("predict", artifact, folder, "--format", "jsonl", "--batch-size", batch_size)
    assert run(*command) == 1
    info = capsys.readouterr()
    assert names(info.out) == ["0", "1"]
    assert "2.png: the image is damaged or truncated" in info.err
    assert "2 of 5 images were predicted before it" in info.err
    assert run(*command, "--on-bad-image", "skip") == 0
    info = capsys.readouterr()
    assert names(info.out) == ["0", "1", "3", "4"]
    assert "skipped: " in info.err
    assert "4 of 5 images were predicted, 1 skipped" in info.err
    assert ".nii x 1" in info.err
    assert "hidden x 2" in info.err
    # The others are what each is by itself.
    alone = load(artifact).predict([folder / "3.png"])[0]
    found = json.loads(info.out.splitlines()[2])
    assert (found["label"], found["confidence"]) == (alone.label, pytest.approx(alone.confidence, abs=1e-5))


def test_nothing_but_bad_images_is_an_error(artifact, folder, capsys):
    assert run("predict", artifact, folder / "2.png", "--on-bad-image", "skip") == 1
    assert "none of 1 images could be predicted" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_file_has_its_name_when_it_is_complete(artifact, folder, tmp_path, capsys, form):
    out = tmp_path / "new" / f"answers.{form}"
    assert run("predict", artifact, folder, "--out", out) == 1
    assert not out.exists()
    partial = out.with_name(out.name + ".partial")
    assert len(partial.read_text().splitlines()) == 2 + (form == "csv")
    assert "the 2 rows that were done are in" in capsys.readouterr().err
    rows = partial.read_text()
    assert run("predict", artifact, folder, "--out", out, "--on-bad-image", "skip") == 1
    assert "unfinished rows of an earlier command" in capsys.readouterr().err
    assert partial.read_text() == rows
    partial.unlink()
    assert run("predict", artifact, folder, "--out", out, "--on-bad-image", "skip") == 0
    assert capsys.readouterr().out == ""
    assert len(out.read_text().splitlines()) == 4 + (form == "csv")
    assert not partial.exists()
    assert run("predict", artifact, folder, "--out", out) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["answers.csv", "answers.csv.partial"])
@pytest.mark.parametrize("target", ["photo.png", "nothing"])
def test_rows_are_never_written_through_a_link(artifact, folder, tmp_path, capsys, name, target):
    photo = tmp_path / "photo.png"
    photo.write_bytes((folder / "3.png").read_bytes())
    (tmp_path / name).symlink_to(tmp_path / target)
    assert run("predict", artifact, photo, "--out", tmp_path / "answers.csv") == 1
    assert "exists already" in capsys.readouterr().err
    assert photo.read_bytes() == (folder / "3.png").read_bytes()
    assert (tmp_path / name).is_symlink()
    assert not (tmp_path / "nothing").exists()


def test_formats_that_do_not_go_together(artifact, folder, tmp_path, capsys):
    assert run("predict", artifact, folder, "--out", tmp_path / "a.xlsx") == 1
    assert "ends in .csv, .jsonl, .ndjson" in capsys.readouterr().err
    assert run("predict", artifact, folder, "--out", tmp_path / "a.csv", "--format", "table") == 1
    assert "--format is csv or jsonl" in capsys.readouterr().err


def test_names_are_harmless_in_every_format(artifact, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "=cmd\x1b[31m\u202e[red].png"
    picture(0).save(tmp_path / name)
    assert run("predict", artifact, name) == 0
    assert "=cmd\\x1b[31m\\u202e[red].png" in capsys.readouterr().out
    assert run("predict", artifact, name, "--format", "jsonl") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert json.loads(out)["image"] == name
    for flags, expected in (((), "'" + name), (("--raw-csv",), name)):
        assert run("predict", artifact, name, "--format", "csv", *flags) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["image"] for row in rows] == [expected]
    assert run("predict", artifact, "\x1b[31mnone.png") == 1
    assert "there is no file or folder \\x1b[31mnone.png" in capsys.readouterr().err


def test_memory_that_gives_out_is_no_damaged_image(artifact, folder, capsys, monkeypatch):
    model, own = load(artifact), Image.Image.convert
    images = [folder / "0.png", folder / "1.png", folder / "3.png"]

    def convert(self: Image.Image, *how: object, **more: object) -> Image.Image:
        if calls.append(1) or len(calls) > 2:
            raise MemoryError
        return own(self, *how, **more)  # pyright: ignore[reportArgumentType]

    calls: list[int] = []
    monkeypatch.setattr(Image.Image, "convert", convert)
    found: list[object] = []
    with pytest.raises(ResourceError, match="not enough memory to decode it; this says nothing against the image"):
        found.extend(model.stream(images))
    assert 0 < len(found) < 3
    assert not any(isinstance(answer, Unreadable) for answer in found)


def test_a_list_is_refused_at_its_first_bad_image(artifact, folder):
    model = load(artifact)
    with pytest.raises(DataError, match=r"2\.png: the image is damaged"):
        model.predict(sorted(folder.glob("[0-9].png")))
    kinds = [type(answer) for answer in model.stream([b"x", picture(0), folder / "0.png"])]
    assert kinds.count(Unreadable) == 1


def test_images_are_decoded_one_at_a_time(artifact, monkeypatch):
    """Between two decodings only pixels of the tower's size are kept, whatever the batch."""
    model = load(artifact)
    seen: list[tuple[int, ...]] = []
    own = model._of_pixels

    def watch(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pixels.shape))
        return own(pixels)

    alive: set[int] = set()
    most: list[int] = []
    transform = model.backbone.transform

    class Tracked(Image.Image):
        def __del__(self) -> None:
            alive.discard(id(self))

    def track(image: Image.Image) -> torch.Tensor:
        image.__class__ = Tracked
        alive.add(id(image))
        most.append(len(alive))
        return transform(image)

    monkeypatch.setattr(model, "_of_pixels", watch)
    monkeypatch.setattr(model.backbone, "transform", track)
    list(model.stream([png(i) for i in range(8)], batch_size=8))
    assert seen == [(8, 3, 32, 32)]
    assert len(most) == 8
    assert max(most) <= 2


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.slow
def test_four_small_files_of_many_million_pixels_take_the_memory_of_one(artifact, tmp_path):
    import subprocess

    side = 6000  # 108 MB of pixels each
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    parts = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    peaks = []
    for number in (1, 4):
        code = (
            "import sys; from adaptclip.artifact import load; m = load(sys.argv[1]); "
            "r = list(m.stream(sys.argv[2:], batch_size=64)); assert all(hasattr(x, 'label') for x in r), r; "
            "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
        )
        for i in range(number):
            (tmp_path / f"{i}.png").write_bytes(content)
        files = [str(tmp_path / f"{i}.png") for i in range(number)]
        done = subprocess.run(
            [sys.executable, "-c", code, str(artifact), *files], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 150, peaks
