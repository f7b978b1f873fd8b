"""An artifact loads as it was saved, or says why not."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import write_tiny_checkpoint

import adaptclip
from adaptclip.adapters import CoOp, LoRA, ZeroShotClassifier
from adaptclip.artifact import load, save_artifact
from adaptclip.backbone import load_backbone
from adaptclip.backbone.attention import split_attention
from adaptclip.data.card import load_card
from adaptclip.data.fewshot import sample_few_shot
from adaptclip.data.sources import open_data
from adaptclip.errors import AdaptclipError, ArtifactError, DataError, StorageError
from adaptclip.gates import check_gates
from adaptclip.reports.summary import build_report
from adaptclip.storage import digest, read_tensors, write_tensors
from adaptclip.types import Batch, GateRule, Predictions


@pytest.fixture(scope="module")
def digits():
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, digits, checkpoint):
    """Saves an artifact whose gate has the given limit on accuracy; returns folder and adapter."""

    def save(folder: Path, at_least: float = 0.0, method: str = "coop"):
        backbone = load_backbone(f"local-dir:{checkpoint}")
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


def edit(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("method", ["coop", "zero_shot"])
def test_reloaded_equals_live(saved, tmp_path, digits, method):
    live = saved(tmp_path / "a", method=method).eval()
    model = load(tmp_path / "a")
    assert torch.equal(model.adapter.class_weights(), live.class_weights())
    assert model.class_names == digits.class_names
    pictures = [digits.test.image(i) for i in range(5)]
    assert [p.label for p in model.predict(pictures, batch_size=2)] == [p.label for p in model.predict(pictures)]
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".json", ".safetensors", ".md"}


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
    assert model.predict([]) == []


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
    with pytest.warns(UserWarning, match="not a pass"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.safetensors").write_bytes(b"x"), "adapter.safetensors is missing or changed"),
        (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors is missing or changed"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: edit(f, format_version=99), "Install a newer adaptclip"),
        (lambda f: edit(f, method="coöp"), 'Did you mean "coop"'),
        (lambda f: edit(f, files={"../outside": "x"}), "missing or changed"),
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


ENSEMBLE = ("a photo of the digit {}.", "the number {} in a drawing.")


@pytest.fixture
def lora(tmp_path, digits, checkpoint):
    """Folder of a LoRA artifact with an ensemble of templates, and the live adapter."""
    backbone = load_backbone(f"local-dir:{checkpoint}")
    adapter = LoRA(backbone, digits.prompt_names, templates=ENSEMBLE, rank=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    probs = np.full((20, 10), 0.1, np.float32)
    predictions = Predictions(tuple(map(str, range(20))), np.arange(20) % 10, probs, digits.class_names)
    save_artifact(
        tmp_path / "lora", adapter, backbone, digits, None, method="lora", report=build_report(predictions), verdicts=[]
    )
    return tmp_path / "lora", adapter.eval()


def with_new_digests(folder: Path) -> None:
    """What someone does who changes a file and means it."""
    names = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files={name: digest((folder / name).read_bytes()) for name in names})


def edit_settings(folder: Path, **changes) -> None:
    edit(folder, settings={**json.loads((folder / "manifest.json").read_text())["settings"], **changes})


def test_the_templates_of_training_are_those_of_prediction(lora, digits):
    folder, live = lora
    model = load(folder)
    assert isinstance(model.adapter, LoRA)
    assert model.adapter.templates == ENSEMBLE
    assert torch.equal(model.adapter.class_weights(), live.class_weights())
    # One template, or the card's own, would give other weights: the ensemble is what was loaded.
    for other in (ENSEMBLE[:1], digits.card.templates):
        changed = LoRA(live.backbone, digits.prompt_names, templates=other, rank=3)
        changed.load_adapter_state(live.adapter_state())
        assert (changed.class_weights() - live.class_weights()).abs().max() > 1e-3
    pictures = [digits.test.image(i) for i in range(4)]
    pixels = torch.stack([live.backbone.transform(picture) for picture in pictures])
    index = torch.arange(4)
    with torch.no_grad():
        expected = live(Batch(index, index, images=pixels)).softmax(dim=1)
    torch.testing.assert_close(model.probabilities(pictures), expected, atol=1e-6, rtol=0)


def test_expected_templates_are_compared(lora, folder, saved, tmp_path):
    assert load(lora[0], templates=ENSEMBLE).class_names
    assert load(lora[0], templates=list(ENSEMBLE)).class_names
    for other in (ENSEMBLE[::-1], ENSEMBLE[:1], ("a photo of a {}.",), ()):
        with pytest.raises(ArtifactError, match=r"was trained with the templates \['a photo of the digit"):
            load(lora[0], templates=other)
    saved(tmp_path / "zero_shot", method="zero_shot")
    assert load(tmp_path / "zero_shot", templates=("a photo of a {}.",)).class_names
    with pytest.raises(ArtifactError, match="leave templates out, or train with these"):
        load(tmp_path / "zero_shot", templates=ENSEMBLE)


@pytest.mark.parametrize(
    "change",
    [
        lambda f, d: edit_settings(f, templates=list(ENSEMBLE[:1])),
        lambda f, d: edit_settings(f, templates=[*ENSEMBLE, "a {}."]),
        lambda f, d: edit_settings(f, templates=["a photo of the digit  {}.", ENSEMBLE[1]]),
        lambda f, d: edit(f, prompt_names=[*d.prompt_names[:9], "neuf"]),
        lambda f, d: edit(f, prompt_names=[*d.prompt_names[:8], "nine", "eight"]),
        lambda f, d: edit(f, prompt_names=list(d.prompt_names[:9])),
    ],
)
def test_prompts_changed_by_hand_are_refused(lora, digits, change):
    change(lora[0], digits)
    with pytest.raises(ArtifactError, match=r"not those it was trained with: they were changed afterwards"):
        load(lora[0])


def test_lora_is_a_folder_of_peft(lora, checkpoint):
    import peft

    folder, live = lora
    names = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    split = copy.deepcopy(load_backbone(f"local-dir:{checkpoint}").model)
    split_attention(split)
    by_peft: Any = peft.PeftModel.from_pretrained(split, str(folder)).eval().base_model.model
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = live.backbone.tokenize(["a photo of the digit seven.", "the number two in a drawing."])
    encoder = load(folder).adapter.encoder
    with torch.no_grad():
        for own, other in (
            (encoder.encode_image(images), by_peft.encode_image(images)),
            (encoder.encode_text(tokens), by_peft.encode_text(tokens)),
        ):
            unit = torch.nn.functional.normalize(other, dim=-1)
            torch.testing.assert_close(own, unit, atol=1e-6, rtol=0)
        assert (encoder.encode_image(images) - live.backbone.encode_image(images)).abs().max() > 1e-3


def test_the_scale_of_the_update_travels(lora, tmp_path, digits):
    _, live = lora
    weights = {}
    for scale in (0.0, 0.5):
        live.set_scale(scale)
        probs = np.full((20, 10), 0.1, np.float32)
        report = build_report(Predictions(tuple(map(str, range(20))), np.arange(20) % 10, probs, digits.class_names))
        save_artifact(
            tmp_path / str(scale), live, live.backbone, digits, None, method="lora", report=report, verdicts=[]
        )
        weights[scale] = load(tmp_path / str(scale)).adapter.class_weights()
        assert torch.equal(weights[scale], live.class_weights())
    zero_shot = ZeroShotClassifier(live.backbone, digits.prompt_names, ENSEMBLE)
    torch.testing.assert_close(weights[0.0], zero_shot.class_weights(), atol=1e-6, rtol=0)
    assert (weights[0.5] - weights[0.0]).abs().max() > 1e-3


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing or changed"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing or changed"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json is missing or changed"),
    ],
)
def test_damage_of_a_peft_folder_is_said(lora, damage, message):
    damage(lora[0])
    with pytest.raises(ArtifactError, match=message):
        load(lora[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "a state of LoRA should hold"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "a state of LoRA should hold"),
        (lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(2, 64)}), "has shape (2, 64), expected"),
        (lambda tensors: tensors[sorted(tensors)[0]].fill_(float("inf")), "not finite"),
    ],
)
def test_a_peft_file_that_does_not_fit_is_refused(lora, change, message):
    change_tensors(lora[0], change)
    with_new_digests(lora[0])
    with pytest.raises(ArtifactError, match=re.escape(message)):
        load(lora[0])


def test_a_peft_file_that_cannot_be_read_is_damaged(lora):
    path = lora[0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with_new_digests(lora[0])
    with pytest.raises(ArtifactError, match="is damaged"):
        load(lora[0])
