# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from adaptclip.data.dataset import FileStore, ImageDataset, MemoryStore, inside
from adaptclip.data.fingerprints import content_digest
from adaptclip.errors import DataError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset() -> ImageDataset:
    images = [png(v) for v in (10, 20, 30, 40)]
    return ImageDataset(
        store=MemoryStore(images, "abcd"),
        rows=np.arange(4),
        class_names=("x", "y"),
        ids=tuple("abcd"),
        labels=np.array([0, 1, 1, 1]),
        contents=tuple(content_digest(image) for image in images),
        clusters=("p", "p", "q", "r"),
        groups={"sex": ("f", "m", "f", "unknown")},
        levels={"family": ("one", "two")},
    )


def test_images_are_decoded_when_asked_for(dataset):
    assert len(dataset) == 4
    assert dataset.image(2).getpixel((0, 0)) == (30, 0, 0)
    assert dataset.class_counts().tolist() == [1, 3]


def test_a_selection_keeps_rows_together(dataset):
    part = dataset.select([3, 1])
    assert (part.ids, part.labels.tolist(), part.clusters) == (("d", "b"), [1, 1], ("r", "p"))
    assert part.groups == {"sex": ("unknown", "m")}
    assert part.levels == dataset.levels
    assert part.image(0).getpixel((0, 0)) == (40, 0, 0)
    assert part.select([1]).where(0) == "image b"
    assert len(dataset.select([])) == 0
    assert dataset.select([]).class_counts().tolist() == [0, 0]


def test_the_digest_follows_everything_that_matters(dataset):
    changed = [
        replace(dataset, ids=("a", "b", "c", "e")),
        replace(dataset, labels=np.array([0, 1, 1, 0])),
        replace(dataset, contents=(*dataset.contents[:3], "0" * 64)),
        replace(dataset, clusters=None),
        replace(dataset, groups={}),
        replace(dataset, levels={}),
        replace(dataset, class_names=("x", "z")),
        replace(dataset, window=(0.0, 1.0)),
        dataset.select([0, 1, 2]),
        dataset.select([1, 0, 2, 3]),
    ]
    assert len({dataset.digest, *(other.digest for other in changed)}) == len(changed) + 1
    assert dataset.select([0, 1, 2, 3]).digest == dataset.digest


def test_it_can_be_sent_to_a_loader_process(dataset):
    assert pickle.loads(pickle.dumps(dataset)).digest == dataset.digest


def test_a_missing_file_is_named(tmp_path, dataset):
    broken = replace(dataset, store=FileStore([tmp_path / f"{i}.png" for i in range(4)]))
    with pytest.raises(DataError, match=r"2\.png: cannot read .*2\.png: No such file"):
        broken.image(2)


def test_paths_do_not_leave_their_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert inside(folder, "a/../b.png") == folder / "b.png"
    for name in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png", "link.png"):
        with pytest.raises(DataError, match=r"leaves .* only name files below its own folder"):
            inside(folder, name)
