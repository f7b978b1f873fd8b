# SPDX-License-Identifier: Apache-2.0
"""An artifact loads as it was saved, or says why not."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_artifacts import changed, leaves, make_early
from made_artifacts import edit_manifest as edit
from PIL import Image
from tiny_clip import write_tiny_checkpoint

import adaptclip
from adaptclip.artifact import load, save_artifact
from adaptclip.clip import load_backbone
from adaptclip.data.card import load_card
from adaptclip.data.shots import sample_few_shot
from adaptclip.data.sources import open_data
from adaptclip.errors import AdaptclipError, ArtifactError, BackboneError, ConfigError, DataError, StorageError
from adaptclip.files import write_json
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.methods import CoOp, ZeroShotClassifier
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.seals import SEAL, describe_files, write_sealed


@pytest.fixture(scope="module")
def digits():
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, digits, checkpoint):
    """Saves an artifact whose gate has the given limit on accuracy; returns folder and adapter."""

    def save(folder: Path, at_least: float = 0.01, method: str = "coop", image_size: int = 0):
        backbone = load_backbone(f"local-dir:{checkpoint}", image_size=image_size)
        names = digits.prompt_names
        adapter = CoOp(backbone, names, n_ctx=4, seed=3) if method == "coop" else ZeroShotClassifier(backbone, names)
        probs = np.full((200, 10), 0.1, np.float32)
        labels = np.arange(200) % 10
        predictions = Predictions(tuple(map(str, range(200))), labels, probs, digits.class_names)
        verdicts = check_gates(predictions, None, [GateRule(metric="accuracy", at_least=at_least)])
        split = sample_few_shot(digits, shots=1, seed=1) if method == "coop" else None
        save_artifact(
            folder, adapter, backbone, digits, split, method=method, report=build_report(predictions), verdicts=verdicts
        )
        return adapter

    return save


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    saved(tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.mark.parametrize("method", ["coop", "zero_shot"])
def test_reloaded_equals_live(saved, tmp_path, digits, method):
    live = saved(tmp_path / "a", method=method).eval()
    model = load(tmp_path / "a")
    assert torch.equal(model.adapter.class_weights(), live.class_weights())
    assert model.class_names == digits.class_names
    pictures = [digits.test.image(i) for i in range(5)]
    assert [p.label for p in model.predict(pictures, batch_size=2)] == [p.label for p in model.predict(pictures)]
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".json", ".safetensors", ".md"}


def test_a_picture_size_that_was_asked_for_is_asked_for_again(saved, tmp_path):
    with pytest.warns(UserWarning, match="resized from 4 x 4 to 8 x 8"):
        saved(tmp_path / "a", image_size=64)
    with pytest.warns(UserWarning, match="resized from 4 x 4 to 8 x 8"):
        assert load(tmp_path / "a").backbone.image_size == 64
    saved(tmp_path / "b")
    assert "image_size" not in json.loads((tmp_path / "b" / "manifest.json").read_text())["backbone"]


def test_paths_bytes_and_pictures_give_the_same(folder, tmp_path, digits):
    model = load(folder)
    picture = digits.test.image(0)
    picture.save(tmp_path / "p.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    answers = model.predict([tmp_path / "p.png", str(tmp_path / "p.png"), buffer.getvalue(), picture])
    assert len({tuple(a.probabilities.items()) for a in answers}) == 1
    assert answers[2].source == "2"
    assert list(answers[0].probabilities.values()) == sorted(answers[0].probabilities.values(), reverse=True)
    with pytest.raises(DataError, match="images is empty"):
        model.predict([])


def test_predict_proba_is_the_array_that_predict_gives_by_name(folder, tmp_path, digits):
    model = load(folder)
    pictures = [digits.test.image(i) for i in range(4)]
    pictures[0].save(tmp_path / "p.png")
    given = [str(tmp_path / "p.png"), *pictures[1:]]
    found = model.predict_proba(given)
    assert (found.shape, found.dtype, model.classes_.tolist()) == ((4, 10), np.float32, list(digits.class_names))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    answers = model.predict(given)
    for row, answer in zip(found, answers, strict=True):
        np.testing.assert_allclose(row, [answer.probabilities[name] for name in model.class_names], atol=1e-6)
    assert [model.classes_[i] for i in found.argmax(axis=1)] == [answer.label for answer in answers]
    np.testing.assert_allclose(model.predict_proba(tmp_path / "p.png"), found[:1], atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(np.asarray(pictures[0])), found[:1], atol=1e-6)
    features = model.backbone.encode_image(torch.stack([model.backbone.transform(p) for p in pictures]))
    np.testing.assert_allclose(model.predict_proba(features), found, atol=1e-5)
    part = digits.test.select(range(4))
    assert [answer.source for answer in model.predict(part)] == list(part.ids)
    np.testing.assert_allclose(model.predict_proba(part), found, atol=1e-6)
    assert repr(model).startswith("<AdaptedModel: coop on <")
    assert len(repr(model)) < 400
    assert "probabilities" not in repr(answers[0])
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        model.predict(pictures, batch_size=0)
    with pytest.raises(BackboneError, match="no device 'gpu'; devices are called cpu, cuda"):
        load(folder, device="gpu")


def test_a_picture_with_alpha_or_rotation_is_decoded_as_a_file_would_be(folder, tmp_path, digits):
    model = load(folder)
    rotated = Image.effect_noise((40, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "r.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "r.jpg") as opened:
        from_memory, from_file = model.predict([opened, tmp_path / "r.jpg"])
    assert from_memory.probabilities == pytest.approx(from_file.probabilities, abs=1e-6)


def test_an_unreadable_image_is_named(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.png"):
        load(folder).predict([tmp_path / "broken.png"])


def test_a_failed_gate_is_not_loaded_unasked(saved, tmp_path):
    saved(tmp_path / "a", at_least=0.9)
    with pytest.raises(ArtifactError, match=r"failed 1 of 1 gates(.|\n)*allow_failed_gates"):
        load(tmp_path / "a")
    assert load(tmp_path / "a", allow_failed_gates=True).class_names


def test_an_inconclusive_gate_is_not_silent(saved, tmp_path):
    saved(tmp_path / "a", at_least=0.1)
    with pytest.warns(UserWarning, match=r"1 of 1 gates is inconclusive, which is not a pass; its README\.md") as said:
        load(tmp_path / "a")
    assert len(said) == 1
    assert "- **inconclusive**" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.safetensors").write_bytes(b"x"), "adapter.safetensors is missing or changed"),
        (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors is missing or changed"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: edit(f, format_version=99), "Install a newer adaptclip"),
        (lambda f: edit(f, method="coöp"), 'Did you mean "coop"'),
        (lambda f: edit(f, format_version="1"), "format_version should be int, got str"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "should be an object, got list"),
        (lambda f: edit(f, class_names=[1] * 10), "equally many texts"),
        (lambda f: edit(f, class_names=["a"]), "equally many texts"),
        (lambda f: edit(f, backbone={"name": 3}), "a name and a digest"),
        (lambda f: edit(f, verdicts=["pass"]), "a verdict should have"),
        (lambda f: edit(f, settings={"templates": 3}), "templates of the settings should be texts"),
        (lambda f: edit(f, settings={"n_cxt": 4}), "coop cannot have its settings"),
        (lambda f: edit(f, window=[1, "2"]), "window should be two numbers"),
        (lambda f: edit(f, card={"name": None}), "card should have a name"),
        (lambda f: edit(f, format_version=0), "counted from 1"),
        (lambda f: shutil.rmtree(f), "not an artifact"),
    ],
)
def test_damage_is_said(folder, damage, message):
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_a_manifest_without_a_key(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["settings"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="lacks settings"):
        load(folder)


def test_other_weights_and_other_transforms_are_refused(folder, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="other weights"):
        load(folder, backbone=f"local-dir:{other}")
    edit(folder, transform={"size": 224})
    with pytest.raises(ArtifactError, match="transform"):
        load(folder)


def test_a_moved_backbone_is_found_again(folder, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    edit(folder, backbone={**json.loads((folder / "manifest.json").read_text())["backbone"], "name": "local-dir:gone"})
    with pytest.raises(AdaptclipError, match="gone"):
        load(folder)
    assert load(folder, backbone=f"local-dir:{moved}").class_names


def test_nothing_is_overwritten_or_half_written(saved, folder, digits, monkeypatch):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        saved(folder)

    def full(*args, **kwargs):
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr("adaptclip.artifact.write_json", full)
    with pytest.raises(StorageError, match="No space"):
        saved(folder.parent / "second")
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["artifact"]


def test_the_model_card_is_a_model_card(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "adaptclip"
    assert "## Results on the test split" in card.text
    assert card.text.count("\n# ") == 1


def test_strange_names_are_escaped(digits, saved, tmp_path, monkeypatch):
    strange = replace(digits, class_names=("a|b <script>", *digits.class_names[1:]))
    backbone = load_backbone()  # the starter knows any name
    adapter = ZeroShotClassifier(backbone, digits.prompt_names)
    probs = np.full((20, 10), 0.1, np.float32)
    predictions = Predictions(tuple(map(str, range(20))), np.arange(20) % 10, probs, strange.class_names)
    save_artifact(
        tmp_path / "a", adapter, backbone, strange, None, method="zero_shot", report=build_report(predictions),
        verdicts=[],
    )  # fmt: skip
    text = (tmp_path / "a" / "README.md").read_text()
    assert "<script>" not in text
    assert adaptclip.load(tmp_path / "a").class_names[0] == "a|b <script>"


def test_a_manifest_without_the_digest_of_its_prompts_is_loaded_with_a_warning(saved, tmp_path):
    saved(tmp_path / "early")
    make_early(tmp_path / "early")
    with pytest.warns(UserWarning, match="no prompts_digest.*cannot be checked"):
        assert load(tmp_path / "early").class_names


def test_templates_other_than_those_of_training_are_refused(saved, tmp_path):
    saved(tmp_path / "zero_shot", method="zero_shot")
    assert load(tmp_path / "zero_shot", templates=("a photo of a {}.",)).class_names
    with pytest.raises(ArtifactError, match="leave templates out, or train with these"):
        load(tmp_path / "zero_shot", templates=("a {}.",))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/adapter.safetensors", "..", ".", "", "a\\b"])
def test_a_manifest_names_no_file_outside_its_folder(folder, name):
    (folder / "sub").mkdir()
    for place in (folder / "sub" / "adapter.safetensors", folder.parent / "outside"):
        shutil.copy(folder / "adapter.safetensors", place)
    edit(folder, files={name: describe_files(folder, ["adapter.safetensors"])["adapter.safetensors"]})
    with pytest.raises(ArtifactError, match="which is not one in this folder"):
        load(folder)


def test_a_link_does_not_leave_the_folder_but_for_the_cache_of_the_hub(folder, tmp_path):
    outside = tmp_path / "outside"
    (folder / "adapter.safetensors").rename(outside)
    (folder / "adapter.safetensors").symlink_to(outside)
    with pytest.raises(ArtifactError, match="a link that leaves the folder"):
        load(folder)
    # The hub's library downloads files as links of this kind.
    repository = tmp_path / "models--me--model"
    (repository / "blobs").mkdir(parents=True)
    outside.rename(repository / "blobs" / "abc")
    snapshot = repository / "snapshots" / "1234" / "artifact"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "adapter.safetensors").unlink()
    (snapshot / "adapter.safetensors").symlink_to("../../../blobs/abc")
    assert load(snapshot.parent).class_names


def test_a_pickle_in_the_place_of_weights_is_not_run(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was run",))

    content = pickle.dumps(Hostile())
    for name in ("adapter.safetensors", "adapter_model.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(content)
    edit(folder, new_files=True)
    with pytest.raises(ArtifactError, match="is not safetensors"):
        load(folder)
    pickle.loads(content)  # the file is what it is said to be
    assert (tmp_path / "was run").exists()
    (tmp_path / "was run").unlink()
    with pytest.raises(ArtifactError):
        load(folder)
    assert not (tmp_path / "was run").exists()


def test_sizes_are_bounded_by_what_is_there(folder, monkeypatch):
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    edit(folder, settings={**settings, "n_ctx": 10**10})
    with pytest.raises(ArtifactError, match=r"n_ctx is 10,000,000,000, but no tensor in it is larger than 64"):
        load(folder)
    edit(folder, settings={**settings, "seed": 10**10})
    assert load(folder).class_names
    monkeypatch.setattr("adaptclip.artifact.checks.MOST_FILE_BYTES", 100)
    with pytest.raises(ArtifactError, match="more than 100"):
        load(folder)
    monkeypatch.setattr("adaptclip.artifact.checks.MOST_MANIFEST_BYTES", 100)
    with pytest.raises(ArtifactError, match=r"manifest\.json has .* bytes, more than 100, and is not read"):
        load(folder)


def test_every_field_of_the_manifest_is_under_its_digest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    places = [path for path, _ in leaves(manifest)]
    assert len(places) > 80
    assert {path[0] for path in places} == set(manifest)
    for path in places:
        other = changed(manifest, path)
        assert other != manifest
        write_json(folder / "manifest.json", other)
        with pytest.raises(ArtifactError):
            adaptclip.artifact._read_manifest(folder)
    for key in manifest:
        write_json(folder / "manifest.json", {name: value for name, value in manifest.items() if name != key})
        with pytest.raises(ArtifactError):
            adaptclip.artifact._read_manifest(folder)
    # The cases that gave other answers: one letter of a label, the labels the other way round, verdicts.
    for name, value in (
        ("class_names", ["zerq", *manifest["class_names"][1:]]),
        ("class_names", manifest["class_names"][::-1]),
        ("verdicts", []),
    ):
        write_json(folder / "manifest.json", {**manifest, name: value})
        with pytest.raises(ArtifactError, match="was changed after it was written"):
            load(folder)
    write_json(folder / "manifest.json", dict(reversed(manifest.items())))
    assert load(folder).class_names  # the order of its keys says nothing


def test_bytes_of_an_artifact_that_changed_are_seen(folder):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw, seen = np.random.default_rng(0), 0
    for name in ("manifest.json", "adapter.safetensors"):
        for place in draw.integers(0, len(whole[name]), 40):
            damaged = bytearray(whole[name])
            damaged[place] ^= int(draw.integers(1, 256))
            (folder / name).write_bytes(damaged)
            try:
                found = adaptclip.artifact._read_manifest(folder)
            except ArtifactError:
                seen += 1
            else:  # white space between two values
                assert found == json.loads(whole["manifest.json"])
        (folder / name).write_bytes(whole[name])
    assert seen >= 70
    (folder / "README.md").write_text("for people, and theirs to edit")
    assert load(folder).class_names


def test_a_manifest_is_not_taken_for_an_early_one(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    without = {key: value for key, value in manifest.items() if key != SEAL}
    for other, message in (
        (without, "has no digest of itself, and format 2 has one"),
        ({**manifest, "format_version": 1}, "was changed after it was written"),
        ({**without, "format_version": 1}, "missing or changed"),  # the first format told its files otherwise
    ):
        write_json(folder / "manifest.json", other)
        with pytest.raises(ArtifactError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts_digest": "0" * 64}, "not those it was trained with: they were changed"),
        ({"verdicts": [{"verdict": "faim", "title": "t", "reason": "r"}]}, "'faim' is no verdict.*allowed: fail"),
        ({"settings": {"n_cxt": 4}}, "coop cannot have its settings"),
        ({"files": {"adapter.safetensors": ""}}, "is missing or changed"),
    ],
)
def test_an_early_artifact_is_still_checked_where_it_can_be(folder, change, message):
    if "files" in change:
        make_early(folder)
        (folder / "adapter.safetensors").write_bytes(b"")
    else:
        make_early(folder, **change)
    with pytest.warns(UserWarning, match="class names.*cannot be checked"), pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdicts": []}, "has verdicts on nothing, but the gates that were declared"),
        ({"gates": []}, "that were declared for this model are none"),
        ({"gates": None}, "that were declared for this model are none"),
        ({"verdicts": [{"verdict": "Pass", "title": "accuracy", "reason": ""}]}, "'Pass' is no verdict on the gate"),
        ({"verdicts": [{"verdict": None, "title": "accuracy", "reason": ""}]}, "a verdict should have"),
    ],
)
def test_every_declared_gate_has_a_verdict_that_is_one(folder, change, message):
    edit(folder, **change)
    for allowed in (False, True):
        with pytest.raises(ArtifactError, match=message):
            load(folder, allow_failed_gates=allowed)


def test_a_gate_without_a_verdict_is_not_saved(tmp_path, digits, checkpoint):
    backbone = load_backbone(f"local-dir:{checkpoint}")
    probs = np.full((20, 10), 0.1, np.float32)
    report = build_report(Predictions(tuple(map(str, range(20))), np.arange(20) % 10, probs, digits.class_names))
    with pytest.raises(ArtifactError, match="each declared gate needs its verdict"):
        save_artifact(
            tmp_path / "a", ZeroShotClassifier(backbone, digits.prompt_names), backbone, digits, None,
            method="zero_shot", report=report, verdicts=[], rules=[GateRule(metric="accuracy", at_least=0.5)],
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_the_artifact_of_a_run_is_the_one_that_it_wrote(saved, tmp_path):
    run = tmp_path / "run"
    saved(run / "artifact")
    write_sealed(run / "report.json", {"files": describe_files(run, ["artifact/manifest.json"])})
    assert load(run).class_names
    saved(tmp_path / "other", method="zero_shot")
    shutil.rmtree(run / "artifact")
    (tmp_path / "other").rename(run / "artifact")
    with pytest.raises(ArtifactError, match=r"artifact/manifest\.json is missing or changed"):
        load(run)
    assert load(run / "artifact").class_names  # by itself it is whole


def test_a_file_of_weights_that_the_manifest_does_not_name_is_refused(folder):
    edit(folder, files={})
    with pytest.raises(ArtifactError, match=r"holds adapter\.safetensors, which is not among the files"):
        load(folder)


@pytest.mark.parametrize("name", ["manifest.json", "adapter.safetensors", "artifact"])
def test_nothing_of_an_artifact_is_followed_or_waited_for(folder, tmp_path, name):
    outside = tmp_path / "outside"
    if name == "artifact":  # of a run
        folder.rename(outside)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).symlink_to(outside)
        with pytest.raises(ArtifactError, match="a link that leaves the folder"):
            load(tmp_path / "run")
        return
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match="a link that leaves the folder"):
        load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ArtifactError, match="a device, pipe or socket"):
        load(folder)
    (folder / name).unlink()
    outside.rename(folder / name)
    os.truncate(folder / name, 2**40)  # sparse
    with pytest.raises(ArtifactError, match=r"more than|is missing or changed"):
        load(folder)
