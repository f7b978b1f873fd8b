# SPDX-License-Identifier: Apache-2.0
"""ViTs in parts: the stock tower without prompts, and with them what timm's and open_clip's own forward computes."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models import vision_transformer
from torch import Tensor, nn

from adaptclip.clip.image_blocks import encode_in_parts, vit_parts

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TIMM: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers, positions of patches alone": {"reg_tokens": 2, "no_embed_class": True},
    "norm before the blocks": {"pre_norm": True},
    "mean without class token": {"class_token": False, "global_pool": "avg"},
    "mean beside a class token": {"global_pool": "avg", "fc_norm": False},
    "attention over the patches": {"class_token": False, "global_pool": "map"},
    "attention over the class token too": {"global_pool": "map", "pool_include_prefix": True},
    "any size": {"dynamic_img_size": True, "init_values": 0.5},
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "mean": {"pool_type": "avg"},
    "mean, norm after it": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "attention": {"attentional_pool": True},
    "other blocks": {"qk_norm": True},
}
REFUSED: dict[str, Any] = {
    "swin_base_patch4_window7_224": {"img_size": 28, "embed_dim": 8, "depths": (1,), "num_heads": (1,)},
    "convnext_base": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "eva02_base_patch16_clip_224": {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2},
    "vit_relpos_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2},
    "deit_base_distilled_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2},
    "vit_base_patch16_224": {
        "img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2, "block_fn": vision_transformer.ResPostBlock,
    },
}  # fmt: skip


def shaken(model: nn.Module) -> Any:
    """With no number of the weights what an initialisation leaves, which would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


def timm_tower(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    tower: Any = TimmModel("test_vit", 16, image_size=32)
    tower.trunk, tower.head = vision_transformer.VisionTransformer(**sizes, **TIMM[kind]), nn.Linear(24, 16)
    return shaken(tower)


def own_tower(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "width": 24, "head_width": 12, "layers": 3, "attn_pooler_heads": 2}
    text = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
    vision: Any = {**sizes, **OPEN_CLIP[kind]}
    return shaken(open_clip.CLIP(16, vision, text).visual)  # pyright: ignore[reportArgumentType]


def by_hooks(tower: Any, prompts: list[Tensor]) -> tuple[Tensor, list[int]]:
    """The tower's own forward, given the prompts on the way; and how many tokens its blocks and its pool had."""
    timms = hasattr(tower, "trunk")
    blocks = tower.trunk.blocks if timms else tower.transformer.resblocks
    norm = tower.trunk.norm_pre if timms else tower.ln_pre
    lengths: list[int] = []

    def insert(number: int, x: Tensor) -> tuple[Tensor]:
        if not number:
            lengths.append(x.shape[1])
        if number < len(prompts):
            own = norm(prompts[number]) if number == 0 else prompts[number]
            x = torch.cat([x[:, : lengths[0]], own.expand(len(x), -1, -1)], dim=1)
        lengths.append(x.shape[1])
        return (x,)

    handles = [
        block.register_forward_pre_hook(lambda _, given, number=number: insert(number, given[0]))
        for number, block in enumerate(blocks)
    ]
    handles.append(blocks[-1].register_forward_hook(lambda *given: given[2][:, : lengths[0]]))
    features = tower(IMAGES)
    for handle in handles:
        handle.remove()
    return features, lengths


@pytest.mark.parametrize(
    "tower", [*(("timm", kind) for kind in TIMM), *(("open_clip", kind) for kind in OPEN_CLIP)], ids=lambda own: own[1]
)
def test_a_tower_with_prompts_and_without(tower):
    made = timm_tower(tower[1]) if tower[0] == "timm" else own_tower(tower[1])
    parts = vit_parts(made)
    assert parts is not None
    assert (parts.width, len(parts.blocks)) == (24, 3)
    stock = made(IMAGES)
    torch.testing.assert_close(encode_in_parts(parts, IMAGES), stock, atol=1e-6, rtol=0)
    for depth in (1, 2, 3):
        prompts = [torch.randn(2, 24).requires_grad_() for _ in range(depth)]
        expected, (own, *lengths) = by_hooks(made, prompts)
        assert lengths == [own + 2] * 3
        found = encode_in_parts(parts, IMAGES, prompts)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert (found - stock).abs().max() > 1e-3
        weights = torch.linspace(-1, 1, found.numel()).view_as(found)
        theirs = torch.autograd.grad((expected * weights).sum(), prompts)
        for one, other in zip(torch.autograd.grad((found * weights).sum(), prompts), theirs, strict=True):
            assert bool(one.any())
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    made.set_grad_checkpointing(True)
    again = vit_parts(made)
    assert again is not None
    assert again.again
    torch.testing.assert_close(encode_in_parts(again, IMAGES, prompts), found, atol=1e-6, rtol=0)


def test_the_mean_is_that_of_the_patches_alone():
    tower = timm_tower("mean without class token")
    parts: Any = vit_parts(tower)
    prompts = [torch.randn(2, 24), torch.randn(2, 24)]
    x = torch.cat([parts.embed(IMAGES), prompts[0].expand(3, -1, -1)], dim=1)
    x = tower.trunk.blocks[0](x)
    x = tower.trunk.blocks[1](torch.cat([x[:, :4], prompts[1].expand(3, -1, -1)], dim=1))
    patches, made_of_prompts = tower.trunk.blocks[2](x).split([4, 2], dim=1)
    expected = tower.head(tower.trunk.fc_norm(patches.mean(dim=1)))
    torch.testing.assert_close(encode_in_parts(parts, IMAGES, prompts), expected, atol=1e-6, rtol=0)
    with_them = torch.cat([patches, made_of_prompts], dim=1).mean(dim=1)
    assert (tower.head(tower.trunk.fc_norm(with_them)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_other_towers_have_no_parts(name):
    tower: Any = TimmModel("test_vit", 16, image_size=32)
    tower.trunk = timm.create_model(name, num_classes=0, **REFUSED[name])
    assert vit_parts(tower) is None


def test_towers_of_open_clip_that_return_more_than_a_vector_have_no_parts():
    tower = own_tower("mean")
    tower.output_tokens = True
    assert vit_parts(tower) is None
    assert vit_parts(nn.Identity()) is None
