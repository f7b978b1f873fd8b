# SPDX-License-Identifier: Apache-2.0
"""Every method learns and predicts on a device that has no float64 (Apple's GPUs), here a pretended one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_float64 import DEVICE, OnDevice, pretended_device, put
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.methods import GDA, CoCoOp, CoOp, LinearProbe, LoRA, SSText, TipAdapter, TwoStage
from adaptclip.methods.base import ClassBias
from adaptclip.methods.prompt_reading import read_prompt
from adaptclip.training.mitigation import GroupDRO
from adaptclip.types import Batch, Features

NAMES = ("rose", "dog", "cat")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
FEATURES = F.normalize(torch.randn(6, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))

LEARNT: dict[str, Any] = {
    "coop": lambda b: CoOp(b, NAMES, n_ctx=2),
    "coop, sigmoid": lambda b: CoOp(b, NAMES, n_ctx=2, objective="sigmoid"),
    "coop, kgcoop": lambda b: CoOp(b, NAMES, ctx_init="a photo of a", kg_weight=8.0),
    "cocoop": lambda b: CoCoOp(b, NAMES, n_ctx=2),
    "lora": lambda b: LoRA(b, NAMES),
    "lora, dora": lambda b: LoRA(b, NAMES, dora=True, dropout=0.0),
    "two_stage": lambda b: TwoStage(b, NAMES),
}
FITTED: dict[str, Any] = {
    "tip_adapter": lambda b: TipAdapter(b, NAMES),
    "gda": lambda b: GDA(b, NAMES),
    "ss_text": lambda b: SSText(b, NAMES),
    "logistic": lambda b: LinearProbe(b, NAMES, head="logistic"),
    "lp_plus_plus": lambda b: LinearProbe(b, NAMES, head="lp_plus_plus"),
    "clap": lambda b: LinearProbe(b, NAMES, head="clap"),
}


def features(backbone: Any) -> Features:
    return Features(FEATURES[None], LABELS, tuple("abcdef"), backbone.image_digest)


def test_the_pretended_device_refuses_float64():
    with pretended_device() as mode:
        x = torch.ones(3).to(DEVICE)
        for make in (x.double, lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE), lambda: x.to(torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert isinstance(x, OnDevice)
        assert (x.cpu().double() + 1).sum() == 6
        with pytest.raises(RuntimeError, match="and on the CPU"):
            _ = x + torch.ones(3)
        assert mode.operations >= 4


@pytest.mark.parametrize("name", LEARNT)
def test_a_method_that_learns_in_a_loop(name):
    backbone = put(make_tiny_backbone())
    with pretended_device() as mode:
        adapter = put(LEARNT[name](backbone))
        adapter.train()
        batch = Batch(labels=LABELS, index=torch.arange(6), images=IMAGES, features=FEATURES).to(DEVICE)
        loss = F.cross_entropy(adapter(batch), batch.labels) + adapter.penalty()
        loss.backward()
        learnt = [p for p in adapter.trainable_parameters() if p.requires_grad]
        assert learnt
        assert any(p.grad is not None and bool(p.grad.cpu().any()) for p in learnt)
        adapter.eval()
        with torch.no_grad():
            assert torch.isfinite(adapter(batch)).all()
        if isinstance(adapter, CoOp | CoCoOp):
            assert read_prompt(adapter)
    assert mode.operations > 100


@pytest.mark.parametrize("name", FITTED)
def test_a_method_that_is_fitted(name):
    backbone = put(make_tiny_backbone())
    with pretended_device() as mode:
        adapter = put(FITTED[name](backbone))
        adapter.fit_features(features(backbone), **({"c": 10.0} if name == "logistic" else {}))
        put(adapter)
        batch = Batch(labels=LABELS, index=torch.arange(6), features=FEATURES).to(DEVICE)
        adapter.eval()
        with torch.no_grad():
            assert torch.isfinite(adapter(batch)).all()
    assert mode.operations > 5


def test_what_training_keeps_in_float64():
    backbone = put(make_tiny_backbone())
    with pretended_device():
        bias = put(ClassBias(backbone, 3))
        bias.begin(features(backbone), FEATURES[:3].to(DEVICE), torch.tensor(10.0).to(DEVICE))
        assert isinstance(bias(), OnDevice)
        dro = GroupDRO(torch.tensor([0, 1, 0, 1, -1, 0]))
        weights = dro.weigh(torch.rand(6).to(DEVICE), torch.arange(6).to(DEVICE))
        assert isinstance(weights, OnDevice)
