# SPDX-License-Identifier: Apache-2.0
"""Small CLIPs of four blocks, and prompts in the blocks of open_clip's and SigLIP's towers, written out by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from tiny_clip import tiny_config
from torch import Tensor
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.clip import ClipBackbone


def four_blocks(*, image_blocks: int = 4) -> ClipBackbone:
    """A CLIP of 4 blocks in its text tower, on random weights."""
    config: dict[str, Any] = tiny_config()
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = image_blocks, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config).eval()
    return ac.wrap_clip(model, open_clip.get_tokenizer("ViT-B-32"))


def text_features(backbone: ClipBackbone, texts: Sequence[str], prompts: Sequence[Tensor]) -> Tensor:
    """(C, D) unit-norm features of whole texts, the tokens behind the start token replaced in the first blocks."""
    model, tokens = backbone.model, backbone.tokenize(texts)

    def replaced(x: Tensor, own: Tensor) -> Tensor:
        return torch.cat([x[:, :1], own.expand(len(x), -1, -1), x[:, 1 + len(own) :]], dim=1)

    x = replaced(model.token_embedding(tokens), prompts[0]) + model.positional_embedding
    for i, block in enumerate(model.transformer.resblocks):
        x = block(replaced(x, prompts[i]) if 0 < i < len(prompts) else x, attn_mask=model.attn_mask)
    x = model.ln_final(x)
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection, dim=-1)


def padded_text_features(backbone: ClipBackbone, texts: Sequence[str], prompts: Sequence[Tensor]) -> Tensor:
    """The same by SigLIP's tower: no start token, every token sees all others, and the last position is pooled."""
    text, tokens = backbone.model.text, backbone.tokenize(texts)

    def replaced(x: Tensor, own: Tensor) -> Tensor:
        return torch.cat([own.expand(len(x), -1, -1), x[:, len(own) :]], dim=1)

    x = replaced(text.token_embedding(tokens), prompts[0]) + text.positional_embedding
    for i, block in enumerate(text.transformer.resblocks):
        x = block(replaced(x, prompts[i]) if 0 < i < len(prompts) else x)
    return F.normalize(text.text_projection(text.ln_final(x)[:, -1]), dim=-1)


def image_features(backbone: ClipBackbone, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """(B, D) unit-norm features, the prompts of the first blocks behind the patches."""
    visual = backbone.model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], dim=1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1))
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < len(prompts):
            x = torch.cat([x[:, : -len(prompts[i])], prompts[i].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def map_image_features(backbone: ClipBackbone, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The same by SigLIP's tower of timm, which has no class token and pools an attention over the patches."""
    trunk = backbone.model.visual.trunk
    patches = trunk.patch_embed(images) + trunk.pos_embed
    for i, block in enumerate(trunk.blocks):
        own = prompts[i].expand(len(patches), -1, -1)
        patches, _ = block(torch.cat([patches, own], dim=1)).split([patches.shape[1], own.shape[1]], dim=1)
    return F.normalize(trunk.attn_pool(trunk.norm(patches)), dim=-1)
