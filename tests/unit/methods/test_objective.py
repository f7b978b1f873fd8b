# SPDX-License-Identifier: Apache-2.0
"""The sigmoid objective: its setting, its loss and gradients against other computations, its bias in every adapter."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import SigLipLoss
from tiny_clip import make_tiny_backbone
from torch import nn
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.methods import CoOp, LinearProbe, LoRA, TwoStage
from adaptclip.methods.base import ClassBias, matching_bias
from adaptclip.methods.linear_fits import cosine_gradient, fit_from_text, sigmoid_gradient
from adaptclip.methods.registry import methods
from adaptclip.training.criterion import Objective, parse_objective, sigmoid_losses
from adaptclip.training.mitigation import Mitigation
from adaptclip.training.support import Training
from adaptclip.types import Batch, Features

NAMES = ("rose", "lily of the valley", "red fox", "blue whale", "wombat")
MADE: dict[str, dict[str, Any]] = {
    "coop": {"n_ctx": 3},
    "linear_probe": {"head": "clap"},
    "lora": {"towers": "text", "dropout": 0.0},
}


@pytest.fixture(scope="module")
def clip() -> ClipBackbone:
    return make_tiny_backbone()


@pytest.fixture(scope="module")
def siglip() -> ClipBackbone:
    made = make_tiny_backbone()
    made.model.logit_bias = nn.Parameter(torch.tensor(-2.0), requires_grad=False)
    return made


def some_features(backbone: ClipBackbone, n: int = 40, seed: int = 0) -> Features:
    draw = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(1, n, backbone.embed_dim, generator=draw), dim=-1)
    return Features(rows, torch.arange(n) % len(NAMES), tuple(map(str, range(n))), backbone.image_digest)


def batch_of(features: Features) -> Batch:
    return Batch(labels=features.labels, index=torch.arange(len(features)), features=features.values[0])


def make(method: str, backbone: ClipBackbone, **more: Any) -> Any:
    return methods()[method](backbone, NAMES, **MADE[method], **more)


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        ("softmax", "softmax", None),
        ("sigmoid", "sigmoid", ("f1", 0.5)),
        (" sigmoid : f1", "sigmoid", ("f1", 0.5)),
        ("sigmoid:sensitivity=0.9", "sigmoid", ("sensitivity", 0.9)),
        ("sigmoid:0", "sigmoid", ("fixed", 0.0)),
        ("sigmoid:0.25", "sigmoid", ("fixed", 0.25)),
    ],
)
def test_the_setting(text, name, rule):
    found = parse_objective(text)
    assert found.name == name
    if rule:
        assert (found.thresholds.kind, found.thresholds.value) == rule
    assert parse_objective(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmod", 'Did you mean "sigmoid"'),
        ("", "unknown objective"),
        ("softmax:f1", "has no thresholds"),
        ("sigmoid:sensitivty=0.9", 'Did you mean "sensitivity"'),
        ("sigmoid:sensitivity", "needs a sensitivity above 0, up to 1, got none"),
        ("sigmoid:sensitivity=0", "above 0"),
        ("sigmoid:sensitivity=1.5", "up to 1"),
        ("sigmoid:1.5", "from 0 to 1"),
        ("sigmoid:-0.1", "from 0 to 1"),
        ("sigmoid:nan", "unknown rule"),
        ("sigmoid:f1=3", "unknown rule"),
    ],
)
def test_a_wrong_setting(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_objective(text)


def test_the_loss_is_siglips_with_classes_as_texts():
    draw = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 8, generator=draw, dtype=torch.float64), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    # With image i and text i a pair, the classes of the batch are its texts.
    expected = SigLipLoss()(images, texts, scale, bias)
    losses = sigmoid_losses(scale * images @ texts.T + bias, torch.arange(6))
    torch.testing.assert_close(losses.mean(), expected)
    logits = np.array([[2.0, -1.0, 0.0]])
    by_hand = -math.log(1 / (1 + math.exp(1.0))) + math.log(1 + math.exp(2.0)) + math.log(2)
    assert sigmoid_losses(torch.from_numpy(logits), torch.tensor([1]))[0].item() == pytest.approx(by_hand)


def test_weights_of_images_weigh_their_losses():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 3, generator=draw), torch.tensor([0, 2, 1, 1])
    batch = Batch(labels, torch.tensor([3, 0, 1, 2]))
    plain = Mitigation(objective="sigmoid")
    target = F.one_hot(labels, 3).float()
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 4
    torch.testing.assert_close(plain.loss(logits, batch), expected)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5])
    weighted = Mitigation(weights=weights, objective="sigmoid").loss(logits, batch)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    torch.testing.assert_close(weighted, (each * weights[batch.index]).mean())
    torch.testing.assert_close(Mitigation().loss(logits, batch), F.cross_entropy(logits, labels))


def test_the_gradient_by_hand_is_autograds():
    draw = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(9, 6, generator=draw, dtype=torch.float64), dim=-1)
    labels = torch.arange(9) % 4
    weight = torch.randn(4, 6, generator=draw, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, generator=draw, dtype=torch.float64).requires_grad_()
    factors = torch.rand(9, generator=draw, dtype=torch.float64)
    logits = 7.0 * features @ F.normalize(weight, dim=1).T + bias
    seen: list[torch.Tensor] = []

    def weigh(losses):
        seen.append(losses)
        return factors

    for given in (None, weigh):
        losses = sigmoid_losses(logits, labels)
        loss = losses.mean() if given is None else (factors * losses).mean()
        expected = torch.autograd.grad(loss, (weight, bias), retain_graph=True)
        found = sigmoid_gradient(features, labels, weight.detach(), bias.detach(), 7.0, given)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(seen[0], sigmoid_losses(logits, labels).detach())


def test_a_fit_lowers_the_loss_and_leaves_the_softmax_alone(clip):
    features = some_features(clip, 60)
    text = F.normalize(torch.randn(5, clip.embed_dim, generator=torch.Generator().manual_seed(2)), dim=-1)
    options: dict[str, Any] = {"penalty": None, "lr": 0.1, "epochs": 30, "batch_size": 20, "seed": 0, "start_norm": 1.0}
    bias = torch.full((5,), -2.0)
    weight = fit_from_text(features.values, features.labels, text, 10.0, bias=bias, **options)

    def loss(w, b):
        return sigmoid_losses(10.0 * features.values[0] @ F.normalize(w, dim=1).T + b, features.labels).mean().item()

    assert loss(weight, bias) < 0.7 * loss(text, torch.full((5,), -2.0))
    assert not torch.equal(bias, torch.full((5,), -2.0))
    plain = fit_from_text(features.values, features.labels, text, 10.0, **options)
    first = cosine_gradient(features.values[0, :20], features.labels[:20], text, 10.0)
    assert torch.isfinite(first).all()
    assert not torch.equal(plain, weight)


def test_the_start_makes_mean_probabilities_the_shares():
    draw = torch.Generator().manual_seed(3)
    logits = 30 * torch.randn(50, 6, generator=draw, dtype=torch.float64) + torch.arange(6) * 20
    positive = torch.rand(50, 6, generator=draw) < torch.tensor([0.1, 0.3, 0.5, 0.9, 0.0, 1.0])
    positive[:, 4], positive[:, 5] = False, True
    found = matching_bias(logits, positive)
    mean = torch.sigmoid(logits + found).mean(dim=0)
    expected = positive.double().mean(dim=0)
    expected[4], expected[5] = 0.01, 0.99
    torch.testing.assert_close(mean, expected)
    # Where it starts, the loss has no slope along the bias.
    bias = found.clone().requires_grad_()
    F.binary_cross_entropy_with_logits((logits + bias)[:, :4], positive[:, :4].double()).backward()
    assert bias.grad is not None
    assert bias.grad.abs().max() < 1e-9


def test_a_class_bias_starts_from_images_or_at_the_models_own(clip, siglip, monkeypatch):
    assert ClassBias(siglip, 5)().tolist() == [-2.0] * 5
    assert ClassBias(clip, 5)().tolist() == pytest.approx([-math.log(4)] * 5)
    assert ClassBias(clip, 1)().tolist() == [0.0]
    features, weights = some_features(clip), F.normalize(torch.randn(5, clip.embed_dim), dim=-1)
    bias = ClassBias(clip, 5)
    bias.begin(features, weights, clip.logit_scale)
    logits = clip.logit_scale * features.values[0] @ weights.T
    torch.testing.assert_close(torch.sigmoid(logits + bias()).mean(0), torch.full((5,), 0.2), atol=1e-5, rtol=0)
    monkeypatch.setattr("adaptclip.methods.base._MOST_LOGITS", 80)  # two classes at a time
    chunked = ClassBias(clip, 5)
    chunked.begin(features, weights, clip.logit_scale)
    torch.testing.assert_close(chunked(), bias())
    own = ClassBias(siglip, 5)
    own.begin(features, weights, siglip.logit_scale)
    assert own().tolist() == [-2.0] * 5


@pytest.mark.parametrize("method", list(MADE))
def test_logits_are_those_of_the_softmax_and_a_bias(method, clip):
    batch = batch_of(some_features(clip))
    plain, sigmoid = make(method, clip).eval(), make(method, clip, objective="sigmoid").eval()
    with torch.no_grad():
        torch.testing.assert_close(sigmoid(batch), plain(batch) + sigmoid.class_bias())
    assert plain.class_bias() is None
    assert "objective" not in plain.settings
    assert len(sigmoid.trainable_parameters()) == len(plain.trainable_parameters()) + 1
    learnt = [sum(p.numel() for p in adapter.trainable_parameters()) for adapter in (plain, sigmoid)]
    assert learnt[1] == learnt[0] + len(NAMES)


@pytest.mark.parametrize("method", list(MADE))
def test_what_is_saved_builds_the_same(method, clip):
    adapter = make(method, clip, objective="sigmoid").eval()
    with torch.no_grad():
        for parameter in adapter.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    settings = json.loads(json.dumps(adapter.settings))
    assert settings["objective"] == "sigmoid"
    again = methods()[method](clip, NAMES, **settings).eval()
    again.load_adapter_state(adapter.adapter_state())
    batch = batch_of(some_features(clip))
    with torch.no_grad():
        torch.testing.assert_close(again(batch), adapter(batch), atol=0, rtol=0)
    with pytest.raises(ArtifactError, match="should hold"):
        again.load_adapter_state(make(method, clip).adapter_state())
    with pytest.raises(ArtifactError, match="should hold"):
        make(method, clip).load_adapter_state(adapter.adapter_state())
    state = adapter.adapter_state()
    name = next(name for name in state if "bias" in name)
    with pytest.raises(ArtifactError, match="not finite"):
        again.load_adapter_state({**state, name: torch.full_like(state[name], math.nan)})


def test_a_head_is_fitted_by_its_objective(clip):
    features = some_features(clip, 60)
    heads = {name: LinearProbe(clip, NAMES, head="text_init", objective=name) for name in ("softmax", "sigmoid")}
    for head in heads.values():
        head.fit_features(features, epochs=20)
    batch = batch_of(features)
    with torch.no_grad():
        sigmoid = sigmoid_losses(heads["sigmoid"](batch), features.labels).mean()
        start = LinearProbe(clip, NAMES, head="text_init", objective="sigmoid")
        before = sigmoid_losses(start(batch), features.labels).mean()
    assert sigmoid < 0.8 * before
    assert torch.sigmoid(heads["sigmoid"](batch)).mean().item() == pytest.approx(0.2, abs=0.05)


def test_a_head_of_the_softmax_says_so_before_it_reads_a_prompt():
    with pytest.raises(ConfigError, match=r"sigmoid takes logistic, text_init or clap"):
        LinearProbe(None, NAMES, head="lp_plus_plus", objective="sigmoid")  # pyright: ignore[reportArgumentType]


def test_who_does_not_know_the_objective_says_so(clip):
    with pytest.raises(ConfigError, match="learns softmax only"):
        TwoStage(clip, NAMES, tune="lora", objective="sigmoid", towers="text")
    with pytest.raises(ConfigError, match="layernorm has no objective"):
        TwoStage(clip, NAMES, objective="sigmoid", towers="text")
    for kind in (CoOp, LoRA, LinearProbe):
        with pytest.raises(ConfigError, match='Did you mean "sigmoid"'):
            kind(clip, NAMES, objective="sigmiod")  # pyright: ignore[reportArgumentType]


def test_a_scale_of_lora_turns_the_bias_down_too(clip, siglip):
    for backbone in (clip, siglip):
        adapter = make("lora", backbone, objective="sigmoid").eval()
        assert adapter.bias is not None
        with torch.no_grad():
            adapter.bias.offset.copy_(torch.arange(5.0))
            for parameter in adapter.trainable_parameters()[:-1]:
                parameter.add_(0.1)
        batch, encoder = batch_of(some_features(backbone)), adapter.encoder
        start = adapter.bias.start.clone()
        for scale in (0.0, 0.5, 1.0):
            adapter.set_scale(scale)
            torch.testing.assert_close(adapter.class_bias(), start + scale * torch.arange(5.0))
        adapter.set_scale(0.0)
        zero_shot = make("lora", backbone).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapter(batch), zero_shot(batch) + start, atol=1e-5, rtol=0)
        adapter.set_scale(1.0)
        assert adapter.encoder.digest == encoder.digest
        # The bias is no part of the towers: moving it leaves what they made as it was.
        kept = adapter.encoder
        with torch.no_grad():
            adapter.bias.offset.add_(1)
        assert adapter.encoder is kept


def test_lora_begins_from_images_only_where_it_must(clip, siglip):
    class BenchSettings:
        images_per_class, shots, seed, reading_s, mitigation, images = 1, 1, 1, 0.0, Mitigation(), None
        times = 0

        def features(self):
            self.times += 1
            return images

        def loader_for(self, *_, **__):
            return None

        def training(self, adapter, *_, **__):
            return Training(adapter, None, None, None, 1, Mitigation())  # type: ignore[arg-type]

    images, support = some_features(clip), BenchSettings()
    nothing = lambda training: None  # noqa: E731
    make("lora", clip).learn(support, loop=nothing)
    make("lora", siglip, objective="sigmoid").learn(support, loop=nothing)
    assert support.times == 0
    adapter = make("lora", clip, objective="sigmoid")
    adapter.learn(support, loop=nothing)
    assert support.times == 1
    with torch.no_grad():
        mean = torch.sigmoid(adapter(batch_of(images))).mean(0)
    torch.testing.assert_close(mean, torch.full((5,), 0.2), atol=1e-5, rtol=0)


def test_coop_begins_from_features(clip):
    adapter = make("coop", clip, objective="sigmoid").eval()
    features = some_features(clip)
    adapter.begin(features)
    with torch.no_grad():
        mean = torch.sigmoid(adapter(batch_of(features))).mean(0)
    torch.testing.assert_close(mean, torch.full((5,), 0.2), atol=1e-5, rtol=0)
    make("coop", clip).begin(features)  # nothing to set


def test_the_default_objective_is_softmax():
    assert parse_objective("softmax") == Objective()
    assert str(Objective()) == "softmax"
