# SPDX-License-Identifier: Apache-2.0
"""A card may hold features that were computed elsewhere: read as they are, refused where they do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import adaptclip as ac
from adaptclip.data.card import parse_card
from adaptclip.errors import AdaptclipError, BackboneError, CardError, ConfigError, DataError

NAMES = ["rose", "lily", "blue whale"]


def world(seed: int = 0, *, num: int = 60, width: int = 8, views: int = 0) -> dict[str, np.ndarray]:
    """Image features around their class's text features, of norms other than 1."""
    draws = np.random.default_rng(seed)
    text = draws.normal(size=(3, width))
    label = np.arange(num) % 3
    shape = (views, num, width) if views else (num, width)
    image = text[label] + 0.3 * draws.normal(size=shape)
    return {"image": (3 * image).astype(np.float32), "label": label.astype(np.int64), "text": text.astype(np.float32)}


def write(folder, arrays, *, file="x.safetensors", table=None, block=None, **source):
    """A card of features beside its file, loaded."""
    path = folder / file
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, arrays["image"])
        np.save(folder / "text.npy", arrays["text"])
        source = {"text": "text.npy", **source}
    if table is not None:
        (folder / "rows.csv").write_text(table)
        source = {"table": "rows.csv", **source}
    whole = {
        "source": {"kind": "features", "file": file, **source}, "class_names": NAMES,
        "splits": {"fractions": {"train": 0.5, "validation": 0.2, "test": 0.3}}, **(block or {}),
    }  # fmt: skip
    text = f"---\nadaptclip: {json.dumps(whole)}\n---\n"
    return parse_card(text, name="flora", path=folder / "flora.md")


def unit(values):
    values = values.astype(np.float64)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("file", ["x.safetensors", "x.npz", "x.npy"])
def test_every_kind_of_file_gives_the_same_features(file, tmp_path):
    arrays = world()
    table = "label\n" + "\n".join(NAMES[c] for c in arrays["label"]) + "\n" if file.endswith("npy") else None
    data = ac.open_data(write(tmp_path, arrays, file=file, table=table))
    assert data.class_names == tuple(NAMES)
    assert sum(map(len, data.parts.values())) == 60
    clip = ac.clip_of(data)
    np.testing.assert_allclose(clip.text_features.numpy(), unit(arrays["text"]), atol=1e-6)
    for part in data.parts.values():
        features = ac.FeatureCache(None).get(clip, part)
        np.testing.assert_allclose(features.values[0].numpy(), unit(arrays["image"][part.rows]), atol=1e-6)
        assert features.labels.tolist() == arrays["label"][part.rows].tolist()


def test_zero_shot_is_the_cosine_with_the_text_features_times_the_scale(tmp_path):
    arrays = world()
    data = ac.open_data(write(tmp_path, arrays, logit_scale=7.0))
    clip = ac.clip_of(data)
    features = ac.FeatureCache(None).get(clip, data.test)
    predictions = ac.predict(ac.ZeroShotClassifier(clip, data.prompt_names), features, data.test)
    logits = 7.0 * unit(arrays["image"][data.test.rows]) @ unit(arrays["text"]).T
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(predictions.probs, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_prompts_are_averaged_after_they_have_unit_norm():
    text = np.stack([[[1.0, 0.0], [0.0, 100.0]], [[-2.0, 0.0], [-1.0, 0.0]]])
    clip = ac.FeatureClip(text)
    np.testing.assert_allclose(clip.text_features.numpy(), [[0.5**0.5, 0.5**0.5], [-1.0, 0.0]], atol=1e-6)
    assert clip.class_names == ("class 0", "class 1")


def test_columns_come_from_the_file_and_from_the_table(tmp_path):
    arrays = {**world(), "site": np.arange(60) % 4}
    table = "camera;patient\n" + "\n".join(f"{'old' if i % 5 else 'new'};p{i % 20}" for i in range(60))
    block = {"columns": {"groups": {"camera": "camera", "site": "site"}, "cluster": "patient"}}
    data = ac.open_data(write(tmp_path, arrays, table=table, block=block), check=False)
    assert {len(set(part.groups["camera"])) for part in data.parts.values()} == {2}
    parts = [set(part.clusters or ()) for part in data.parts.values()]
    assert not (parts[0] & parts[2])
    for part in data.parts.values():
        assert part.groups["site"] == tuple(str(row % 4) for row in part.rows)


def test_a_column_that_straddles_the_parts_must_be_answered(tmp_path):
    arrays = {**world(), "patient_number": np.arange(60) // 3}
    with pytest.raises(AdaptclipError, match="patient_number"):
        ac.open_data(write(tmp_path, arrays))


def test_equal_features_in_two_parts_are_the_same_image(tmp_path):
    arrays = world()
    arrays["image"][1::3] = arrays["image"][1]
    split = np.where(np.arange(60) < 30, "train", "test")
    block = {"splits": {"column": "part", "train": "train", "test": "test"}}
    table = "part\n" + "\n".join(split)
    with pytest.raises(AdaptclipError, match="the same file as a train image"):
        ac.open_data(write(tmp_path, arrays, table=table, block=block))


@pytest.mark.parametrize("change", [lambda x: x.astype(np.float16).astype(np.float32), lambda x: x * (1 + 1e-6)])
def test_near_copies_in_two_parts_are_found_and_kept_together(change, tmp_path):
    arrays = world(width=64)
    for key in ("image", "label"):
        arrays[key][30:40] = change(arrays[key][:10]) if key == "image" else arrays[key][:10]
    split = np.where(np.arange(60) < 30, "train", "test")
    block = {"splits": {"column": "part", "train": "train", "test": "test"}}
    with pytest.raises(AdaptclipError, match="10 of 30 test images look the same as a train image"):
        ac.open_data(write(tmp_path, arrays, table="part\n" + "\n".join(split), block=block))
    data = ac.open_data(write(tmp_path, arrays))
    parts = [set(part.rows.tolist()) for part in data.parts.values()]
    assert all(any({row, row + 30} <= part for part in parts) for row in range(10))


def test_the_first_view_is_judged_and_the_others_are_learnt_from(tmp_path):
    arrays = world(views=4)
    data = ac.open_data(write(tmp_path, arrays))
    clip, cache = ac.clip_of(data), ac.FeatureCache(None)
    rows = data.train.rows
    np.testing.assert_allclose(cache.get(clip, data.train).values.numpy(), unit(arrays["image"][:1, rows]), atol=1e-6)
    crops = cache.get(clip, data.train, views=2).values.numpy()
    np.testing.assert_allclose(crops, unit(arrays["image"][1:3, rows]), atol=1e-6)
    assert len(cache.get(clip, data.train, views=20).values) == 3


def test_an_alias_names_the_row_of_its_class(tmp_path):
    arrays = world()
    data = ac.open_data(write(tmp_path, arrays, block={"aliases": {"lily": "white lily"}}))
    clip = ac.clip_of(data)
    assert data.prompt_names == clip.class_names == ("rose", "white lily", "blue whale")


def test_other_models_and_pixels_are_refused_by_name(tmp_path, tiny, tiny_backbone):
    data = ac.open_data(write(tmp_path, world()))
    clip = ac.clip_of(data, "features")
    with pytest.raises(BackboneError, match="leave --backbone"):
        ac.clip_of(data, tiny)
    with pytest.raises(ConfigError, match="another model made"):
        ac.FeatureCache(None).get(tiny_backbone, data.test)
    with pytest.raises(DataError, match="no images"):
        data.test.image(0)
    for method in (ac.CoOp, ac.LoRA, ac.CoCoOp, ac.TwoStage):
        with pytest.raises(BackboneError, match=r"text tower|towers"):
            method(clip, data.prompt_names)
    with pytest.raises(DataError, match='Did you mean "rose"'):
        ac.GDA(clip, ["rosa"])


def test_images_are_not_read_by_features(digits_data):
    with pytest.raises(BackboneError, match="holds images"):
        ac.clip_of(digits_data, "features")
    with pytest.raises(ConfigError, match="holds images"):
        ac.FeatureCache(None).get(ac.FeatureClip(np.eye(10)), digits_data.test)


@pytest.fixture(scope="module")
def digits_data():
    return ac.open_data(ac.load_card("digits"))


def broken(name, value=None, **more):
    arrays = {**world(), **({} if value is None else {name: value}), **more}
    if value is None:
        del arrays[name]
    return arrays


@pytest.mark.parametrize(
    ("arrays", "block", "message"),
    [
        (broken("text"), {}, "no array 'text'"),
        (broken("image", np.zeros((60, 8), np.float32)), {}, "no direction"),
        (broken("image", np.full((60, 8), np.nan, np.float32)), {}, "no direction"),
        (broken("image", np.ones(60, np.float32)), {}, r"\(N, D\) or \(V, N, D\)"),
        (broken("image", np.ones((60, 8), np.int64)), {}, "floats"),
        (broken("text", np.ones((3, 9), np.float32)), {}, "8 wide and text features 9"),
        (broken("text", np.ones((4, 8), np.float32)), {}, "3 class names.*4 classes"),
        (broken("label", np.arange(60)), {}, "label"),
        (broken("label"), {}, "no column 'label'"),
        (world(), {"class_names": None}, "class_names"),
    ],
)
def test_what_does_not_fit_says_so(arrays, block, message, tmp_path):
    with pytest.raises((DataError, CardError), match=message):
        ac.open_data(write(tmp_path, arrays, block=block))


@pytest.mark.parametrize("file", ["x.safetensors", "x.npz", "x.npy"])
def test_a_damaged_file_is_an_error_and_pickles_are_not_read(file, tmp_path):
    card = write(tmp_path, world(), file=file, table="label\n" + "rose\n" * 60)
    whole = (tmp_path / file).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no array"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DataError, match="cannot read the features"):
            ac.open_data(card)
    if file != "x.safetensors":
        save = np.savez if file == "x.npz" else np.save
        save(tmp_path / file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match="features"):
            ac.open_data(card)


def test_a_header_that_asks_for_too_much_is_an_error(tmp_path):
    card = write(tmp_path, world(), file="x.npy", table="label\n" + "rose\n" * 60)
    content = (tmp_path / "x.npy").read_bytes()
    assert content.count(b"(60, 8), }" + 10 * b" ") == 1
    (tmp_path / "x.npy").write_bytes(content.replace(b"(60, 8), }" + 10 * b" ", b"(60" + 10 * b"0" + b", 8), }"))
    with pytest.raises(DataError, match="cannot read the features"):
        ac.open_data(card)


def test_a_table_of_another_length_is_refused(tmp_path):
    with pytest.raises(DataError, match="59 rows and there are features of 60"):
        ac.open_data(write(tmp_path, world(), table="label\n" + "rose\n" * 59))


@pytest.mark.parametrize(
    ("text", "names", "scale", "message"),
    [
        (np.ones(3), None, 100.0, r"should be \(C, D\) or \(C, P, D\)"),
        ([["a"]], None, 100.0, "numbers"),
        (np.zeros((2, 3)), None, 100.0, "all zero"),
        (np.full((2, 3), np.inf), None, 100.0, "not finite"),
        (np.eye(3), ["a", "b"], 100.0, "3 classes, and 2 class names"),
        (np.eye(3), ["a", "b", "a"], 100.0, "2 of them different"),
        (np.eye(3), None, 0.0, "above 0"),
        (np.eye(3), None, "100", "above 0"),
        (np.eye(3), "abc", 100.0, "in the order"),
        (np.eye(3), {"a", "b", "c"}, 100.0, "in the order"),
    ],
)
def test_a_feature_clip_checks_what_it_is_given(text, names, scale, message):
    with pytest.raises(DataError, match=message):
        ac.FeatureClip(text, names, logit_scale=scale)


def test_real_clip_features_come_with_the_package():
    data = ac.open_data(ac.load_card("aerial_features"))
    assert (len(data.class_names), sum(map(len, data.parts.values()))) == (19, 1005)
    clip, cache = ac.clip_of(data), ac.FeatureCache(None)
    zero_shot = ac.ZeroShotClassifier(clip, data.prompt_names)
    hits = 0
    for part in data.parts.values():
        predictions = ac.predict(zero_shot, cache.get(clip, part), part)
        hits += int((predictions.pred == predictions.labels).sum())
    # The table of the source says 81.29 %.
    assert round(100 * hits / 1005, 2) == 81.29


def test_an_artifact_of_features_loads_and_predicts_by_itself(tmp_path):
    from adaptclip.reports.full import build_report

    data = ac.open_data(write(tmp_path, world(), logit_scale=20.0))
    clip = ac.clip_of(data)
    gda = ac.GDA(clip, data.prompt_names)
    gda.fit_features(ac.FeatureCache(None).get(clip, data.train))
    test = ac.FeatureCache(None).get(clip, data.test)
    predictions = ac.predict(gda, test, data.test)
    out = tmp_path / "artifact"
    ac.save_artifact(out, gda, clip, data, None, method="gda", report=build_report(predictions), verdicts=[])
    loaded = ac.load(out)
    np.testing.assert_allclose(
        loaded.probabilities_of_features(5 * test.values[0]).numpy(), predictions.probs, atol=1e-5
    )
    with pytest.raises(BackboneError, match="image tower"):
        loaded.probabilities([__import__("PIL.Image").Image.new("RGB", (8, 8))])
    with pytest.raises(DataError, match=r"\(N, D\)"):
        loaded.probabilities_of_features(torch.ones(8))
    (out / "text_features.safetensors").write_bytes(b"")
    with pytest.raises(AdaptclipError, match="text_features"):
        ac.load(out)
