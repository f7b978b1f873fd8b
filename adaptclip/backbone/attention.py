"""Fused attention taken apart into Linear layers that PEFT can adapt, and put together again.

`nn.MultiheadAttention` keeps its query, key and value projections in one tensor and applies them inside one function:
an adapter cannot reach them one by one, and its dropout would be ignored.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone.low_rank import project
from adaptclip.errors import BackboneError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_CALLS_QKV = "called"
"""Counts as true for timm, and can be told from its own True when the attention is put together again."""


class SplitAttention(nn.Module):
    """Multi-head attention whose four projections are Linear layers; the same function as the fused module.

    It shares its weights with the fused module that it was made from.

    Args:
        fused: the module to take apart.

    Raises:
        BackboneError: the module adds learnt or zero keys, which no open_clip model does.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if fused.bias_k is not None or fused.add_zero_attn:
            raise BackboneError("attention with added keys (bias_k, add_zero_attn) cannot be split into projections")
        self.embed_dim, self.num_heads = fused.embed_dim, fused.num_heads
        self.batch_first, self.dropout = fused.batch_first, float(fused.dropout)
        if fused.in_proj_weight is not None:
            weights = fused.in_proj_weight.chunk(3)
        else:
            weights = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attends as `nn.MultiheadAttention` does, without giving the attention weights.

        Args:
            query: (B, L, E), or (L, B, E) where the fused module was not batch first.
            key: (B, S, K).
            value: (B, S, K).
            key_padding_mask: must be None.
            need_weights: must be False.
            attn_mask: (L, S) or (B heads, L, S), added to the scores; a boolean mask is True where attention is not
                allowed, as in `nn.MultiheadAttention` (and unlike in scaled_dot_product_attention).

        Raises:
            BackboneError: attention weights or a padding mask are asked for.
        """
        if need_weights or key_padding_mask is not None:
            raise BackboneError("split attention gives no attention weights and takes no key_padding_mask")
        itself = query is key and key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if itself:
            projected = project([self.q_proj, self.k_proj, self.v_proj], query).split(self.embed_dim, dim=-1)
        else:
            projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._heads(x) for x in projected)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, float("-inf"))
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            attn_mask = attn_mask.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def fuse(self) -> nn.MultiheadAttention:
        """Returns the fused module with the same weights, bit for bit, under its own names.

        Raises:
            BackboneError: a projection still carries an adapter.
        """
        for name in (*PROJECTIONS, "out_proj"):
            _check_plain(self, name)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        fused: Any = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, dropout=self.dropout, bias=q.bias is not None, kdim=k.in_features,
            vdim=v.in_features, batch_first=self.batch_first, device="meta",
        )  # fmt: skip
        if fused.in_proj_weight is not None:
            fused.in_proj_weight = _joined([q.weight, k.weight, v.weight])
        else:
            fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight = q.weight, k.weight, v.weight
        if q.bias is not None:
            fused.in_proj_bias = _joined([q.bias, k.bias, v.bias])
        fused.out_proj.weight, fused.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return fused.train(self.training)


class SplitPooling(nn.Module):
    """The attention pool of a ModifiedResNet, calling its projections as layers; the same function.

    open_clip's own reads their weights, so that an adapter around one of them would stay without effect. It pools the
    mean token alone, which therefore alone asks. Names and weights are those of the original.

    Args:
        fused: the module to take apart.
    """

    def __init__(self, fused: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding, self.num_heads = fused.positional_embedding, fused.num_heads
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = fused.k_proj, fused.q_proj, fused.v_proj, fused.c_proj
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """Pools (B, E, H, W) feature maps to (B, D)."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    def fuse(self) -> AttentionPool2d:
        """Returns open_clip's module with the same weights.

        Raises:
            BackboneError: a projection still carries an adapter.
        """
        for name in (*PROJECTIONS, "c_proj"):
            _check_plain(self, name)
        width = self.positional_embedding.shape[1]
        with torch.device("meta"):
            fused: Any = AttentionPool2d(1, width, self.num_heads, self.c_proj.out_features)
        fused.positional_embedding = self.positional_embedding
        fused.k_proj, fused.q_proj, fused.v_proj, fused.c_proj = self.k_proj, self.q_proj, self.v_proj, self.c_proj
        return fused.train(self.training)


def split_attention(model: nn.Module) -> list[str]:
    """Replaces every fused attention of a model, in place, by `SplitAttention` or `SplitPooling`.

    The new Linear layers share the memory of the fused weights until one of them is moved or written to. Attention of
    timm that reads the weight of its `qkv` to add a bias to it (EVA01) is told to call the layer first.

    Returns:
        Dotted names of the replaced modules; none where the model has no fused attention.
    """
    kinds = {nn.MultiheadAttention: SplitAttention, AttentionPool2d: SplitPooling}
    names = [name for name, module in model.named_modules() if isinstance(module, tuple(kinds))]
    for name in names:
        module = model.get_submodule(name)
        _replace(model, name, next(split(module) for fused, split in kinds.items() if isinstance(module, fused)))
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False:
            vars(module)["qkv_bias_separate"] = _CALLS_QKV
    return names


def fuse_attention(model: nn.Module) -> list[str]:
    """Undoes `split_attention` in place: original module, original names, the same bits where nothing was adapted.

    Returns:
        Dotted names of the replaced modules.

    Raises:
        BackboneError: an adapter was not merged.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SplitAttention | SplitPooling)]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, SplitAttention | SplitPooling)
        _replace(model, name, module.fuse())
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) == _CALLS_QKV:
            vars(module)["qkv_bias_separate"] = False
    return names


def share_weights(model: nn.Module, *, also_trainable: bool = True) -> nn.Module:
    """Copies the modules of a model but not its tensors, so that layers can be replaced in the copy alone.

    Args:
        model: what to copy.
        also_trainable: False copies the parameters that require a gradient, and with them whatever is small and learns.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared = [t for t in tensors if also_trainable or not t.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_plain(module: nn.Module, name: str) -> None:
    if type(getattr(module, name)) is not nn.Linear:
        kind = type(getattr(module, name)).__name__
        raise BackboneError(f"{name} is a {kind}: merge or remove its adapter before fusing the attention")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer that shares the memory of its weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _joined(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=parts[0].requires_grad)
