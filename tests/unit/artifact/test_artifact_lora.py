# SPDX-License-Identifier: Apache-2.0
"""A LoRA artifact: a PEFT folder whose prompts, scale and weights are those of training, or an error."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_artifacts import edit_manifest
from tiny_clip import write_tiny_checkpoint

from adaptclip.artifact import load, save_artifact
from adaptclip.clip import load_backbone
from adaptclip.clip.attention import split_attention
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.errors import ArtifactError
from adaptclip.files import read_tensors, write_tensors
from adaptclip.methods import LoRA, ZeroShotClassifier
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.types import Batch


@pytest.fixture(scope="module")
def digits():
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def edit(folder: Path, **changes) -> None:
    """By hand: the digest of the manifest is what it was."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


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
    edit_manifest(folder, new_files=True)


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


def test_expected_templates_are_compared(lora):
    assert load(lora[0], templates=ENSEMBLE).class_names
    assert load(lora[0], templates=list(ENSEMBLE)).class_names
    for other in (ENSEMBLE[::-1], ENSEMBLE[:1], ("a photo of a {}.",), ()):
        with pytest.raises(ArtifactError, match=r"was trained with the templates \['a photo of the digit"):
            load(lora[0], templates=other)


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
    with pytest.raises(ArtifactError, match=r"was changed after it was written|equally many"):
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
