# SPDX-License-Identifier: Apache-2.0
"""ProLIP: the projection alone learns, on features before it, by the published formula, and the result is a CLIP."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.prolip import ProLIP, projection_of
from adaptclip.types import Batch, Features

NAMES = ("red fox", "blue_whale", "daisy")
KINDS = {
    "ViT-B-16": "visual.proj",
    "coca_ViT-B-32": "visual.proj",
    "RN50": "visual.attnpool.c_proj.weight",
    "BiomedCLIP": "visual.head.proj.weight",
    "EVA02-B-16": "visual.trunk.head.weight",
    "MobileCLIP-S1": "visual.trunk.head.fc.weight",
}
"""Kind of tower -> its projection; RN50, EVA02 and MobileCLIP have a bias beside it."""


@pytest.fixture(scope="module", params=KINDS)
def backbone(request):
    return make_kind(request.param)


def pictures(backbone, count: int = 6) -> Any:
    labels, side = torch.arange(count) % len(NAMES), backbone.image_size
    return Batch(labels, labels, images=torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)))


def features_of(encoder) -> Batch:
    batch = pictures(encoder)
    with torch.no_grad():
        return Batch(batch.labels, batch.index, features=encoder.encode_image(batch.images))


class GivenSupport(ac.Support):
    """A support set whose features before the projection are given."""

    given: Features

    def features(self, views: int = 0, *, min_scale: float = 0.0, encoder: Any = None) -> Features:
        assert (views, min_scale, encoder.embed_dim) == (len(self.given.values), 0.5, self.given.values.shape[-1])
        return self.given


def given_support(backbone, rows: Features | None = None) -> GivenSupport:
    none: Any = None
    support = GivenSupport(backbone, none, none, accelerator=ac.make_accelerator("no", 1, cpu=True), shots=2)
    if rows is not None:
        support.given = rows
    return support


def test_features_before_the_projection_give_the_model_s_own(backbone, request):
    adapter = ProLIP(backbone, NAMES)
    assert projection_of(backbone) == KINDS[request.node.callspec.params["backbone"]]
    opened = adapter.before_projection()
    assert opened.embed_dim == opened.encode_image(pictures(backbone).images).shape[1]
    assert opened.image_digest != backbone.image_digest
    with torch.no_grad():
        expected = ZeroShotClassifier(backbone, NAMES)(features_of(backbone))
        torch.testing.assert_close(adapter(features_of(backbone)), expected, atol=1e-5, rtol=0)
        adapter.train()
        torch.testing.assert_close(adapter(features_of(opened)), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(adapter(pictures(backbone)), expected, atol=1e-4, rtol=0)
    assert float(adapter.penalty()) == 0


def test_learning_is_the_published_formula(backbone):
    """torch's Adam and cosine on raw features of any norm, with the bias beside them: written anew, step by step."""
    draws, steps, views = torch.Generator().manual_seed(1), 7, 3
    adapter = ProLIP(backbone, NAMES)
    state = backbone.model.state_dict()
    name = projection_of(backbone)
    start = state[name] if name.endswith(".weight") else state[name].T  # (D, T)
    bias = state.get(name.replace("weight", "bias")) if name.endswith(".weight") else None
    raw = torch.randn(views, 6, start.shape[1], generator=draws)
    seen = raw if bias is None else F.pad(raw, (0, 1), value=1.0)
    labels = torch.arange(6) % 3
    rows = Features(F.normalize(seen, dim=-1), labels, tuple("abcdef"))
    support = given_support(backbone, rows)
    info = adapter.learn(support, adapter.schedule(2, epochs=steps, views=views, lr=1e-2))

    weight = start.clone().requires_grad_(True)
    text = ZeroShotClassifier(backbone, NAMES).class_weights()
    optimizer = torch.optim.Adam([weight], lr=1e-2, eps=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        features = F.normalize(F.linear(raw[step % views], weight, bias), dim=-1)
        logits = float(backbone.logit_scale) * features @ text.T
        loss = F.cross_entropy(logits, labels) + 0.5 * (weight - start).square().sum()
        loss.backward()
        optimizer.step()
        cosine.step()
    learnt = adapter.weight if name.endswith(".weight") else adapter.weight.T
    assert (learnt - start).abs().max() > 1e-2
    torch.testing.assert_close(learnt, weight, atol=1e-4, rtol=0)
    assert info["trainable_parameters"] == weight.numel()
    assert float(adapter.penalty()) == 0


def test_merged_reloaded_and_live_are_the_same(backbone):
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = ProLIP(backbone, NAMES)
    with torch.no_grad():
        adapter.weight.add_(torch.randn(adapter.weight.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
    batch = features_of(adapter.encoder)
    again = ProLIP(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
    assert again.encoder.digest == adapter.encoder.digest
    with torch.no_grad():
        assert torch.equal(again(batch), adapter(batch))
        live = adapter.train()(features_of(adapter.before_projection()))
        torch.testing.assert_close(live, again(batch), atol=1e-4, rtol=0)
        stock: Any = adapter.merged_model()
        merged = F.normalize(stock.encode_image(pictures(backbone).images), dim=-1)
    torch.testing.assert_close(merged, batch.features, atol=1e-5, rtol=0)
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())
    with pytest.raises(ArtifactError, match="ProLIP should hold"):
        again.load_adapter_state({"weight": adapter.weight})


def test_published_settings():
    adapter = ProLIP(make_tiny_backbone(), NAMES)
    assert [adapter.schedule(k, images_per_class=20).pull for k in (1, 4, 16, 0)] == [1, 0.25, 1 / 16, 1 / 20]
    assert (adapter.schedule(4).epochs, adapter.schedule(4).lr) == (300, 1e-5)


def test_what_does_not_go():
    with pytest.raises(BackboneError, match="ends in no single projection matrix"):
        ProLIP(make_kind("ViT-B-16-SigLIP"), NAMES)
    with pytest.raises(ConfigError, match="in fp32, got bf16"):
        ProLIP(make_tiny_backbone(precision="bf16"), NAMES)
    with pytest.raises(BackboneError, match="towers"):
        ProLIP(ac.FeatureClip(torch.eye(3)), NAMES)  # pyright: ignore[reportArgumentType]
    tiny = make_tiny_backbone()
    adapter = ProLIP(tiny, NAMES)
    with pytest.raises(ConfigError, match="pull must be"):
        adapter.learn(given_support(tiny), adapter.schedule(2, pull=-1.0))
    with pytest.raises(DataError, match="should be"):
        adapter.train()(Batch(torch.zeros(1), torch.zeros(1), features=torch.zeros(1, 3)))
