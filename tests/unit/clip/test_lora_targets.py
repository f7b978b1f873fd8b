# SPDX-License-Identifier: Apache-2.0
"""LoRA counts what it adapts against what the architecture must have, and refuses an attention it does not know."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import Attention, ResidualAttentionBlock
from tiny_clip import make_tiny_backbone, tiny_config
from tiny_kinds import KINDS, MORE_KINDS, make_kind
from torch import nn

from adaptclip.clip import load_backbone
from adaptclip.clip.attention import split_attention
from adaptclip.clip.lora_targets import count_attention, find_targets
from adaptclip.errors import BackboneError
from adaptclip.methods.lora import inject_lora, lora_layers

ATTENTIONS = {
    "ViT-B-16": (2, 2),
    "ViT-B-16-SigLIP": (3, 2),  # and a pool
    "ViT-B-16-SigLIP2-256": (3, 2),
    "coca_ViT-B-32": (3, 2),
    "BiomedCLIP": (2, 2),
    "EVA02-B-16": (2, 2),
    "MobileCLIP-S1": (1, 2),  # its last stage alone
    "RN50": (1, 2),  # its pool
    "convnext_base": (0, 2),
    "efficientnet": (0, 2),
    "roberta-ViT-B-32": (2, 2),
    "mt5-base-ViT-B-32": (2, 2),
    "ViT-H-14-CLIPA": (2, 2),
    "ViT-H-14-worldwide": (2, 2),
    "nllb-clip-base": (2, 2),
    "coca_roberta": (2, 2),
    "EVA01-g-14": (2, 2),
}
"""Attentions of the image and text tower of each tiny kind, as their configurations have them."""


class StrangeAttention(nn.Module):
    """What a library's next version may bring: projections under names that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads, self.mixed = 2, nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        return x


@pytest.mark.parametrize("name", [*KINDS, *MORE_KINDS])
def test_every_kind_has_the_attentions_of_its_architecture(name):
    model = copy.deepcopy(make_kind(name).model)
    split_attention(model)
    assert (count_attention(model, "image"), count_attention(model, "text")) == ATTENTIONS[name]
    assert find_targets(model, "image")
    assert find_targets(model, "text")


def test_the_starter_has_a_transformer_on_one_side():
    model = inject_lora(load_backbone().model)
    assert (count_attention(model, "image"), count_attention(model, "text")) == (0, 4)
    assert sum(name.startswith("transformer.") for name, _ in lora_layers(model)) == 12


@pytest.mark.parametrize("how", ["one block", "all blocks", "no name", "two more"])
def test_an_attention_that_is_not_known_is_refused_by_name(how):
    model = copy.deepcopy(make_tiny_backbone().model)
    blocks = model.visual.transformer.resblocks
    split_attention(model)
    if how in ("one block", "all blocks"):
        for block in blocks if how == "all blocks" else blocks[:1]:
            block.attn = StrangeAttention(64)
        message = r"image tower has 2 attentions .*none in its StrangeAttention"
    elif how == "no name":
        blocks[1].attn.k_proj, blocks[1].attn.keys = nn.Identity(), blocks[1].attn.k_proj
        message = "2 q, 1 k, 2 v projections were found"
    else:
        blocks[1].more = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj", "v_proj")})
        message = "3 q, 3 k, 3 v projections were found"
    with pytest.raises(BackboneError, match=message):
        find_targets(model, "image")
    assert len(find_targets(model, "text")) == 6
    if how == "one block":
        assert find_targets(model, "image", targets=["mlp.c_fc"])  # named layers are taken as they are


def test_a_tower_of_an_unknown_class_is_refused_by_name():
    model = copy.deepcopy(make_tiny_backbone().model)
    model.visual = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BackboneError, match="image tower of this model is a Sequential"):
        find_targets(model, "image")


def test_a_subclass_of_a_known_attention_is_not_taken_for_it():
    class OtherAttention(nn.MultiheadAttention):
        pass

    model = copy.deepcopy(make_tiny_backbone().model)
    model.visual.transformer.resblocks[0].attn = OtherAttention(64, 2, batch_first=True)
    assert len(split_attention(model)) == 3
    with pytest.raises(BackboneError, match="none in its OtherAttention"):
        find_targets(model, "image")


def test_custom_blocks_of_open_clip_are_split_and_adapted():
    """Before, their attention was passed over and every Linear layer of the tower was adapted instead."""
    config = tiny_config()
    config["vision_cfg"] |= {"block_type": "custom", "qk_norm": True, "scale_fc": True}
    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**config).eval()
    assert not any(isinstance(m, ResidualAttentionBlock) for m in model.visual.modules())
    assert sum(isinstance(m, Attention) for m in model.visual.modules()) == 2
    adapted: Any = inject_lora(model, "image")
    images = torch.randn(2, 3, 32, 32)
    assert [name.rpartition(".")[2] for name, _ in lora_layers(adapted)] == ["q_proj", "k_proj", "v_proj"] * 2
    torch.testing.assert_close(adapted.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-4)
