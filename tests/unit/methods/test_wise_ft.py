# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT: fine-tuning by the published formula, and the straight line back to zero-shot."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ArtifactError, ConfigError, DataError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.wise_ft import WiseFT
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def pictures(count: int = 6, seed: int = 0) -> Any:
    labels = torch.arange(count) % len(NAMES)
    return Batch(labels, labels, images=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


class Loader:
    """Images of a step's own."""

    steps_per_epoch = 2

    def batch(self, micro_step: int) -> Batch:
        return pictures(seed=micro_step)


class GivenSupport(ac.Support):
    """A support set that gives these images."""

    def loader(self, features: Any = None, *, batch_size: int, views: int = 0) -> Any:
        assert (features, batch_size, views) == (None, 512, 0)
        return Loader()


def tuned(backbone, **settings) -> WiseFT:
    none: Any = None
    adapter = WiseFT(backbone, NAMES, templates=TEMPLATES, **settings)
    accelerator = ac.make_accelerator("no", 1, cpu=True)
    support = GivenSupport(backbone, none, none, accelerator=accelerator, shots=2)
    adapter.learn(support, adapter.schedule(2, epochs=5, lr=1e-3))
    return adapter


def test_fine_tuning_and_the_line_back_are_the_published_ones(backbone):
    adapter = tuned(backbone, alpha=0.3)
    start = backbone.model.state_dict()
    model: Any = make_tiny_backbone().model
    text = ZeroShotClassifier(backbone, NAMES, TEMPLATES).class_weights()
    scale, steps = float(backbone.logit_scale), 10
    weight = (scale * text).clone().requires_grad_(True)
    bias = torch.zeros(3, requires_grad=True)
    learnt = [*model.visual.requires_grad_(True).parameters(), weight, bias]
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, weight_decay=0.1)
    for step in range(steps):  # two warm steps, a cosine over the other eight
        rate = (step + 1) / 2 if step < 2 else (1 + float(torch.cos(torch.tensor(torch.pi * (step - 2) / 8)))) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.zero_grad()
        batch = pictures(seed=step)
        logits = F.normalize(model.encode_image(batch.images), dim=-1) @ weight.T + bias
        F.cross_entropy(logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
    state = adapter.adapter_state()
    theirs = {**{f"visual.{name}": p for name, p in model.visual.named_parameters()}, "head_weight": weight}
    for name, value in theirs.items():
        apart = (state[name] - value.detach()).abs()
        if name.endswith("in_proj_bias"):
            apart = apart.view(3, -1)[::2]  # the biases of keys change nothing, so that their gradients are rounding
        assert float(apart.max()) < 2e-4, name
    merged: Any = adapter.merged_model()
    for name, value in merged.state_dict().items():
        expected = start[name] if name not in state else 0.7 * start[name] + 0.3 * state[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    head = adapter.head()
    torch.testing.assert_close(head.weight, 0.7 * scale * text + 0.3 * state["head_weight"], atol=1e-4, rtol=0)
    torch.testing.assert_close(head.bias, 0.3 * state["head_bias"])
    with torch.no_grad():
        features = F.normalize(merged.encode_image(pictures().images), dim=-1)
        torch.testing.assert_close(adapter(pictures()), head.logits(features), atol=1e-4, rtol=0)
    assert all(torch.equal(start[name], value) for name, value in make_tiny_backbone().model.state_dict().items())


def test_it_is_zero_shot_before_training_and_at_alpha_0(backbone):
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    untrained, back = WiseFT(backbone, NAMES, templates=TEMPLATES), tuned(backbone, alpha=0.0)
    whole = tuned(backbone, alpha=1.0)
    with torch.no_grad():
        batch = Batch(torch.zeros(6), torch.zeros(6), features=backbone.encode_image(pictures().images))
        expected = zero_shot(batch)
        for adapter in (untrained, back):
            torch.testing.assert_close(adapter.eval()(pictures()), expected, atol=1e-5, rtol=0)
        assert (whole(pictures()) - expected).abs().max() > 0.1
        torch.testing.assert_close(whole.train()(pictures()), whole.eval()(pictures()), atol=1e-4, rtol=0)


def test_reloaded_and_live_are_the_same(backbone):
    adapter = tuned(backbone)
    again = WiseFT(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
    assert again.encoder.digest == adapter.encoder.digest != backbone.digest
    with torch.no_grad():
        assert torch.equal(again.eval()(pictures()), adapter(pictures()))
    with pytest.raises(ArtifactError, match="WiSE-FT should hold"):
        again.load_adapter_state({"head_weight": adapter.head_weight})


def test_what_does_not_go(backbone):
    with pytest.raises(ConfigError, match="alpha goes from 0"):
        WiseFT(backbone, NAMES, alpha=1.5)
    with pytest.raises(ConfigError, match="in fp32, got bf16"):
        WiseFT(make_tiny_backbone(precision="bf16"), NAMES)
    with pytest.raises(ConfigError, match="cannot name new classes"):
        WiseFT(backbone, NAMES).for_classes(["heron"])
    with pytest.raises(DataError, match="learns from pixels"):
        WiseFT(backbone, NAMES).train()(Batch(torch.zeros(1), torch.zeros(1), features=torch.zeros(1, 48)))
