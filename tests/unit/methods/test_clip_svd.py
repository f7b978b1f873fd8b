# SPDX-License-Identifier: Apache-2.0
"""CLIP-SVD: only singular values learn, the start is zero-shot, and steps are those of the published formula."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, ConfigError, DataError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.clip_svd import ClipSVD, decompose
from adaptclip.methods.registry import methods_for
from adaptclip.training.optim import build_optimizer
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def pictures(count: int = 6) -> Batch:
    labels = torch.arange(count) % len(NAMES)
    return Batch(labels, labels, images=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def features_of(encoder) -> Batch:
    batch = pictures()
    with torch.no_grad():
        return Batch(batch.labels, batch.index, features=encoder.encode_image(batch.images))


def trained(backbone, steps: int = 3, **settings) -> ClipSVD:
    adapter = ClipSVD(backbone, NAMES, templates=TEMPLATES, **settings)
    optimizer = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=1e-2, weight_decay=1e-2)
    batch = pictures() if adapter.consumes == "pixels" else features_of(backbone)
    adapter.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()
    return adapter.eval()


def stock_weight(model: Any, name: str) -> tuple[str, slice]:
    """Where a layer's weight stands in a stock model: its parameter, and rows of it."""
    for part, kind in enumerate(("q_proj", "k_proj", "v_proj")):
        if name.endswith(kind):
            fused = name.replace(kind, "in_proj_weight")
            width = len(model.get_parameter(fused)) // 3
            return fused, slice(part * width, (part + 1) * width)
    return f"{name}.weight", slice(None)


def test_the_layers_are_those_of_the_paper_and_their_values_their_own(backbone):
    adapter = ClipSVD(backbone, NAMES)
    state = adapter.adapter_state()
    blocks = len(backbone.model.visual.transformer.resblocks) + len(backbone.model.transformer.resblocks)
    assert len(state) == 6 * blocks  # q, k, v, out and two of the MLP
    learnt = {id(p) for p in adapter.trainable_parameters()}
    assert learnt == {id(p) for p in adapter.model.parameters() if p.requires_grad}
    for name, values in state.items():
        whole, rows = stock_weight(backbone.model, name.removesuffix(".singular_values"))
        weight = backbone.model.get_parameter(whole)[rows]
        assert values.shape == (min(weight.shape),)
        torch.testing.assert_close(values, torch.linalg.svdvals(weight.detach()), atol=1e-5, rtol=1e-5)
    only = ClipSVD(backbone, NAMES, towers="text", projections=["out"], blocks="top-1").adapter_state()
    assert list(only) == ["transformer.resblocks.1.attn.out_proj.singular_values"]


def test_factors_are_of_float64_and_of_each_matrix():
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 7, generator=draws)
    left, values, right = decompose(weight, parts=3)
    assert [tuple(t.shape) for t in (left, values, right)] == [(3, 4, 4), (3, 4), (3, 4, 7)]
    torch.testing.assert_close(((left * values[:, None]) @ right).flatten(0, 1), weight, atol=1e-6, rtol=0)
    # Values that nearly coincide: float32 would mix their vectors.
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=torch.float64))[0]
    near = torch.tensor([2.0, 1.0 + 1e-6, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    exact = (basis * near) @ basis.T
    change = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    left, _, right = torch.linalg.svd(exact)
    expected = (left * change) @ right
    found = decompose(exact)  # of what reaches it, whatever the machine rounds
    torch.testing.assert_close(
        ((found.left[0] * change.float()) @ found.right[0]).double(), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_it_starts_as_zero_shot_and_leaves_the_backbone_alone(backbone, towers):
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = ClipSVD(backbone, NAMES, towers=towers, templates=TEMPLATES)
    batch = features_of(backbone)
    with torch.no_grad():
        expected = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
        torch.testing.assert_close(adapter(batch), expected, atol=1e-5, rtol=0)
        live = adapter.train()(batch if towers == "text" else pictures())
    torch.testing.assert_close(live, expected, atol=1e-4, rtol=0)
    stock: Any = adapter.merged_model()
    assert all(torch.equal(frozen[name], value) for name, value in stock.state_dict().items())  # bit for bit
    before = F.cross_entropy(expected, batch.labels)
    found = trained(backbone, towers=towers)
    with torch.no_grad():
        assert F.cross_entropy(found(pictures() if towers != "text" else batch), batch.labels) < before
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())


def test_a_step_is_that_of_the_published_formula(backbone):
    """Weights U diag(s) V^T in the stock model, gradients by its own backward pass, then AdamW on s."""
    adapter = trained(backbone, steps=1)
    stock: Any = adapter.merged_model()
    names = [name.removesuffix(".singular_values") for name in adapter.adapter_state()]
    factors, values = {}, {}
    for name in names:
        whole, rows = stock_weight(stock, name)
        left, _, right = torch.linalg.svd(backbone.model.get_parameter(whole)[rows].double(), full_matrices=False)
        factors[name] = (left, right)
        values[name] = adapter.adapter_state()[f"{name}.singular_values"].clone().requires_grad_(True)
        rebuilt = ((left * values[name].detach().double()) @ right).float()
        torch.testing.assert_close(stock.get_parameter(whole)[rows], rebuilt, atol=1e-6, rtol=0)
        stock.get_parameter(whole).requires_grad_(True)
    batch = pictures()
    tokens = backbone.tokenize([t.replace("{}", n.replace("_", " ")) for n in NAMES for t in TEMPLATES])
    text = F.normalize(F.normalize(stock.encode_text(tokens), dim=-1).unflatten(0, (3, 2)).mean(1), dim=-1)
    logits = float(backbone.logit_scale) * F.normalize(stock.encode_image(batch.images), dim=-1) @ text.T
    wholes = [stock_weight(stock, name) for name in names]
    gradients = torch.autograd.grad(F.cross_entropy(logits, batch.labels), [stock.get_parameter(w) for w, _ in wholes])
    optimizer = torch.optim.AdamW(values.values(), lr=5e-4, weight_decay=0.01)
    for name, (_, rows), gradient in zip(names, wholes, gradients, strict=True):
        left, right = factors[name]
        values[name].grad = torch.einsum("or,oi,ri->r", left, gradient[rows].double(), right).float()

    adapter.train()
    own = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=5e-4, weight_decay=0.01)
    own.zero_grad()
    F.cross_entropy(adapter(batch), batch.labels).backward()
    for name, parameter in zip(names, adapter.trainable_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, values[name].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
        parameter.grad = values[name].grad  # type: ignore[assignment]
    own.step()
    optimizer.step()
    state: dict[str, Tensor] = adapter.adapter_state()
    assert all(torch.equal(state[f"{name}.singular_values"], values[name].detach()) for name in names)


def test_merged_reloaded_and_live_are_the_same(backbone):
    adapter = trained(backbone)
    batch = features_of(adapter.encoder)
    again = ClipSVD(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    before = again.encoder.digest
    again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
    assert again.encoder.digest == adapter.encoder.digest != before
    with torch.no_grad():
        assert torch.equal(again(batch), adapter(batch))
        live = F.normalize(adapter.model.encode_image(pictures().images), dim=-1)
    torch.testing.assert_close(live, batch.features, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapter.for_classes(NAMES).class_weights(), adapter.class_weights(), atol=1e-5, rtol=0)
    state = dict(adapter.adapter_state())
    state.pop(next(iter(state)))
    with pytest.raises(ArtifactError, match="CLIP-SVD should hold"):
        again.load_adapter_state(state)


def test_a_layer_that_makes_queries_keys_and_values_has_three_matrices():
    adapter = ClipSVD(make_kind("BiomedCLIP"), NAMES)
    shapes = {
        name.split(".", 4)[-1]: tuple(t.shape) for name, t in adapter.adapter_state().items() if "blocks.0" in name
    }
    assert shapes["attn.qkv.singular_values"] == (3, 48)
    assert shapes["attn.proj.singular_values"] == (48,)


def test_numbers_are_counted_without_a_decomposition(backbone, monkeypatch):
    def never(*_):
        raise AssertionError("a count needs no decomposition")

    fresh = make_tiny_backbone(seed=5)
    monkeypatch.setattr("adaptclip.methods.clip_svd.decompose", never)
    (found,) = [method for method in methods_for(fresh) if method.method == "clip_svd"]
    assert found.learnt == found.stored == sum(t.numel() for t in ClipSVD(backbone, NAMES).adapter_state().values())


def test_wrong_input(backbone):
    with pytest.raises(ConfigError, match="in fp32, got bf16"):
        ClipSVD(make_tiny_backbone(precision="bf16"), NAMES)
    with pytest.raises(ConfigError, match='Did you mean "mlp"'):
        ClipSVD(backbone, NAMES, projections=["mpl"])
    with pytest.raises(DataError, match="learns from pixels"):
        ClipSVD(backbone, NAMES).train()(features_of(backbone))
