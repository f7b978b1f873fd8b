# SPDX-License-Identifier: Apache-2.0
"""Two stages: the head starts as the adapted text features, learns alone, and only speaks of the classes it knows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_artifacts import edit_manifest
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.artifact import load, save_artifact
from adaptclip.clip import ClipBackbone
from adaptclip.data.card import load_card
from adaptclip.data.shots import base_and_new
from adaptclip.data.sources import open_data
from adaptclip.errors import ArtifactError, ConfigError, DataError
from adaptclip.files import read_tensors, write_tensors
from adaptclip.methods import LoRA, TwoStage
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy", "oak")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "tiny"


@pytest.fixture(scope="module")
def backbone(folder) -> ClipBackbone:
    return make_tiny_backbone(folder=folder)


def first_stage(backbone: ClipBackbone, names=NAMES, scale: float = 0.15, **settings) -> LoRA:
    """LoRA with an update that changes both towers."""
    lora = LoRA(backbone, names, templates=TEMPLATES, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return lora


def pixels(backbone: ClipBackbone, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features_of(encoder: ClipBackbone) -> Batch:
    images = pixels(encoder)
    with torch.no_grad():
        values = encoder.encode_image(images)
    return Batch(labels=torch.arange(len(images)) % len(NAMES), index=torch.arange(len(images)), features=values)


def train_head(adapter: TwoStage, steps: int = 5, lr: float = 0.05) -> None:
    batch = features_of(adapter.encoder)
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=lr)
    adapter.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()
    adapter.eval()


def text_features(model, backbone: ClipBackbone, name: str) -> np.ndarray:
    """(D,) float64 mean of the templates' features by a stock open_clip model."""
    with torch.no_grad():
        tokens = backbone.tokenize([t.replace("{}", name) for t in TEMPLATES])
        values = model.encode_text(tokens).double().numpy()
    mean = (values / np.linalg.norm(values, axis=1, keepdims=True)).mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_without_a_step_the_head_judges_as_the_first_stage_does(backbone, towers):
    lora = first_stage(backbone, towers=towers)
    batch = features_of(lora.encoder)
    with torch.no_grad():
        expected = lora(batch)
    adapter = TwoStage(backbone, NAMES, first=lora)
    torch.testing.assert_close(adapter(batch).detach(), expected, atol=1e-5, rtol=0)
    assert adapter.encoder.digest == lora.encoder.digest
    merged = lora.merged_model()
    rows = np.stack([text_features(merged, backbone, name.replace("_", " ")) for name in NAMES])
    np.testing.assert_allclose(adapter.head_weight.detach().numpy(), rows, atol=1e-5)
    frozen = np.stack([text_features(backbone.model, backbone, name.replace("_", " ")) for name in NAMES])
    assert (np.abs(rows - frozen).max() > 1e-3) == (towers != "image")


def test_only_the_head_learns(backbone):
    lora = first_stage(backbone)
    assert len(lora.trainable_parameters()) == 24
    before = {name: value.clone() for name, value in lora.adapter_state().items()}
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = TwoStage(backbone, NAMES, first=lora)
    start, weights = adapter.head_weight.detach().clone(), adapter.encoder.digest
    batch = features_of(adapter.encoder)
    adapter.train()
    F.cross_entropy(adapter(batch), batch.labels).backward()
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["head_weight"]
    assert [name for name, p in adapter.named_parameters() if p.grad is not None] == ["head_weight"]
    assert adapter.trainable_parameters() == [adapter.head_weight]
    assert adapter.head_weight.grad is not None
    assert (adapter.head_weight.grad.abs().amax(dim=1) > 0).all()
    train_head(adapter)
    assert not torch.allclose(adapter.head_weight, start, atol=1e-2)
    assert all(torch.equal(before[name], value) for name, value in lora.adapter_state().items())
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())
    assert adapter.encoder.digest == weights  # cached features stay those of this encoder


def test_the_gradient_is_that_of_scaled_cosines(backbone):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone))
    train_head(adapter)  # rows of another length than 1
    batch = features_of(adapter.encoder)
    adapter.train()
    adapter.zero_grad()
    F.cross_entropy(adapter(batch), batch.labels).backward()
    head = adapter.head_weight.detach().double().requires_grad_()
    assert batch.features is not None
    values = batch.features.double()
    logits = float(backbone.logit_scale) * values @ (head / head.norm(dim=1, keepdim=True)).T
    chosen = logits.log_softmax(dim=1)[torch.arange(len(values)), batch.labels]
    (expected,) = torch.autograd.grad(-chosen.mean(), head)
    assert adapter.head_weight.grad is not None
    torch.testing.assert_close(adapter.head_weight.grad.double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(adapter(batch).double(), logits, atol=1e-4, rtol=0)


def test_training_mode_does_not_wake_up_the_dropout_of_the_towers(backbone):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone, dropout=0.5))
    adapter.train()
    assert adapter.training
    assert [name for name, module in adapter.named_modules() if module.training] == [""]
    batch = features_of(adapter.encoder)
    assert torch.equal(adapter(batch), adapter(batch))
    assert not adapter.eval().training


def test_known_classes_by_the_head_and_others_by_the_text_tower(backbone):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone))
    train_head(adapter)
    asked = ("pine tree", "oak", "blue whale", "daisies")
    got = adapter.class_weights_of(asked)
    assert got.shape == (4, 48)
    assert not got.requires_grad
    torch.testing.assert_close(got.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    head = adapter.head_weight.detach() / adapter.head_weight.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(got[1], head[3])
    torch.testing.assert_close(got[2], head[1])  # underscores and spaces are the same name
    merged = adapter.first.merged_model()
    for row in (0, 3):
        np.testing.assert_allclose(got[row].numpy(), text_features(merged, backbone, asked[row]), atol=1e-5)
    for row in (1, 2):  # the head went away from the text features
        assert np.abs(got[row].numpy() - text_features(merged, backbone, asked[row])).max() > 1e-2
    assert torch.equal(adapter.class_weights_of(NAMES), adapter.class_weights())


def test_settings_and_state_build_the_same_adapter_again(backbone):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone, rank=3, projections=("q", "v"), towers="both"))
    train_head(adapter)
    again = TwoStage(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    again.load_adapter_state(adapter.adapter_state())
    assert again.encoder.digest == adapter.encoder.digest
    batch = features_of(adapter.encoder)
    assert torch.equal(again(batch), adapter(batch))
    assert torch.equal(again.class_weights(), adapter.class_weights())
    # A checkpoint of the second stage is the whole of it: also where the first stage was loaded before.
    assert len(adapter.adapter_state()) == 1 + 2 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head"), "two-stage head should hold"),
        (lambda state: state.update(head=state["head"][:2]), r"'head' .* has shape \(2, 48\), expected \(4, 48\)"),
        (lambda state: state.update(head=state["head"] * float("nan")), "not finite"),
        (lambda state: state.pop(sorted(state)[-1]), "state of LoRA should hold"),
        (lambda state: state.update(extra=torch.zeros(1)), "state of LoRA should hold"),
    ],
)
def test_a_state_that_does_not_fit(backbone, change, message):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone))
    state, before = dict(adapter.adapter_state()), adapter.class_weights().clone()
    change(state)
    with pytest.raises(ArtifactError, match=message):
        adapter.load_adapter_state(state)
    assert torch.equal(adapter.class_weights(), before)


def test_wrong_input(backbone):
    lora = first_stage(backbone)
    with pytest.raises(ConfigError, match="brings its own settings, got dropout, rank beside it"):
        TwoStage(backbone, NAMES, first=lora, rank=4, dropout=0.0)
    with pytest.raises(ConfigError, match="first stage was made for the 4 classes"):
        TwoStage(backbone, NAMES[::-1], first=lora)
    with pytest.raises(ConfigError, match="other weights"):
        TwoStage(make_tiny_backbone(seed=1), NAMES, first=lora)
    with pytest.raises(ConfigError, match="rank of LoRA"):
        TwoStage(backbone, NAMES, tune="lora", rank=0)
    adapter = TwoStage(backbone, NAMES, first=lora)
    two = torch.arange(2)
    with pytest.raises(DataError, match="consumes image features"):
        adapter(Batch(labels=two, index=two, images=pixels(backbone, 2)))
    with pytest.raises(DataError, match=r"\(B, 48\)"):
        adapter(Batch(labels=two, index=two, features=torch.zeros(2, 7)))


@pytest.fixture(scope="module")
def digits():
    return base_and_new(open_data(load_card("digits"), check=False))[0]


@pytest.fixture
def saved(tmp_path, backbone, digits):
    """An artifact of a trained adapter, and the adapter."""
    adapter = TwoStage(backbone, digits.prompt_names, first=first_stage(backbone, digits.prompt_names))
    with torch.no_grad():
        adapter.head_weight.add_(0.1 * torch.randn(5, 48, generator=torch.Generator().manual_seed(3)))
    probs = np.full((10, 5), 0.2, np.float32)
    predictions = Predictions(tuple(map(str, range(10))), np.arange(10) % 5, probs, digits.class_names)
    save_artifact(
        tmp_path / "artifact", adapter, backbone, digits, None, method="two_stage",
        report=build_report(predictions), verdicts=[],
    )  # fmt: skip
    return tmp_path / "artifact", adapter


def test_the_artifact_predicts_as_the_live_adapter(saved, backbone, digits):
    folder, adapter = saved
    files = {"manifest.json", "README.md", "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    assert set(read_tensors(folder / "adapter.safetensors")) == {"head"}
    model = load(folder)
    pictures = [digits.test.image(i) for i in range(6)]
    got = model.probabilities(pictures)
    images = torch.stack([backbone.transform(picture) for picture in pictures])
    index = torch.arange(6)
    with torch.no_grad():
        live = adapter(Batch(index, index, features=adapter.encoder.encode_image(images))).softmax(dim=1)
        frozen = adapter(Batch(index, index, features=backbone.encode_image(images))).softmax(dim=1)
    torch.testing.assert_close(got, live, atol=1e-6, rtol=0)
    assert (got - frozen).abs().max() > 1e-3  # the adapted image tower, not the frozen one
    assert isinstance(model.adapter, TwoStage)
    asked = (*digits.prompt_names, "a letter")
    assert torch.equal(model.adapter.class_weights_of(asked), adapter.class_weights_of(asked))


def test_a_damaged_head_or_first_stage_is_refused(saved):
    folder, _ = saved
    for name in ("adapter.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=f"{name} is missing or changed"):
            load(folder)
        (folder / name).write_bytes(whole)
    write_tensors(folder / "adapter.safetensors", {"head": torch.zeros(5, 47)})
    edit_manifest(folder, new_files=True)
    with pytest.raises(ArtifactError, match=r"shape \(5, 47\), expected \(5, 48\)"):
        load(folder)


def test_autocast_and_dtype_do_not_change_the_answer(backbone):
    adapter = TwoStage(backbone, NAMES, first=first_stage(backbone))
    batch = features_of(adapter.encoder)
    assert batch.features is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = adapter(batch)
    assert torch.equal(half, adapter(batch))  # logits are never rounded
    wide = replace(batch, features=batch.features.double())
    torch.testing.assert_close(adapter(wide), adapter(batch))
