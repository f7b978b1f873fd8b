# SPDX-License-Identifier: Apache-2.0
"""LoRA: identities with zero-shot, with stock open_clip and with PEFT; gradients; targets; the dial."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import open_clip
import peft
import pytest
import torch
from tiny_clip import make_tiny_backbone, tiny_config
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.clip import ClipBackbone
from adaptclip.clip.attention import share_weights, split_attention
from adaptclip.clip.lora_targets import find_targets
from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError
from adaptclip.methods.lora import LoRA, inject_lora, lora_layers, lora_parameters, merge_lora, read_peft, save_peft
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.types import Batch

NAMES = ("red fox", "blue whale", "daisy", "a class with a rather long name")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request) -> ClipBackbone:
    return make_tiny_backbone(request.param)


@pytest.fixture(scope="module")
def clip() -> ClipBackbone:
    return make_tiny_backbone()


def pixels(backbone: ClipBackbone, count: int = 5, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side = backbone.image_size
    images = torch.randn(count, 3, side, side, generator=generator)
    return Batch(labels=torch.arange(count) % len(NAMES), index=torch.arange(count), images=images)


def features(backbone: ClipBackbone, batch: Batch) -> Batch:
    assert batch.images is not None
    with torch.no_grad():
        return Batch(labels=batch.labels, index=batch.index, features=backbone.encode_image(batch.images))


def input_of(adapter: LoRA, batch: Batch) -> Batch:
    return batch if adapter.adapts_image else features(adapter.backbone, batch)


def train(adapter: LoRA, batch: Batch, steps: int = 3, lr: float = 5e-2) -> None:
    adapter.train()
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=lr)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(adapter(input_of(adapter, batch)), batch.labels).backward()
        optimizer.step()
    adapter.eval()


def judge(adapter: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return adapter(batch)


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
@pytest.mark.parametrize("towers", ["image", "text", "both"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_identities(backbone, towers, dora, templates):
    """Starts as zero-shot; scale 0 = zero-shot and 1 = adapted; merged = unmerged, loaded strictly by open_clip."""
    adapter, batch = LoRA(backbone, NAMES, towers=towers, dora=dora, templates=templates), pixels(backbone)
    zero_shot = judge(ZeroShotClassifier(backbone, NAMES, templates), features(backbone, batch))
    own = input_of(adapter, batch)
    assert torch.allclose(judge(adapter, own), zero_shot, atol=1e-5)
    train(adapter, batch)
    adapted = judge(adapter, own)
    assert (adapted - zero_shot).abs().max() > 1e-2
    adapter.set_scale(0)
    assert torch.allclose(judge(adapter, own), zero_shot, atol=1e-5)
    adapter.set_scale(1)
    assert torch.equal(judge(adapter, own), adapted)

    for scale in (1.0, 0.3):
        adapter.set_scale(scale)
        merged = adapter.merged_model()
        stock = open_clip.CustomTextCLIP if isinstance(merged, open_clip.CustomTextCLIP) else open_clip.CLIP
        fresh = stock(**{k: v for k, v in tiny_config().items() if k != "custom_text"}).eval()
        fresh.load_state_dict(merged.state_dict(), strict=True)
        again = ClipBackbone(fresh, backbone.tokenizer, name="merged")
        got = judge(ZeroShotClassifier(again, NAMES, templates), features(again, batch))
        assert torch.allclose(got, judge(adapter, own), atol=1e-5)


def test_the_backbone_is_never_changed(clip):
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    adapter = LoRA(clip, NAMES)
    train(adapter, pixels(clip))
    adapter.merged_model()
    after = clip.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    frozen = {p.untyped_storage().data_ptr() for p in clip.model.parameters()}
    learnt = {p.untyped_storage().data_ptr() for p in adapter.trainable_parameters()}
    held = {p.untyped_storage().data_ptr() for p in adapter.model.parameters()}
    assert held == frozen | learnt  # no second copy of the frozen weights


def test_published_setting_has_184_320_parameters():
    """CLIP-LoRA's default on ViT-B/16: 12 blocks x 3 projections x 2 (768 + 768) and x 2 (512 + 512)."""
    config = open_clip.get_model_config("ViT-B-16")
    assert config is not None
    model = open_clip.CLIP(**config).requires_grad_(False)
    adapted = inject_lora(model)
    assert len(list(lora_layers(adapted))) == 72
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 184_320
    for _, layer in lora_layers(adapted):
        assert layer.scaling["default"] == pytest.approx(1 / 2**0.5)
        assert layer.lora_dropout["default"].p == 0.25
        assert not layer.lora_B["default"].weight.any()
        bound = 1 / layer.in_features**0.5  # Kaiming uniform with a = sqrt(5)
        assert 0.9 * bound < layer.lora_A["default"].weight.abs().max() <= bound


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"rslora": False, "rank": 4, "alpha": 8.0}, {"dropout": 0.0}])
@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_every_trainable_tensor_gets_a_gradient(backbone, towers, settings):
    adapter, batch = LoRA(backbone, NAMES, towers=towers, **settings), pixels(backbone)
    train(adapter, batch, steps=1)  # B is zero at first, so A gets a gradient only from the second step on
    assert without_gradient(adapter, batch) == []
    names = [name for name, p in adapter.named_parameters() if p.requires_grad]
    per_layer = 3 if settings.get("dora") else 2
    assert len(names) == (12 if towers == "both" else 6) * per_layer


def without_gradient(adapter: LoRA, batch: Batch) -> list[str]:
    adapter.train()
    adapter.zero_grad()
    F.cross_entropy(adapter(input_of(adapter, batch)), batch.labels).backward()
    learning = [(name, p) for name, p in adapter.named_parameters() if p.requires_grad]
    return [name for name, p in learning if p.grad is None or not p.grad.any()]


def test_the_gradient_guard_sees_a_tensor_without_one(clip):
    """What PEFT does on unsplit attention: an adapter that the computation never reaches."""
    adapter = LoRA(clip, NAMES, dropout=0.0)
    train(adapter, pixels(clip), steps=1)
    block = adapter.model.visual.transformer.resblocks[0]
    reached = block.attn.q_proj
    block.attn.q_proj = reached.get_base_layer()
    adapter.unreached = reached
    missing = without_gradient(adapter, pixels(clip))
    assert missing == ["unreached.lora_A.default.weight", "unreached.lora_B.default.weight"]


def test_starter_tower_of_convolutions():
    """Its image tower has no attention: 1x1 convolutions learn, batch statistics stay."""
    starter = ac.load_backbone("starter")
    adapter, batch = LoRA(starter, NAMES), pixels(starter, 2)
    kinds = {type(layer.get_base_layer()).__name__ for name, layer in lora_layers(adapter.model) if "visual" in name}
    assert kinds == {"Conv2d"}
    statistics = {name: b.clone() for name, b in adapter.model.visual.named_buffers()}
    train(adapter, batch, steps=2)
    assert without_gradient(adapter, batch) == []
    assert all(torch.equal(b, statistics[name]) for name, b in adapter.model.visual.named_buffers())
    assert len(statistics) > 100
    adapter.eval()
    merged = ClipBackbone(adapter.merged_model(), starter.tokenizer, name="merged")
    got = judge(ZeroShotClassifier(merged, NAMES), features(merged, batch))
    assert torch.allclose(got, judge(adapter, batch), atol=5e-5)


def test_dropout_is_active_in_training_alone(clip):
    adapter, batch = LoRA(clip, NAMES, dropout=0.5), pixels(clip)
    train(adapter, batch)
    assert torch.equal(judge(adapter, batch), judge(adapter, batch))
    adapter.train()
    with torch.enable_grad():
        first, second = adapter(batch), adapter(batch)
    assert (first - second).abs().max() > 1e-4
    modules = {name for name, module in adapter.model.named_modules() if module.training}
    assert modules
    assert all(
        ".lora_dropout" in name or ".lora_magnitude" in name for name in modules
    )  # the towers themselves stay in evaluation mode


def test_dropout_differs_between_classes(clip):
    """Two classes of the same name are the same text: shared draws would give them the same feature."""
    adapter = LoRA(clip, ("fox", "whale", "fox", "whale"), towers="text", dropout=0.5)
    train(adapter, pixels(clip))
    adapter.train()
    text = adapter.text_features()
    assert (text[0] - text[2]).abs().max() > 1e-4
    adapter.eval()
    assert torch.allclose(adapter.text_features()[0], adapter.text_features()[2], atol=1e-6)


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
def test_fast_text_path_is_exact(backbone, templates):
    """Prefix shared, prompts cut at EOT, in chunks: features and gradients of whole prompts."""
    results = []
    trained = LoRA(backbone, NAMES)
    train(trained, pixels(backbone))
    ways: list[dict[str, Any]] = [{"fast": False}, {"fast": True}, {"memory_budget_bytes": 1}]
    for settings in ways:
        adapter = LoRA(backbone, NAMES, templates=templates, dropout=0.0, **settings)
        adapter.load_adapter_state(trained.adapter_state())
        adapter.train()
        text = adapter.text_features()
        F.cross_entropy(adapter(pixels(backbone)), torch.arange(5) % 4).backward()
        results.append((text.detach(), [p.grad for p in adapter.trainable_parameters()]))
    for text, gradients in results[1:]:
        assert torch.allclose(text, results[0][0], atol=1e-5)
        assert len(gradients) == 24
        for got, wanted in zip(gradients, results[0][1], strict=True):
            assert got is not None
            assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


def test_chunks_draw_the_same_dropout_twice(clip):
    """Beyond the memory budget a chunk is computed again in the backward pass; the gradient must be the slope."""
    adapter = LoRA(clip, NAMES, towers="text", dropout=0.5, memory_budget_bytes=1)
    train(adapter, pixels(clip), steps=1)
    adapter.train()
    direction = torch.randn(len(NAMES), 48, generator=torch.Generator().manual_seed(1))
    parameter = adapter.trainable_parameters()[1]

    def value() -> torch.Tensor:
        torch.manual_seed(7)
        return (adapter.text_features() * direction).sum()

    (gradient,) = torch.autograd.grad(value(), parameter)
    move, ends = 1e-2 * gradient / gradient.norm(), []
    with torch.no_grad():
        for step in (move, -2 * move):
            parameter += step
            ends.append(float(value()))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_it_is_a_peft_adapter(clip, tmp_path):
    for dora in (False, True):
        adapter, batch = LoRA(clip, NAMES, dora=dora), pixels(clip)
        train(adapter, batch)
        folder = tmp_path / str(dora)
        files = save_peft(adapter.model, folder, base="tiny")
        assert sorted(f.name for f in files) == ["adapter_config.json", "adapter_model.safetensors"]
        split = copy.deepcopy(clip.model)
        split_attention(split)
        loaded: Any = peft.PeftModel.from_pretrained(split, str(folder)).base_model.model
        assert torch.allclose(loaded.encode_image(batch.images), adapter.model.encode_image(batch.images), atol=1e-6)
        state = read_peft(folder, adapter.model)
        assert {name: p.shape for name, p in state.items()} == {
            name: p.shape for name, p in lora_parameters(adapter.model).items()
        }
        other = LoRA(clip, NAMES, dora=dora, seed=9)
        other.load_adapter(folder)
        assert torch.equal(judge(other, batch), judge(adapter, batch))


def test_settings_build_the_same_adapter_again(clip):
    adapter = LoRA(
        clip, NAMES, rank=3, projections=("q", "mlp"), blocks="top-1", templates=TEMPLATES, seed=4, scale=0.5
    )
    train(adapter, pixels(clip))
    again = LoRA(clip, NAMES, **adapter.settings)
    again.load_adapter_state(adapter.adapter_state())
    assert torch.equal(judge(again, pixels(clip)), judge(adapter, pixels(clip)))
    with pytest.raises(ArtifactError, match="should hold"):
        LoRA(clip, NAMES).load_adapter_state(adapter.adapter_state())


def test_the_seed_decides_the_start(clip):
    first, same, other = (LoRA(clip, NAMES, seed=s).adapter_state() for s in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_encoder_is_a_frozen_snapshot(clip):
    adapter, batch = LoRA(clip, NAMES), pixels(clip)
    assert batch.images is not None
    adapter.train()
    before = adapter.encoder
    assert adapter.encoder is before  # nothing changed: not copied again
    assert adapter.training
    train(adapter, batch)
    after = adapter.encoder
    assert len({clip.digest, before.digest, after.digest}) == 3
    assert len({clip.image_digest, before.image_digest, after.image_digest}) == 3
    assert not any(p.requires_grad for p in after.parameters())
    assert torch.allclose(before.encode_image(batch.images), clip.encode_image(batch.images), atol=1e-5)
    made = Batch(labels=batch.labels, index=batch.index, features=after.encode_image(batch.images))
    assert torch.equal(judge(adapter, made), judge(adapter, batch))


def test_gradient_checkpointing_gives_the_same_gradients(clip):
    gradients = []
    for checkpointing in (False, True):
        adapter = LoRA(clip, NAMES, checkpointing=checkpointing)
        train(adapter, pixels(clip), steps=2)
        gradients.append([p.detach().clone() for p in adapter.trainable_parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert len(gradients[0]) == 24


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_the_compiled_image_tower_gives_the_same_gradients(clip, monkeypatch):
    # Its helper processes would each load torch anew, which takes longer than to compile this tower.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    plain, compiled = (LoRA(clip, NAMES, towers="image", dropout=0.0, blocks="1") for _ in range(2))
    train(plain, pixels(clip), steps=1)
    compiled.load_adapter_state(plain.adapter_state())
    compiled.compile_image_tower()
    losses, gradients = [], []
    for adapter in (plain, compiled):
        adapter.train()
        losses.append(F.cross_entropy(adapter(pixels(clip)), pixels(clip).labels))
        gradients.append(torch.autograd.grad(losses[-1], adapter.trainable_parameters()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled, and not left as it is
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert len(gradients[1]) == 6
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_compilation_is_refused_where_it_cannot_be(clip, monkeypatch):
    with pytest.raises(BackboneError, match="no image tower to compile"):
        LoRA(clip, NAMES, towers="text").compile_image_tower()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackboneError, match=r"needs a C\+\+ compiler on a CPU, and none was found"):
        LoRA(clip, NAMES).compile_image_tower()


def test_a_tower_without_layers_to_adapt_is_named(clip):
    bare = share_weights(clip.model)
    bare.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ConfigError, match="the image tower of this model has no Linear layer or 1x1 convolution"):
        inject_lora(bare)


def test_bf16_autocast_trains_near_to_full_precision(clip):
    adapter, batch = LoRA(clip, NAMES, dropout=0.0), pixels(clip)
    adapter.train()
    full = adapter(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = adapter(batch)
    assert half.dtype == torch.float32
    assert torch.allclose(half, full, atol=0.2)
    F.cross_entropy(half, batch.labels).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.trainable_parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank of LoRA must be a whole number from 1 up, got 0"),
        ({"rank": 1.5}, "whole number"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"towers": "images"}, 'Did you mean "image"'),
        ({"projections": ("q", "qq")}, 'Did you mean "q"'),
        ({"projections": ("conv",)}, "no 1x1 convolutions"),
        ({"projections": ()}, "no layer of the image tower"),
        ({"targets": ("mlp.c_fcc",)}, 'Did you mean "mlp.c_fc"'),
        ({"blocks": "top-x"}, '"all", "top-4" or numbers'),
        ({"blocks": "2"}, "it has 2, numbered from 0"),
        ({"scale": 1.5}, "from 0 (zero-shot) to 1"),
    ],
)
def test_wrong_settings(clip, settings, words):
    with pytest.raises(ConfigError) as error:
        LoRA(clip, NAMES, **settings)
    assert words in str(error.value)


def test_wrong_batches(clip):
    adapter = LoRA(clip, NAMES)
    adapter.train()
    with pytest.raises(DataError, match="learns from pixels"):
        adapter(features(clip, pixels(clip)))
    with pytest.raises(BackboneError, match="merge or remove"):
        adapter.model.visual.transformer.resblocks[0].attn.fuse()
    with pytest.raises(BackboneError, match="tokens with its start"):
        LoRA(clip, ("very " * 90 + "long",))


@pytest.mark.parametrize(
    ("architecture", "settings", "count", "endings"),
    [
        ("ViT-B-32", {}, 72, {"q_proj", "k_proj", "v_proj"}),
        ("ViT-B-32", {"projections": ("out", "mlp"), "blocks": "top-2"}, 12, {"out_proj", "c_fc", "c_proj"}),
        ("ViT-B-32", {"towers": "image", "blocks": "0,11"}, 6, {"q_proj", "k_proj", "v_proj"}),
        ("ViT-B-32", {"targets": ("mlp.c_fc",)}, 24, {"c_fc"}),
        ("RN50", {"towers": "image", "projections": ("conv",)}, 36, {"conv1", "conv3", "0"}),
        ("EVA02-B-16", {"towers": "image"}, 36, {"q_proj", "k_proj", "v_proj"}),
        ("ViT-B-16-SigLIP", {"towers": "image"}, 14, {"qkv", "q", "kv"}),
        ("convnext_base", {"towers": "image"}, 73, {"fc1", "fc2", "proj"}),
    ],
)
def test_targets_of_real_architectures(architecture, settings, count, endings):
    with torch.device("meta"):
        config = open_clip.get_model_config(architecture)
        assert config is not None
        kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
        model = kind(**config)
    split_attention(model)
    names = find_targets(model, **settings)
    assert len(names) == len(set(names)) == count
    assert {name.rpartition(".")[2] for name in names} == endings


def test_fused_qkv_cannot_be_taken_apart():
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-B-16-SigLIP")
        assert config is not None
        config.pop("custom_text")
        model = open_clip.CustomTextCLIP(**config)
    with pytest.raises(ConfigError, match="k, q, v in one layer"):
        find_targets(model, "image", projections=("q", "v"))


def test_merging_leaves_the_adapted_model_alone(clip):
    adapted: Any = inject_lora(clip.model, dropout=0.0)
    for parameter in lora_parameters(adapted).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32)
    expected = adapted.encode_image(images)
    merged: Any = merge_lora(adapted)
    assert torch.allclose(merged.encode_image(images), expected, atol=1e-4)
    assert torch.equal(adapted.encode_image(images), expected)
    assert not hasattr(merged, "peft_config")


def test_features_of_an_image_tower_that_is_not_adapted_stay_valid(clip):
    adapter, batch = LoRA(clip, NAMES, towers="text"), pixels(clip)
    train(adapter, batch)
    assert adapter.encoder.digest != clip.digest
    assert adapter.encoder.image_digest == clip.image_digest
    assert batch.images is not None
    torch.testing.assert_close(
        adapter.encoder.encode_image(batch.images), clip.encode_image(batch.images), atol=1e-5, rtol=0
    )  # the attention is split, which rounds otherwise
    image = LoRA(clip, NAMES, towers="image")
    train(image, batch)
    assert image.encoder.image_digest != clip.image_digest
