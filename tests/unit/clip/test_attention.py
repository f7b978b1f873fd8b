# SPDX-License-Identifier: Apache-2.0
"""Splitting and fusing attention: the same function, the same bits, and stock open_clip loads the result."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from open_clip.transformer import Attention
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch import nn

from adaptclip.clip.attention import (
    SplitAttention,
    fuse_attention,
    is_plain_attention,
    share_weights,
    split_attention,
)
from adaptclip.errors import BackboneError


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_split_is_the_same_function_and_fuse_the_same_bits(kind):
    backbone = make_tiny_backbone(kind)
    model = copy.deepcopy(backbone.model)
    images, tokens = torch.randn(3, 3, 32, 32), backbone.tokenize(["a red fox", "a thing"])
    expected = model.encode_image(images), model.encode_text(tokens)
    names = split_attention(model)
    assert len(names) == 4  # two blocks in either tower
    assert not any(isinstance(module, nn.MultiheadAttention | Attention) for module in model.modules())
    assert sum(isinstance(module, SplitAttention) for module in model.modules()) == 4
    for got, wanted in zip((model.encode_image(images), model.encode_text(tokens)), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert fuse_attention(model) == names
    before, after = backbone.model.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model.encode_image(images), expected[0])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == dict.fromkeys(before, False)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "coca_ViT-B-32"])
def test_split_and_fuse_keep_the_keys_of_real_architectures(name):
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        assert config is not None
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
        config.pop("custom_text", None)
        model = kind(**config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    split = split_attention(model)
    assert len(split) >= 12
    assert fuse_attention(model) == split
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("bias", "kdim"), [(True, None), (False, None), (True, 12)])
def test_every_kind_of_fused_attention(batch_first, bias, kdim):
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(16, 4, bias=bias, kdim=kdim, vdim=kdim, batch_first=batch_first).eval()
    split = SplitAttention(fused)
    query, key = torch.randn(3, 5, 16), torch.randn(3, 5, kdim or 16)
    length, batch = (5, 3) if batch_first else (3, 5)
    causal = torch.full((length, length), float("-inf")).triu_(1)
    hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
    per_head = torch.randn(batch * 4, length, length)
    for mask in (None, causal, hidden, per_head):
        expected = fused(query, key, key, need_weights=False, attn_mask=mask)[0]
        assert torch.allclose(split(query, key, key, attn_mask=mask)[0], expected, atol=1e-6)
    for name, value in fused.state_dict().items():
        assert torch.equal(split.fuse().state_dict()[name], value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_heads": True, "inner_norm": True},
        {"proj_drop": 0.1, "attn_drop": 0.2},
    ],
)
def test_open_clips_own_attention(settings):
    """In the custom blocks of open_clip 3 and in all blocks of open_clip 4: same function, same bits, same names."""
    torch.manual_seed(0)
    fused = Attention(16, 4, **settings).eval()
    for parameter in fused.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    split, x = SplitAttention(fused), torch.randn(3, 5, 16)
    causal = torch.full((5, 5), float("-inf")).triu_(1)
    for mask in (None, causal, torch.randn(12, 5, 5)):
        torch.testing.assert_close(split(x, attn_mask=mask), fused(x, attn_mask=mask), atol=1e-6, rtol=1e-5)
    assert is_plain_attention(fused) == is_plain_attention(split) == (set(settings) <= {"qkv_bias"})
    again = split.fuse()
    assert type(again) is Attention
    assert list(again.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fused.state_dict().items())
    assert torch.equal(again(x, attn_mask=causal), fused(x, attn_mask=causal))
    with pytest.raises(BackboneError, match="boolean mask"):
        split(x, attn_mask=causal == 0)


def test_a_boolean_mask_means_what_it_means_to_the_fused_module():
    """Both libraries use booleans, with opposite meanings (True hides here)."""
    fused = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 2, 8)
    first_only = torch.tensor([[False, True], [False, True]])
    got = SplitAttention(fused)(x, x, x, attn_mask=first_only)[0]
    changed = x.clone()
    changed[:, 1] += 1  # the second token is hidden from both as a key
    moved = SplitAttention(fused)(x, changed, changed, attn_mask=first_only)[0]
    assert torch.allclose(got, moved, atol=1e-6)


def test_what_split_attention_refuses():
    fused = nn.MultiheadAttention(8, 2, batch_first=True)
    split, x = SplitAttention(fused), torch.randn(1, 2, 8)
    with pytest.raises(BackboneError, match="no attention weights"):
        split(x, x, x, need_weights=True)
    with pytest.raises(BackboneError, match="key_padding_mask"):
        split(x, x, x, key_padding_mask=torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(BackboneError, match="bias_k"):
        SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    split.q_proj = nn.Sequential(split.q_proj)  # type: ignore[assignment]
    with pytest.raises(BackboneError, match="q_proj is a Sequential"):
        split.fuse()


def test_a_copy_shares_the_weights_and_nothing_else():
    model = make_tiny_backbone().model
    copied = share_weights(model)
    split_attention(copied)
    assert any(isinstance(module, nn.MultiheadAttention | Attention) for module in model.modules())
    whole = sum(p.untyped_storage().nbytes() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in copied.parameters()}
    assert own == {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert whole > 0


@pytest.mark.parametrize(("kind", "layer"), [("RN50", "attnpool.q_proj"), ("EVA01-g-14", "attn.qkv")])
def test_layers_whose_weights_were_read_are_called(kind, layer):
    """open_clip's attention pool and EVA01's attention read the weights of these layers: an adapter had no effect."""
    backbone = make_kind(kind)
    model, size = copy.deepcopy(backbone.model), backbone.image_size
    images = torch.randn(3, 3, size, size)
    expected, calls = model.encode_image(images), []
    split_attention(model)
    for name, module in model.named_modules():
        if name.endswith(layer):
            module.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=0)
    assert calls
    calls.clear()
    fuse_attention(model)
    assert torch.equal(model.encode_image(images), expected)
    before, after = backbone.model.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    if kind == "RN50":
        split_attention(model)
        model.visual.attnpool.c_proj = nn.Sequential(model.visual.attnpool.c_proj)
        with pytest.raises(BackboneError, match="c_proj is a Sequential: merge or remove"):
            fuse_attention(model)
