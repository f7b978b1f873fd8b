# SPDX-License-Identifier: Apache-2.0
"""CoCoOp: every image has its own text features, by the formula of the paper."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import AdaptclipError, ArtifactError, ConfigError, DataError
from adaptclip.methods import CoCoOp, CoOp, cocoop
from adaptclip.methods.registry import methods
from adaptclip.types import Batch

NAMES = ("rose", "lily_of the valley", "Größe 42", "dog", "northern hairy-nosed wombat")
STATE = {"context", "meta_net.0.weight", "meta_net.0.bias", "meta_net.2.weight", "meta_net.2.bias"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request):
    return make_tiny_backbone(request.param, quick_gelu=request.param == "clip")


def batch_of(backbone, size=4, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(size, backbone.embed_dim, generator=generator), dim=-1)
    labels = torch.randint(0, len(NAMES), (size,), generator=generator)
    return Batch(labels=labels, index=torch.arange(size), features=features)


def gradients(adapter, batch):
    adapter.zero_grad()
    F.cross_entropy(adapter(batch), batch.labels).backward()
    return [p.grad.clone() for p in adapter.trainable_parameters()]


@pytest.mark.parametrize("fast", [True, False])
def test_the_formula(backbone, fast):
    adapter, batch = CoCoOp(backbone, NAMES, seed=3, fast=fast), batch_of(backbone)
    assert set(adapter.adapter_state()) == STATE
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in adapter.meta_net.parameters())
    assert w1.shape == (48 // 16, 48)
    assert w2.shape == (64, 48 // 16)
    logits = adapter(batch)
    tower = backbone.text
    ids = backbone.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    for i, f in enumerate(batch.features):
        shift = w2 @ np.maximum(w1 @ f.double().numpy() + b1, 0) + b2
        embeddings = tower.embed_tokens(ids)
        # SOS, then the four words.
        embeddings[:, 1:5] += torch.from_numpy(shift).float()
        text = F.normalize(tower.encode_embeddings(embeddings, tower.pooled_position(ids)), dim=-1)
        torch.testing.assert_close(logits[i], backbone.logit_scale * (text @ f), atol=2e-4, rtol=0)
        torch.testing.assert_close(adapter.text_features(f[None])[0], text, atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", ["a photo of a", ""])
def test_without_a_shift_it_is_coop(backbone, words):
    adapter, batch = CoCoOp(backbone, NAMES, ctx_init=words, n_ctx=3, seed=2), batch_of(backbone)
    coop = CoOp(backbone, NAMES, ctx_init=words, n_ctx=3, seed=2)
    assert not torch.allclose(adapter(batch), coop(batch), atol=1e-3)
    with torch.no_grad():
        for p in adapter.meta_net[2].parameters():
            p.zero_()
    torch.testing.assert_close(adapter(batch), coop(batch), atol=1e-4, rtol=0)
    expected = torch.autograd.grad(F.cross_entropy(coop(batch), batch.labels), coop.context)[0]
    torch.testing.assert_close(gradients(adapter, batch)[0], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(adapter.eval()(batch), coop.eval()(batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [2**32, 60_000, 1])
def test_fast_is_plain_and_chunked_is_whole(backbone, budget):
    plain = CoCoOp(backbone, NAMES, fast=False)
    fast = CoCoOp(backbone, NAMES, memory_budget_bytes=budget)
    batch = batch_of(backbone)
    torch.testing.assert_close(fast(batch), plain(batch), atol=2e-4, rtol=0)
    for got, expected in zip(gradients(fast, batch), gradients(plain, batch), strict=True):
        # Every tensor learns from the first step on.
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in backbone.parameters())
    trainable = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert trainable == STATE


def test_images_do_not_see_each_other(backbone, monkeypatch):
    adapter, batch = CoCoOp(backbone, NAMES), batch_of(backbone, size=5)
    logits = adapter(batch)
    for i in range(5):
        one = Batch(labels=batch.labels[i : i + 1], index=batch.index[i : i + 1], features=batch.features[i : i + 1])
        torch.testing.assert_close(adapter(one)[0], logits[i], atol=1e-4, rtol=0)
    # In evaluation, few are held at once.
    held = []
    original = CoCoOp.text_features
    monkeypatch.setattr(CoCoOp, "text_features", lambda self, f: (held.append(len(f)), original(self, f))[1])
    monkeypatch.setattr(cocoop, "HELD_FEATURES", 2 * len(NAMES) + 1)
    with torch.inference_mode():
        torch.testing.assert_close(adapter.eval()(batch), logits, atol=1e-4, rtol=0)
    assert held == [2, 2, 1]


def test_it_learns(backbone):
    batch = Batch(
        labels=torch.arange(len(NAMES)), index=torch.arange(len(NAMES)),
        features=CoOp(backbone, NAMES, n_ctx=4, seed=7).class_weights(),
    )  # fmt: skip
    adapter = CoCoOp(backbone, NAMES)
    optimizer = torch.optim.SGD(adapter.trainable_parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(adapter(batch), batch.labels) + adapter.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_initial_values(backbone):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (CoCoOp(backbone, NAMES, seed=seed).adapter_state() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected_draw), "the global generator is left alone"
    assert all(torch.equal(first[name], again[name]) for name in STATE)
    assert not any(torch.equal(first[name], other[name]) for name in STATE - {"context"})
    for layer, inputs in (("0", 48), ("2", 3)):
        bound = inputs**-0.5
        largest = first[f"meta_net.{layer}.weight"].abs().max().item()
        assert 0.9 * bound < largest <= bound


def test_state_and_settings_rebuild_the_adapter(backbone):
    adapter, batch = CoCoOp(backbone, NAMES, ctx_init="", n_ctx=2, seed=3), batch_of(backbone)
    gradients(adapter, batch)
    torch.optim.SGD(adapter.trainable_parameters(), lr=0.1).step()
    again = methods()["cocoop"](backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    assert not torch.equal(again(batch), adapter(batch))
    again.load_adapter_state({name: tensor.clone() for name, tensor in adapter.adapter_state().items()})
    assert again.settings == adapter.settings == {"n_ctx": 2, "ctx_init": "", "seed": 3}
    assert torch.equal(again(batch), adapter(batch))
    twin = copy.deepcopy(adapter)
    torch.optim.SGD(adapter.trainable_parameters(), lr=0.1).step()
    assert torch.equal(twin(batch), again(batch))


def test_class_weights_are_those_of_the_context_alone(backbone):
    adapter = CoCoOp(backbone, NAMES, ctx_init="a photo of a")
    prompts = backbone.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(adapter.class_weights(), backbone.encode_text(prompts), atol=1e-5, rtol=0)
    assert not adapter.class_weights().requires_grad
    assert adapter.penalty().item() == 0


def test_autocast_is_near(backbone):
    adapter, batch = CoCoOp(backbone, NAMES), batch_of(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = adapter(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, adapter(batch), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("context"), "should hold .* got"),
        (lambda s: s.update(context=torch.zeros(5, 64)), r"has shape \(5, 64\), expected \(4, 64\)"),
        (lambda s: s.update({"meta_net.0.bias": torch.zeros(4)}), r"'meta_net.0.bias' .* \(4,\), expected \(3,\)"),
        (lambda s: s["meta_net.2.weight"].fill_(float("inf")), "not finite"),
    ],
)
def test_state_that_does_not_fit(backbone, change, message):
    adapter = CoCoOp(backbone, NAMES)
    before = copy.deepcopy(adapter.adapter_state())
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(ArtifactError, match=message):
        adapter.load_adapter_state(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.adapter_state().items())


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "at least one class name"),
        (["rose", " "], {}, "has no words"),
        (NAMES, {"ctx_init": "", "n_ctx": 0}, "n_ctx must be at least 1, got 0"),
        (["very " * 80], {}, "does not fit"),
        (NAMES, {"memory_budget_bytes": 0}, "memory_budget_bytes must be positive"),
    ],
)
def test_bad_settings(backbone, names, settings, message):
    with pytest.raises(AdaptclipError, match=message):
        CoCoOp(backbone, names, **settings)


def test_bad_batches(backbone):
    adapter = CoCoOp(backbone, NAMES)
    index = torch.arange(2)
    with pytest.raises(DataError, match="the batch has none"):
        adapter(Batch(labels=index, index=index))
    with pytest.raises(DataError, match=r"got \(2, 49\)"):
        adapter(Batch(labels=index, index=index, features=torch.zeros(2, 49)))
    with pytest.raises(ConfigError, match="memory_budget_bytes"):
        CoCoOp(backbone, NAMES, memory_budget_bytes=-1)
