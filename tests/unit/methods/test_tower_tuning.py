# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and BitFit tuning: what is tuned, that it starts as zero-shot, learns, and merges into a stock model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch import nn
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ArtifactError, ConfigError, DataError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.tower_tuning import TowerTuning, tuned_names
from adaptclip.methods.two_stage import TwoStage
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")
KINDS = ("layernorm", "bitfit")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def pictures(count: int = 6) -> Batch:
    labels = torch.arange(count) % len(NAMES)
    return Batch(labels, labels, images=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def trained(backbone, steps: int = 3, **settings) -> TowerTuning:
    adapter = TowerTuning(backbone, NAMES, templates=TEMPLATES, **settings)
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-2)
    batch = pictures() if adapter.consumes == "pixels" else features_of(backbone)
    adapter.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()
    return adapter.eval()


def features_of(encoder) -> Batch:
    batch = pictures()
    with torch.no_grad():
        return Batch(batch.labels, batch.index, features=encoder.encode_image(batch.images))


def test_the_numbers_that_are_tuned(backbone):
    norms = tuned_names(backbone.model, "layernorm", "both")
    # Of each block two, ln_pre and ln_post of the image tower, ln_final of the text tower.
    blocks = len(backbone.model.visual.transformer.resblocks) + len(backbone.model.transformer.resblocks)
    assert len(norms) == 2 * (2 * blocks + 3)
    assert all(".ln_" in f".{name}" and name.rpartition(".")[2] in ("weight", "bias") for name in norms)
    biases = tuned_names(backbone.model, "bitfit", "both")
    assert {name for name in norms if name.endswith("bias")} < set(biases)
    # Beside those, of each block out_proj, c_fc and c_proj; the fused in_proj_bias is left out, as published.
    assert len(biases) == 2 * blocks + 3 + 3 * blocks
    assert not any("in_proj" in name for name in biases)
    for tune in KINDS:
        image, text = (set(tuned_names(backbone.model, tune, tower)) for tower in ("image", "text"))
        assert image | text == set(tuned_names(backbone.model, tune, "both"))
        assert not image & text
        assert all(name.startswith("visual.") for name in image)


def test_a_tower_without_layernorms_has_its_batchnorms_tuned():
    model = make_kind("RN50").model
    names = tuned_names(model, "layernorm", "image")
    assert names
    assert all(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d) for name in names)
    assert all("ln_" in name for name in tuned_names(model, "layernorm", "text"))


@pytest.mark.parametrize("tune", KINDS)
@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_it_starts_as_zero_shot_and_only_the_chosen_numbers_learn(backbone, tune, towers):
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = TowerTuning(backbone, NAMES, tune=tune, towers=towers, templates=TEMPLATES)
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    with torch.no_grad():
        torch.testing.assert_close(adapter(features_of(backbone)), zero_shot(features_of(backbone)), atol=1e-4, rtol=0)
    assert adapter.consumes == ("features" if towers == "text" else "pixels")
    adapter.train()
    batch = pictures() if towers != "text" else features_of(backbone)
    loss = F.cross_entropy(adapter(batch), batch.labels)
    loss.backward()
    learning = [name for name, p in adapter.model.named_parameters() if p.requires_grad]
    assert learning == [
        n for n, _ in adapter.model.named_parameters() if n in tuned_names(backbone.model, tune, towers)
    ]
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapter.trainable_parameters())
    found = trained(backbone, tune=tune, towers=towers)
    after = F.cross_entropy(found(batch if towers == "text" else pictures()), batch.labels)
    assert after < loss
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())


@pytest.mark.parametrize("tune", KINDS)
def test_the_gradient_is_that_of_stock_open_clip(backbone, tune):
    """Packed prompts and shared prefixes against whole prompts by the stock model with the same numbers."""
    adapter = trained(backbone, tune=tune)
    stock: Any = adapter.merged_model()
    names = tuned_names(stock, tune, "both")
    parameters = [stock.get_parameter(name).requires_grad_(True) for name in names]
    batch = pictures()
    tokens = backbone.tokenize([t.replace("{}", n.replace("_", " ")) for n in NAMES for t in TEMPLATES])
    text = F.normalize(F.normalize(stock.encode_text(tokens), dim=-1).unflatten(0, (3, 2)).mean(1), dim=-1)
    logits = float(backbone.logit_scale) * F.normalize(stock.encode_image(batch.images), dim=-1) @ text.T
    expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels), parameters)
    adapter.train()
    own = adapter(batch)
    got = torch.autograd.grad(F.cross_entropy(own, batch.labels), adapter.trainable_parameters())
    torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-5)
    for name, one, other in zip(names, got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tune", KINDS)
def test_merged_reloaded_and_live_are_the_same(backbone, tune):
    adapter = trained(backbone, tune=tune)
    batch = features_of(adapter.encoder)
    again = TowerTuning(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    before = again.encoder.digest
    again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
    assert again.encoder.digest == adapter.encoder.digest != before
    with torch.no_grad():
        assert torch.equal(again(batch), adapter(batch))
        stock: Any = adapter.merged_model()
        merged = F.normalize(stock.encode_image(pictures().images), dim=-1)
    torch.testing.assert_close(merged, batch.features, atol=1e-5, rtol=0)
    state = dict(adapter.adapter_state())
    state.pop(next(iter(state)))
    with pytest.raises(ArtifactError, match=f"towers tuned by {tune} should hold"):
        again.load_adapter_state(state)


def test_two_stage_takes_any_first_stage_and_layernorms_by_default(backbone):
    assert TwoStage(backbone, NAMES).settings == {
        "tune": "layernorm", "towers": "both", "templates": ["a photo of a {}."]
    }  # fmt: skip
    for first in (trained(backbone, tune="bitfit"), trained(backbone, tune="layernorm", towers="text")):
        adapter = TwoStage(backbone, NAMES, first=first)
        batch = features_of(adapter.encoder)
        with torch.no_grad():
            torch.testing.assert_close(adapter(batch), first(batch), atol=1e-4, rtol=0)
        again = TwoStage(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
        again.load_adapter_state(adapter.adapter_state())
        assert again.encoder.digest == adapter.encoder.digest
    for settings, message in (
        ({"tune": "layernorms"}, 'Did you mean "layernorm"'),
        ({"rank": 4}, "layernorm has no rank: these belong to lora"),
        ({"tune": "bitfit", "towers": "all"}, "no towers 'all'"),
        ({"tune": "lora", "first": first}, "brings its own settings, got tune beside it"),
    ):
        with pytest.raises(ConfigError, match=message):
            TwoStage(backbone, NAMES, **settings)  # pyright: ignore[reportArgumentType]


def test_wrong_input(backbone):
    with pytest.raises(ConfigError, match='Did you mean "bitfit"'):
        TowerTuning(backbone, NAMES, tune="bit-fit")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="in fp32, got bf16"):
        TowerTuning(make_tiny_backbone(precision="bf16"), NAMES)
    adapter = TowerTuning(backbone, NAMES).train()
    with pytest.raises(DataError, match="learns from pixels"):
        adapter(features_of(backbone))


def test_the_tuned_towers_see_pictures_as_the_backbone_does(backbone):
    from torchvision import transforms

    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize([0.1] * 3, [0.7] * 3)]
    wrapped = ac.wrap_clip(backbone.model, backbone.tokenizer, transforms.Compose(steps))
    assert wrapped.transform_spec != backbone.transform_spec
    assert TowerTuning(wrapped, NAMES).encoder.transform_spec == wrapped.transform_spec
