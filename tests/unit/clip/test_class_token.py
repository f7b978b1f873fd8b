# SPDX-License-Identifier: Apache-2.0
"""The last image block for the class token alone: the same features and gradients as the whole tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip import image_blocks as class_token
from adaptclip.clip import load_backbone
from adaptclip.clip.image_blocks import encode_image, pools_class_token
from adaptclip.methods.lora import inject_lora, lora_layers, lora_parameters

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class FixedDropout(nn.Module):
    """Drops given elements of a (B, L, T) input, or of its first tokens where it has fewer."""

    def __init__(self, kept: Tensor, share: float) -> None:
        super().__init__()
        self.kept, self.share = kept, share

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept[:, : x.shape[1]] / (1 - self.share)


def adapted(kind: Any = "clip", **settings: Any) -> Any:
    """A tiny CLIP with LoRA on its image tower and a B that is not zero."""
    model = inject_lora(make_tiny_backbone(kind).model, "image", **settings)
    torch.manual_seed(2)
    for name, parameter in lora_parameters(model).items():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def both_ways(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Features and all gradients, by the short path and by the whole tower."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    results = []
    for encode in (encode_image, lambda model, images: model.encode_image(images)):
        features = encode(model, IMAGES)
        weights = torch.linspace(-1, 1, features.numel()).view_as(features)
        results.append([features, *torch.autograd.grad((F.normalize(features, dim=-1) * weights).sum(), learnt)])
    return results[0], results[1]


def calls_of_the_short_path(monkeypatch) -> list[int]:
    """Tokens that came out of the last block, one entry per call of the short path."""
    seen: list[int] = []
    real = class_token._last_block

    def noted(block: Any, x: Tensor) -> Tensor:
        out = real(block, x)
        seen.append(out.shape[1])
        return out

    monkeypatch.setattr(class_token, "_last_block", noted)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"projections": ("q", "k", "v", "out", "mlp")}, {"dora": True}])
@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_features_and_gradients_of_an_adapted_tower(kind, settings, checkpointing, monkeypatch):
    calls = calls_of_the_short_path(monkeypatch)
    model = adapted(kind, dropout=0.0, **settings)
    model.visual.set_grad_checkpointing(checkpointing)
    short, whole = both_ways(model)
    assert set(calls) == {1}
    assert len(short) == 1 + sum(3 if settings.get("dora") else 2 for _ in lora_layers(model))
    for got, expected in zip(short, whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert all(bool(gradient.any()) for gradient in short)


def test_with_the_same_elements_dropped_it_is_the_same(monkeypatch):
    calls = calls_of_the_short_path(monkeypatch)
    model = adapted(dropout=0.25)
    generator = torch.Generator().manual_seed(3)
    fixed = 0
    for _, layer in lora_layers(model):
        kept = torch.rand(len(IMAGES), 17, layer.in_features, generator=generator) > 0.25
        layer.lora_dropout["default"] = FixedDropout(kept, 0.25)
        fixed += 1
    assert fixed == 6
    short, whole = both_ways(model)
    assert calls == [1]
    assert len(short) == 13
    for got, expected in zip(short, whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_dropout_is_drawn_for_every_image_in_training():
    model = adapted(dropout=0.25)
    for _, layer in lora_layers(model):
        layer.lora_dropout.train()
    same = IMAGES[:1].expand(4, -1, -1, -1)
    features = encode_image(model, same)
    assert all(not torch.equal(features[0], features[i]) for i in range(1, 4))


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_a_frozen_tower_with_fused_attention(kind, monkeypatch):
    calls = calls_of_the_short_path(monkeypatch)
    model = make_tiny_backbone(kind).model
    with torch.no_grad():
        torch.testing.assert_close(encode_image(model, IMAGES), model.encode_image(IMAGES), atol=1e-5, rtol=1e-5)
    assert calls == [1]


@pytest.mark.parametrize("how", ["average", "attention pooling", "tokens", "another block", "convolutions"])
def test_other_towers_are_left_to_the_model(how):
    backbone = load_backbone() if how == "convolutions" else make_tiny_backbone()
    model = backbone.model
    if how == "average":
        model.visual.pool_type = "avg"
    elif how == "attention pooling":
        model.visual.attn_pool = nn.Identity()
    elif how == "tokens":
        model.visual.output_tokens = True
    elif how == "another block":
        model.visual.transformer.resblocks[-1] = nn.Identity()
    assert not pools_class_token(model.visual)
    if how in ("average", "convolutions"):
        images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
        with torch.no_grad():
            assert torch.equal(encode_image(model, images), model.encode_image(images))
