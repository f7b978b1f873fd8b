# SPDX-License-Identifier: Apache-2.0
"""MaPLe: the published forward pass, written out on open_clip's own towers, with its gradients."""

from __future__ import annotations

import json

import pytest
import torch
from deep_prompt_towers import (
    four_blocks,
    image_features,
    map_image_features,
    padded_text_features,
    text_features,
)
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError
from adaptclip.methods.maple import MaPLe
from adaptclip.prompts import zero_shot_weights
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy chain")


@pytest.fixture(scope="module")
def backbone():
    return four_blocks()


def pictures(count: int = 5) -> Batch:
    labels = torch.arange(count) % len(NAMES)
    return Batch(labels, labels, images=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def features_of(encoder) -> Batch:
    batch = pictures()
    with torch.no_grad():
        return Batch(batch.labels, batch.index, features=encoder.encode_image(batch.images))


@pytest.mark.parametrize(("depth", "n_ctx"), [(3, 2), (1, 2), (4, 4), (9, 1)])
def test_the_forward_pass_and_its_gradients_are_the_published_ones(backbone, depth, n_ctx):
    adapter = MaPLe(backbone, NAMES, depth=depth, n_ctx=n_ctx).train()
    batch = pictures()
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    context, deep = adapter.context, adapter.deep
    prompts = [context, *deep][: min(depth, 4)]
    assert len(prompts) == min(depth, 4)
    joined = [p @ adapter.weight[j].T + adapter.bias[j] for j, p in enumerate(prompts)]
    text, images = text_features(backbone, texts, prompts), image_features(backbone, batch.images, joined)  # pyright: ignore[reportArgumentType]
    expected = float(backbone.logit_scale) * images @ text.T
    learnt = adapter.trainable_parameters()
    theirs = torch.autograd.grad(F.cross_entropy(expected, batch.labels), learnt)
    logits = adapter(batch)
    own = torch.autograd.grad(F.cross_entropy(logits, batch.labels), learnt)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for one, other in zip(own, theirs, strict=True):
        assert float(other.abs().sum()) > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256"])
def test_the_towers_of_siglip(kind):
    siglip = make_kind(kind)
    words = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    # Untouched, the prompts of the first block are the words themselves.
    torch.testing.assert_close(
        MaPLe(siglip, NAMES, depth=1).text_features(), zero_shot_weights(siglip, words, ["{}"]), atol=1e-6, rtol=0
    )
    adapter = MaPLe(siglip, NAMES).train()
    batch, learnt = pictures(), adapter.trainable_parameters()
    prompts = [adapter.context, *adapter.deep]
    assert len(prompts) == len(siglip.model.visual.trunk.blocks) == 2
    joined = [p @ adapter.weight[j].T + adapter.bias[j] for j, p in enumerate(prompts)]
    text = padded_text_features(siglip, words, prompts)
    images = map_image_features(siglip, batch.images, joined)  # pyright: ignore[reportArgumentType]
    expected = float(siglip.logit_scale) * images @ text.T
    theirs = torch.autograd.grad(F.cross_entropy(expected, batch.labels), learnt)
    logits = adapter(batch)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    own = torch.autograd.grad(F.cross_entropy(logits, batch.labels), learnt)
    for one, other in zip(own, theirs, strict=True):
        assert float(other.abs().sum()) > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_what_it_starts_from(backbone):
    adapter = MaPLe(backbone, NAMES)
    with torch.no_grad():
        words = backbone.model.token_embedding(backbone.tokenize(["a photo of a"]))[0, 1:3]
    assert torch.equal(adapter.context, words)
    assert adapter.deep.shape == (3, 2, 64)
    assert 0.01 < float(adapter.deep.detach().std()) < 0.03
    assert torch.equal(adapter.weight[1], adapter.weight[3])
    assert not torch.equal(adapter.weight[0], adapter.weight[1])
    assert torch.equal(MaPLe(backbone, NAMES).deep, adapter.deep)
    assert not torch.equal(MaPLe(backbone, NAMES, seed=1).deep, adapter.deep)
    plan = adapter.schedule(16)
    assert (plan.epochs, plan.lr, plan.batch_size) == (5, 3.5e-3, 4)


def test_reloaded_fixed_and_live_are_the_same_and_the_backbone_stays(backbone):
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = MaPLe(backbone, NAMES, depth=3).train()
    optimizer = torch.optim.SGD(adapter.trainable_parameters(), lr=0.01)
    batch = pictures()
    before = F.cross_entropy(adapter(batch), batch.labels)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()
    live = adapter(batch)
    assert F.cross_entropy(live, batch.labels) < before
    adapter.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapter(features_of(adapter.encoder)), live, atol=1e-4, rtol=0)
    again = MaPLe(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
    assert again.encoder.digest == adapter.encoder.digest != backbone.digest
    assert torch.equal(again.class_weights(), adapter.class_weights())
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())
    moved = adapter.for_classes([*reversed(NAMES), "heron"])
    torch.testing.assert_close(moved.class_weights()[:3], adapter.class_weights().flip(0), atol=1e-5, rtol=0)
    assert moved.encoder.digest == adapter.encoder.digest
    with pytest.raises(ArtifactError, match="MaPLe should hold"):
        again.load_adapter_state({"context": adapter.context})


def test_what_does_not_go(backbone):
    for kind, tower in (
        ("RN50", "image tower of .* (ModifiedResNet)"),
        ("convnext_base", "image tower of .* (ConvNeXt)"),
        ("EVA02-B-16", "image tower of .* (Eva)"),
        ("coca_ViT-B-32", "image tower of .* (CoCa)"),
        ("roberta-ViT-B-32", "text tower of .* (HuggingFaceTextTower)"),
    ):
        named = tower.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(BackboneError, match=f"prompts in the blocks need .* the {named}"):
            MaPLe(make_kind(kind), NAMES)
    with pytest.raises(BackboneError, match="towers"):
        MaPLe(ac.FeatureClip(torch.eye(3)), NAMES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="in fp32, got bf16"):
        MaPLe(make_tiny_backbone(precision="bf16"), NAMES)
    for settings, message in (({"n_ctx": 5}, "has 4 tokens, and n_ctx=5"), ({"depth": 0}, "1 or more")):
        with pytest.raises(ConfigError, match=message):
            MaPLe(backbone, NAMES, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="learns from pixels"):
        MaPLe(backbone, NAMES).train()(features_of(backbone))
