# SPDX-License-Identifier: Apache-2.0
"""Projections computed together: PEFT's own layers, independent dropouts, the same masks forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model  # type: ignore[attr-defined]
from torch import Tensor, nn

from adaptclip.clip import low_rank
from adaptclip.clip.low_rank import QuickDropout, project


def layers(adapted=(0, 1, 2), dropout=0.0, width=8, dtype=torch.float32, bias=True, **settings) -> nn.ModuleList:
    """Three Linear layers, some of them with PEFT's LoRA of rank 2 and a B that is not zero."""
    torch.manual_seed(0)
    whole = nn.ModuleList(nn.Linear(width, width, bias=bias, dtype=dtype) for _ in range(3)).requires_grad_(False)
    config = LoraConfig(
        r=2, lora_alpha=3, lora_dropout=dropout, target_modules=[str(i) for i in adapted], **settings
    )  # fmt: skip
    model = inject_adapter_in_model(config, nn.Sequential(*whole))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    return nn.ModuleList(model.children()).train()


def is_together(whole: nn.ModuleList, x: Tensor) -> bool:
    function = project(list(whole), x).grad_fn
    return "Project" in type(function).__name__


def by_layer(whole: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.cat([layer(x) for layer in whole], dim=-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
def test_without_dropout_it_is_peft(adapted, bias):
    whole, x = layers(adapted, bias=bias), torch.randn(3, 5, 8, requires_grad=True)
    learnt = [x, *(p for p in whole.parameters() if p.requires_grad)]
    assert len(learnt) == 1 + 2 * len(adapted)
    assert is_together(whole, x)
    got, expected = project(list(whole), x), by_layer(whole, x)
    assert torch.allclose(got, expected, atol=1e-5)
    grad = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, learnt, grad), torch.autograd.grad(expected, learnt, grad), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in pairs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(dropout):
    whole, x = layers(dtype=torch.float64, dropout=dropout), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    learnt = [p for p in whole.parameters() if p.requires_grad]

    def function(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same elements dropped every time
        return project(list(whole), x)

    assert is_together(whole, x)
    assert torch.autograd.gradcheck(function, (x, *learnt))


def dropped_inputs(count: int, dropout: float, width: int = 6) -> Tensor:
    """(3, count, width) inputs of the branches after dropout: ones where kept, read off layers that show them."""
    whole = layers(dropout=dropout, width=width)
    layer: Any
    for layer in whole:
        base = layer.get_base_layer()
        base.weight.zero_()
        base.bias.zero_()
        layer.lora_A["default"].weight.data = torch.eye(width)
        layer.lora_B["default"].weight.data = torch.eye(width)
        layer.scaling["default"] = 1 - dropout
    out = project(list(whole), torch.ones(count, width))
    return out.detach().unflatten(-1, (3, width)).transpose(0, 1)


@pytest.mark.parametrize("dropout", [0.25, 0.1])
def test_dropout_is_independent_and_as_often_as_asked(dropout):
    torch.manual_seed(5)
    shown = dropped_inputs(20_001, dropout)  # not a multiple of four elements
    assert torch.all((shown == 0) | ((shown - 1).abs() < 1e-4))
    gone = (shown == 0).double()
    elements = gone[0].numel()
    error = 5 * (dropout * (1 - dropout) / elements) ** 0.5
    assert gone.mean((1, 2)).sub(dropout).abs().max() < error
    # Between the layers, between neighbours and between elements of one draw: as often together as by chance.
    flat = gone.flatten(1) - dropout
    others = [flat[i, :-shift] * flat[j, shift:] for i in range(3) for j in range(3) for shift in (1, 2, 3, 4, 6)]
    others += [flat[i] * flat[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    limit = 5 * dropout * (1 - dropout) / elements**0.5
    assert len(others) == 48
    assert all(float(product.mean().abs()) < limit for product in others)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_quick_dropout_is_dropout(share):
    """On images laid out either way: as often as asked, the rest scaled up, the same elements in the gradient."""
    torch.manual_seed(7)
    dropout = QuickDropout(share)
    wide = torch.rand(4, 6, 50, 50) + 1
    for x in (wide, wide.contiguous(memory_format=torch.channels_last), wide[:, 1:5], wide.flatten(1), wide[:, :, ::2]):
        x = x.detach().requires_grad_()
        out = dropout.train()(x)
        assert out.shape == x.shape
        gone = out == 0
        assert torch.allclose(out, torch.where(gone, 0, x / (1 - share)), rtol=1e-4)
        error = 5 * (share * (1 - share) / x.numel()) ** 0.5
        assert abs(gone.double().mean() - share) < error
        assert gone.double().mean((1, *range(2, x.ndim))).sub(share).abs().max() < 2.5 * error
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.allclose(gradient, torch.where(gone, 0.0, 1 / (1 - share)), rtol=1e-4)
        assert not torch.equal(dropout(x), out)
        assert dropout.eval()(x) is x


def test_the_draws_follow_torchs_seed_and_stop_outside_of_training():
    whole, x = layers(dropout=0.5), torch.randn(4, 8)
    torch.manual_seed(3)
    first, second = project(list(whole), x), project(list(whole), x)
    torch.manual_seed(3)
    assert torch.equal(project(list(whole), x), first)
    assert not torch.equal(first, second)
    whole.eval()
    assert torch.allclose(project(list(whole), x), by_layer(whole, x), atol=1e-5)


def test_it_keeps_less_for_the_backward_pass_than_the_layers_do():
    whole, x = layers(dropout=0.5, width=64), torch.randn(100, 64, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in whole.parameters()}

    def kept_bytes(function) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = function(whole, x)
        assert out.requires_grad
        return sum(kept.values())

    # One x of 4 bytes an element and three masks of one; by layer, three dropped copies and three masks.
    assert kept_bytes(lambda whole, x: project(list(whole), x)) < 0.6 * kept_bytes(by_layer)


def test_a_frozen_input_gets_no_gradient():
    whole, x = layers(), torch.randn(4, 8)
    project(list(whole), x).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in whole.parameters() if p.requires_grad)


def two_adapters(whole: nn.ModuleList) -> None:
    for layer in whole:
        layer.update_layer("other", 2, lora_alpha=1, config=LoraConfig(r=2))  # type: ignore[operator]
        layer.set_adapter(["default", "other"])  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["dora", "merged", "disabled", "two", "trainable", "biased", "other layer"])
def test_what_is_not_plain_is_left_to_the_layers(kind):
    whole = layers(use_dora=kind == "dora", lora_bias=kind == "biased")
    x = torch.randn(4, 8, requires_grad=True)
    if kind == "merged":
        whole[1].merge()  # type: ignore[operator]
    elif kind == "disabled":
        whole[1].enable_adapters(False)  # type: ignore[operator]
    elif kind == "two":
        two_adapters(whole)
    elif kind == "trainable":
        whole[1].get_base_layer().weight.requires_grad_()  # type: ignore[operator]
    elif kind == "other layer":
        whole[1] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    assert not is_together(whole, x)
    assert torch.equal(project(list(whole), x), by_layer(whole, x))


def test_autocast_and_mixed_precision_are_left_to_the_layers():
    whole, x = layers(), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_together(whole, x)
        assert project(list(whole), x).dtype == torch.bfloat16
    assert low_rank._read(whole[0], x) is not None
    assert low_rank._read(whole[0], x.bfloat16()) is None
    assert low_rank._read(whole[0], x.double()) is None
