# SPDX-License-Identifier: Apache-2.0
"""Projections of the same tokens by several frozen Linear layers with low-rank branches, computed together.

A layer that PEFT adapted computes `W x + b + s B A drop(x)` by itself (Hu et al. 2021, arXiv:2106.09685, section 4.1).
Query, key and value do so for the same x. Together they keep x once instead of a dropped copy each, add their gradients
with respect to x in place, and draw their dropout four elements at a time; it is the same function, and the three
dropouts stay independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEVELS = 2**16
"""A dropout probability is taken to the nearest of so many levels, as 16 random bits decide on an element."""


class _Layer(NamedTuple):
    """One Linear layer and what its branch computes; without a branch, a and b are None.

    Attributes:
        weight: (O, I) frozen.
        bias: (O,) frozen, or None.
        a: (r, I).
        b: (O, r).
        scaling: factor of the branch.
        dropped: how many of LEVELS of the branch's input are dropped now.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float
    dropped: int


class QuickDropout(nn.Module):
    """`nn.Dropout` that draws four elements at a time on a CPU, where to draw each by itself takes longer than a layer.

    Args:
        p: probability of an element to be dropped, from 0 to below 1, taken to the nearest of LEVELS.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same; what is kept is scaled up to the mean of the whole."""
        dropped = round(self.p * LEVELS)
        if not self.training or not dropped:
            return x
        if x.device.type != "cpu" or dropped >= LEVELS or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        # The draws lie in memory as the pixels do.
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        shape = x.permute(0, 2, 3, 1).shape if last else x.shape
        kept = _draw_kept(shape, dropped, x.device)
        return (x * (kept.permute(0, 3, 1, 2) if last else kept)).mul_(LEVELS / (LEVELS - dropped))


def project(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Outputs of several Linear layers, with PEFT's LoRA or without, for the same input, side by side.

    They are computed together where all are plain: frozen weights, at most one adapter, no DoRA, full precision.
    Otherwise, and where torch.compile traces them and joins operations by itself, each layer is called.

    Args:
        layers: `nn.Linear`, or PEFT's LoRA layer around one; O_i outputs each.
        x: (..., I).

    Returns:
        (..., sum of O_i).
    """
    read = [None if torch.compiler.is_compiling() else _read(layer, x) for layer in layers]
    together = [layer for layer in read if layer is not None]
    if len(together) < len(layers) or all(layer.a is None for layer in together):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    tensors = [t for layer in together for t in layer[:4]]
    return _Project.apply(x, [layer[4:] for layer in together], *tensors)  # type: ignore[no-any-return]


def _read(layer: Any, x: Tensor) -> _Layer | None:
    """What a layer computes, or None where it has to compute it itself."""
    linear = layer.get_base_layer() if hasattr(layer, "lora_A") else layer
    if type(linear) is not nn.Linear or torch.is_autocast_enabled(x.device.type):
        return None
    a = b = None
    scaling, dropped = 1.0, 0
    if layer is not linear:
        if len(layer.active_adapters) != 1 or layer.disable_adapters or layer.merged:
            return None
        name = layer.active_adapters[0]
        if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
            return None
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Dropout | QuickDropout):
            dropped = round(dropout.p * LEVELS) if dropout.training else 0
        elif not isinstance(dropout, nn.Identity):
            return None
    found = _Layer(linear.weight, linear.bias, a, b, scaling, dropped)
    frozen, used = (found.weight, found.bias), [t for t in found[:4] if t is not None]
    if any(t is not None and t.requires_grad for t in frozen) or dropped >= LEVELS:
        return None
    return found if x.dtype in (torch.float32, torch.float64) and all(t.dtype == x.dtype for t in used) else None


def _draw_kept(shape: torch.Size, dropped: int, device: torch.device) -> Tensor:
    """Boolean mask in which an element is False with the probability dropped / LEVELS, independently of all others.

    One 64-bit draw decides on four elements, which takes a sixth of the time of drawing each by itself.
    """
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return (draws.view(torch.int16)[:count] >= dropped - LEVELS // 2).view(shape)


class _Project(torch.autograd.Function):
    """`project` for layers that are computed together; the frozen weights get no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, settings: list[tuple[float, int]], *tensors: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        layers = [_Layer(*tensors[4 * i : 4 * i + 4], *setting) for i, setting in enumerate(settings)]  # type: ignore[arg-type]
        widths = [len(layer.weight) for layer in layers]
        out = x.new_empty(len(flat), sum(widths))
        # One buffer for all dropped inputs: to get fresh memory from the system takes longer than to compute them.
        dropped = torch.empty_like(flat) if any(layer.dropped for layer in layers) else flat
        kept: list[Tensor | None] = []
        branches: list[Tensor | None] = []
        for layer, part in zip(layers, out.split(widths, dim=1), strict=True):
            if layer.bias is None:
                torch.mm(flat, layer.weight.T, out=part)
            else:
                torch.addmm(layer.bias, flat, layer.weight.T, out=part)
            mask = branch = None
            if layer.a is not None and layer.b is not None:
                mask = _draw_kept(flat.shape, layer.dropped, x.device) if layer.dropped else None
                branch = (flat if mask is None else torch.mul(flat, mask, out=dropped)) @ layer.a.T
                part.addmm_(branch, layer.b.T, alpha=_factor(layer))
            kept.append(mask)
            branches.append(branch)
        ctx.settings, ctx.widths = settings, widths
        ctx.save_for_backward(x, *tensors, *kept, *branches)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        count = len(ctx.settings)
        flat, outer = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        buffer = torch.empty_like(flat) if any(dropped for _, dropped in ctx.settings) else flat
        grads: list[Tensor | None] = []
        for i, part in enumerate(outer.split(ctx.widths, dim=1)):
            layer = _Layer(*saved[4 * i : 4 * i + 4], *ctx.settings[i])
            if grad_x is not None:
                grad_x.addmm_(part, layer.weight, beta=int(i > 0))
            grad_a = grad_b = None
            if layer.a is not None and layer.b is not None:
                mask, branch = saved[4 * count + i], saved[5 * count + i]
                # The narrow operand is laid out along its long side, where the matrix product is many times faster.
                inner = F.linear(part, layer.b.T.contiguous()) * _factor(layer)
                grad_b = (branch.T @ part).T * _factor(layer)
                grad_a = inner.T @ (flat if mask is None else torch.mul(flat, mask, out=buffer))
                if grad_x is not None and mask is None:
                    grad_x.addmm_(inner, layer.a)
                elif grad_x is not None and mask is not None:
                    grad_x.add_(torch.mm(inner, layer.a, out=buffer).mul_(mask))
            grads += [None, None, grad_a, grad_b]
        return (None if grad_x is None else grad_x.view_as(x)), None, *grads


def _factor(layer: _Layer) -> float:
    """The factor of the branch, with what dropout leaves scaled up to the mean of the whole."""
    return layer.scaling * LEVELS / (LEVELS - layer.dropped)
