# SPDX-License-Identifier: Apache-2.0
"""Attention of CLIP's towers, taken apart for LoRA and put together again.

`nn.MultiheadAttention` keeps its query, key and value projections in one tensor and applies them inside one function:
an adapter cannot reach them one by one, and its dropout would be ignored. So it is taken apart into Linear layers that
PEFT can adapt.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.low_rank import project
from adaptclip.errors import BackboneError

if TYPE_CHECKING:
    from open_clip.transformer import Attention


PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_OWN_PARTS = ("ln_q", "ln_k", "ln_inner", "out_drop", "logit_scale", "head_scale")
"""What open_clip's `Attention` has beside its projections; identities and None where it is plain."""

_CALLS_QKV = "called"
"""Counts as true for timm, and can be told from its own True when the attention is put together again."""


class SplitAttention(nn.Module):
    """Multi-head attention whose four projections are Linear layers; the same function as the fused module.

    It shares its weights with the fused module that it was made from, and is called as that one is: as
    `nn.MultiheadAttention`, or as open_clip's own `Attention`, which open_clip 3 has in its custom blocks and
    open_clip 4 in all.

    Args:
        fused: the module to take apart.

    Raises:
        BackboneError: the module adds learnt or zero keys, which no open_clip model does.
    """

    def __init__(self, fused: nn.MultiheadAttention | Attention) -> None:
        from open_clip.transformer import Attention

        super().__init__()
        known: Any = fused
        self.own = isinstance(fused, Attention)
        if not self.own and (known.bias_k is not None or known.add_zero_attn):
            raise BackboneError("attention with added keys (bias_k, add_zero_attn) cannot be split into projections")
        self.embed_dim, self.num_heads = known.out_proj.out_features, known.num_heads
        self.batch_first = self.own or known.batch_first
        self.dropout = float(known.attn_drop.p if self.own else known.dropout)
        if known.in_proj_weight is not None:
            weights = known.in_proj_weight.chunk(3)
        else:
            weights = (known.q_proj_weight, known.k_proj_weight, known.v_proj_weight)
        biases = (None,) * 3 if known.in_proj_bias is None else known.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(known.out_proj.weight, known.out_proj.bias)
        self._kept = _OWN_PARTS if self.own else ()
        for name in self._kept:
            setattr(self, name, getattr(known, name))
        self._emptied = (_emptied(fused),)  # in a tuple, so that it is not a part of this module
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        *,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """Attends as the fused module does, without giving the attention weights.

        Args:
            query: (B, L, E), or (L, B, E) where the fused module was not batch first.
            key: (B, S, K); without it the queries attend to themselves.
            value: (B, S, K).
            key_padding_mask: must be None.
            need_weights: must be False.
            attn_mask: (L, S) or (B heads, L, S), added to the scores; for `nn.MultiheadAttention` a boolean mask is
                True where attention is not allowed (unlike in scaled_dot_product_attention).
            k_x: what open_clip's `Attention` calls `key`.
            v_x: what it calls `value`.

        Returns:
            (B, L, E), and as `nn.MultiheadAttention` does a pair of it and None.

        Raises:
            BackboneError: attention weights or a padding mask are asked for, or open_clip's `Attention` is given a
                boolean mask, whose meaning open_clip 4 turned round.
        """
        if need_weights or key_padding_mask is not None:
            raise BackboneError("split attention gives no attention weights and takes no key_padding_mask")
        if self.own and attn_mask is not None and attn_mask.dtype == torch.bool:
            raise BackboneError(
                "a boolean mask of open_clip's Attention means one thing in open_clip 3 and the opposite in 4; "
                "give an additive mask"
            )
        key, value = k_x if key is None else key, v_x if value is None else value
        key, value = query if key is None else key, query if value is None else value
        itself, same = query is key, key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if itself and same:
            projected = project([self.q_proj, self.k_proj, self.v_proj], query).split(self.embed_dim, dim=-1)
        elif same:
            projected = self.q_proj(query), *project([self.k_proj, self.v_proj], key).split(self.embed_dim, dim=-1)
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
        if self.own:
            return self._attend_as_own(q, k, v, attn_mask, dropout)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _attend_as_own(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """What open_clip's `Attention` does with (B, heads, L, E / heads), its norms and scales included."""
        parts: Any = self
        scale = None
        if parts.logit_scale is not None:
            factor = parts.logit_scale.clamp(max=self._emptied[0].logit_scale_max).exp()
            q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
        else:
            q, k = parts.ln_q(q), parts.ln_k(k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        if parts.head_scale is not None:
            out = out * parts.head_scale
        return parts.out_drop(self.out_proj(parts.ln_inner(out.transpose(1, 2).flatten(2))))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @property
    def is_plain(self) -> bool:
        """Whether it is scaled dot-product attention and nothing else: no dropout, norms or scales of its own."""
        return not self.dropout and _is_plain_own(self) if self.own else not self.dropout

    def fuse(self) -> Any:
        """Returns the fused module with the same weights, bit for bit, under its own names.

        Raises:
            BackboneError: a projection still carries an adapter.
        """
        for name in (*PROJECTIONS, "out_proj"):
            _check_plain(self, name)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        fused: Any = _emptied(self._emptied[0])
        if k.in_features == v.in_features == self.embed_dim:
            fused.in_proj_weight = _joined([q.weight, k.weight, v.weight])
        else:
            fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight = q.weight, k.weight, v.weight
        if q.bias is not None:
            fused.in_proj_bias = _joined([q.bias, k.bias, v.bias])
        fused.out_proj.weight, fused.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        for name in self._kept:
            setattr(fused, name, getattr(self, name))
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
    from open_clip.transformer import Attention

    kinds = {nn.MultiheadAttention: SplitAttention, Attention: SplitAttention, AttentionPool2d: SplitPooling}
    # By exact type: a subclass may compute something else, and find_targets refuses it by name.
    names = [name for name, module in model.named_modules() if type(module) in kinds]
    for name in names:
        module = model.get_submodule(name)
        _replace(model, name, kinds[type(module)](module))
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


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module, fused or split, is scaled dot-product attention with one in_proj and nothing else."""
    from open_clip.transformer import Attention

    known: Any = module
    if type(module) is SplitAttention:
        return module.is_plain and module.k_proj.in_features == module.v_proj.in_features == module.embed_dim
    if type(module) is Attention:
        return known.in_proj_weight is not None and not known.attn_drop.p and _is_plain_own(module)
    if type(module) is nn.MultiheadAttention:
        return (
            known.in_proj_weight is not None and known.bias_k is None and not known.dropout and not known.add_zero_attn
        )
    return False


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


def _is_plain_own(module: Any) -> bool:
    """Whether open_clip's `Attention`, fused or split, has neither norms nor scales nor dropout of its own."""
    identities = all(type(getattr(module, name)) is nn.Identity for name in ("ln_q", "ln_k", "ln_inner"))
    return identities and module.logit_scale is None and module.head_scale is None and not module.out_drop.p


def _emptied(module: nn.Module) -> Any:
    """A copy of a module and of its parts without their tensors."""
    copied: Any = copy.copy(module)
    vars(copied)["_parameters"] = dict.fromkeys(module._parameters)
    vars(copied)["_modules"] = {name: child and _emptied(child) for name, child in module._modules.items()}
    return copied


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer that shares the memory of its weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _joined(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=parts[0].requires_grad)
