# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from adaptclip.data.captions import CaptionLoader, CaptionTokens, caption_values
from adaptclip.data.card import parse_card
from adaptclip.data.shots import sample_few_shot
from adaptclip.data.sources import open_data
from adaptclip.errors import CardError, DataError, SplitError
from adaptclip.types import Batch

SPLITS = ["train"] * 6 + ["validation"] * 2 + ["test"] * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))


def photo(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def words(images):
    """Captions of images that have some."""
    assert images.captions is not None
    return images.captions


def card_of(block: str):
    return parse_card(f"---\nadaptclip:\n{block}---\n", name="mine")


def write_parquet(folder, captions, **columns):
    rows = {"image": [{"bytes": photo(i), "path": f"{i}.png"} for i in range(12)], "split": SPLITS, "words": captions}
    pq.write_table(pa.table(rows | columns), folder / "rows.parquet")


PARQUET = "  source: {kind: parquet, files: rows.parquet}\n  splits: {column: split, train: train, test: test%s}\n"
CAPTIONS_ONLY = PARQUET % ", validation: validation" + "  columns: {captions: words}\n"
SEVERAL = [[f"image  {i}", f" a thing, number {i} "] for i in range(12)]


def test_captions_without_classes(tmp_path):
    write_parquet(tmp_path, SEVERAL)
    data = open_data(card_of(CAPTIONS_ONLY), data_root=tmp_path)
    assert [len(part) for part in data.parts.values()] == [6, 2, 4]
    assert words(data.train) == tuple((f"image {i}", f"a thing, number {i}") for i in range(6))
    assert words(data.test) == tuple((f"image {i}", f"a thing, number {i}") for i in range(8, 12))
    assert data.class_names == ("image",)
    assert not data.has_classes
    with pytest.raises(DataError, match="card mine has captions and no classes"):
        _ = data.prompt_names
    assert words(data.test.select([2, 0])) == (words(data.test)[2], words(data.test)[0])
    train, validation = sample_few_shot(data, shots=0, seed=1).select(data)
    assert dict(zip(train.ids, words(train), strict=True)) == dict(zip(data.train.ids, words(data.train), strict=True))
    assert len(validation) == 2


def test_captions_beside_classes(tmp_path):
    write_parquet(tmp_path, [f"words {i}" for i in range(12)], label=["cat", "dog"] * 6)
    block = PARQUET % ", validation: validation" + "  columns: {captions: words, label: label}\n"
    data = open_data(card_of(block), data_root=tmp_path)
    assert data.has_classes
    assert data.prompt_names == ("cat", "dog")
    assert words(data.train) == tuple((f"words {i}",) for i in range(6))
    without = open_data(card_of(PARQUET % ", validation: validation"), data_root=tmp_path)
    assert without.train.captions is None
    assert without.train.digest != data.train.digest, "captions are part of what was trained on"


def test_one_row_per_caption_is_joined_by_picture(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(photo(i))
    parts = ["train", "train", "test", "test"]
    rows = [(f"{i}.png", f"caption {k} of {i}", parts[i]) for i in range(4) for k in range(3)]
    text = "\n".join(",".join(row) for row in [("image", "caption", "split"), *rows, rows[0]])
    (tmp_path / "table.csv").write_text(text + "\n")
    block = "  source: {kind: manifest, files: table.csv}\n  splits: {column: split}\n  columns: {captions: caption}\n"
    data = open_data(card_of(block), data_root=tmp_path)
    assert words(data.train) == tuple(tuple(f"caption {k} of {i}" for k in range(3)) for i in range(2))
    assert len(data.test) == 2
    assert "13 rows show 4 images" in " ".join(data.skipped)
    (tmp_path / "table.csv").write_text(text + "\n0.png,leaks,test\n")
    with pytest.raises(SplitError, match="duplicate_images"):
        open_data(card_of(block), data_root=tmp_path)


def test_jsonl_with_lists(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(photo(i))
    rows = [{"image": f"{i}.png", "split": ["train", "test"][i], "caption": ["a", "", "b"]} for i in range(2)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    block = "  source: {kind: manifest, files: table.jsonl}\n  splits: {column: split}\n"
    data = open_data(card_of(block + "  columns: {captions: caption}\n"), data_root=tmp_path)
    assert words(data.train) == (("a", "b"),)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, r"1 of 12 images have no caption: row 3 \(3.png\)\. Write one"),
        ([], r"no caption: row 3"),
        ([" ", None], r"no caption: row 3"),
    ],
)
def test_a_row_without_caption_is_named(tmp_path, cell, message):
    write_parquet(tmp_path, [*SEVERAL[:3], cell, *SEVERAL[4:]])
    with pytest.raises(DataError, match=message):
        open_data(card_of(CAPTIONS_ONLY), data_root=tmp_path)


def test_cells_that_are_no_text():
    with pytest.raises(DataError, match=r"row 1: a caption should be text, .* got 7 \(int\)"):
        caption_values(["a", 7], where=lambda row: f"row {row}")
    with pytest.raises(DataError, match="no caption: row 1"):
        caption_values(["a", float("nan")], where=lambda row: f"row {row}")
    assert caption_values(["Größe"], where=str) == (("Größe",),)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("  columns: {label: null}\n", "needs a label column, or a captions column"),
        ("  columns: {captions: words, levels: {a: b}}\n", "levels are coarse names of classes"),
        ("  columns: {captions: words}\n  class_names: [a, b]\n", "class_names is about classes"),
        ("  columns: {captions: words}\n  gates: [{at_least: 0.5}]\n", "gates is about classes"),
        ("  columns: {caption: words}\n", 'Did you mean "captions"'),
        ("  splits: {train: a, validation: b}\n", "needs both train and test"),
        ("  splits: {test: a, validation: b}\n", "needs both train and test"),
    ],
)
def test_mistakes_in_a_card(block, message):
    with pytest.raises(CardError, match=message):
        card_of("  source: {kind: parquet, files: rows.parquet}\n" + block)


def test_a_card_for_evaluation_alone(tmp_path):
    write_parquet(tmp_path, SEVERAL, label=["cat", "dog"] * 6)
    card = card_of("  source: {kind: parquet, files: {all: rows.parquet}}\n  splits: {test: all}\n")
    data = open_data(card, data_root=tmp_path)
    assert [len(part) for part in data.parts.values()] == [0, 0, 12]
    with pytest.raises(SplitError, match="no training images"):
        sample_few_shot(data, shots=1, seed=0)
    card = card_of("  source: {kind: parquet, files: {all: rows.parquet}}\n  splits: {test: other}\n")
    with pytest.raises(SplitError, match="no image is in the split 'other'"):
        open_data(card, data_root=tmp_path)


# Which caption an image shows


def tokens_of(counts) -> CaptionTokens:
    count = torch.tensor(counts)
    return CaptionTokens(torch.arange(int(count.sum()))[:, None], count.cumsum(0) - count, count)


def test_each_image_shows_one_of_its_own_captions():
    captions = tokens_of([1, 3, 5, 2])
    assert captions.owner.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    index = torch.tensor([3, 1, 0, 2])
    shown = torch.stack([captions.rows(index, seed=4, epoch=e) for e in range(2000)])
    assert (captions.owner[shown] == index).all()
    for column, image in enumerate(index.tolist()):
        share = torch.bincount(shown[:, column] - captions.first[image]) / 2000
        expected = 1 / int(captions.count[image])
        assert share == pytest.approx([expected] * int(captions.count[image]), abs=5 * (expected / 2000) ** 0.5)


def test_the_choice_depends_on_seed_epoch_and_image_alone():
    captions = tokens_of([50] * 40)
    whole = captions.rows(torch.arange(40), seed=1, epoch=2)
    some = torch.tensor([39, 0, 7])
    assert torch.equal(captions.rows(some, seed=1, epoch=2), whole[some])
    assert not torch.equal(captions.rows(torch.arange(40), seed=2, epoch=2), whole)
    assert not torch.equal(captions.rows(torch.arange(40), seed=1, epoch=3), whole)


class Images:
    """Two steps per epoch of three images each, in two micro-steps."""

    steps_per_epoch = 2

    def batch(self, micro_step):
        index = torch.arange(3) + 3 * (micro_step % 4)
        return Batch(labels=torch.zeros(3, dtype=torch.long), index=index, features=index[:, None].float())


def test_the_loader_puts_tokens_beside_images():
    captions = tokens_of([9] * 12)
    loader = CaptionLoader(Images(), captions, seed=3, accumulate=2)
    assert loader.steps_per_epoch == 2
    for micro_step in (9, 2, 0, 9):
        batch = loader.batch(micro_step)
        assert batch.features is not None
        assert batch.tokens is not None
        index, epoch = torch.arange(3) + 3 * (micro_step % 4), micro_step // 4
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.features, index[:, None].float())
        assert torch.equal(batch.tokens, captions.tokens[captions.rows(index, seed=3, epoch=epoch)])
