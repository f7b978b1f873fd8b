# SPDX-License-Identifier: Apache-2.0
"""CLIP-SVD: of every weight matrix in the blocks of both towers, the singular values alone learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.attention import fuse_attention, share_weights, split_attention
from adaptclip.clip.lora_targets import Towers, find_targets, kinds_of
from adaptclip.methods.base import check_state
from adaptclip.methods.method import Variant
from adaptclip.methods.tuned_towers import TowerSchedule, TunedTowers, check_full_precision

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone

NAME = "singular_values"
"""How the parameter of a layer is called."""


class Factors(NamedTuple):
    """Singular value decompositions of P matrices (O / P, I) that stand above each other in one weight.

    Attributes:
        left: (P, O / P, r) left singular vectors, r the smaller of O / P and I.
        values: (P, r), the largest first.
        right: (P, r, I) right singular vectors.
    """

    left: Tensor
    values: Tensor
    right: Tensor


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Factors]] = WeakKeyDictionary()
"""Frozen model -> layer -> its factors on the CPU: a hundred jobs of the bench share one backbone."""


def decompose(weight: Tensor, parts: int = 1) -> Factors:
    """Returns the singular value decompositions of a weight, float32 on the CPU.

    They are computed in float64, so that what was learnt for a value also belongs to its vectors on another machine: an
    error in a vector is the rounding divided by the gap between neighbouring values. Which of u and -u is found does
    not matter, as u and v only occur as the product u v^T.

    Args:
        weight: (O, I), or (O, I, 1, 1) of a 1x1 convolution.
        parts: P, matrices in it: 3 where it makes queries, keys and values at once.
    """
    matrix = weight.detach().cpu().double().flatten(1).unflatten(0, (parts, -1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Factors(left.float(), values.float(), right.float())


class SingularLayer(nn.Module):
    """A Linear layer or 1x1 convolution whose weight is W + U diag(s - s_0) V^T, of which s learns from s_0.

    Before training that is W itself, bit for bit. The factors are computed by `ready`, before which s is 0.

    Args:
        base: the frozen layer.
        parts: P of `decompose`.
    """

    left: Tensor | None
    start: Tensor | None
    right: Tensor | None

    def __init__(self, base: nn.Linear | nn.Conv2d, parts: int = 1) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        rows, columns = base.weight.flatten(1).shape
        shape = (parts, min(rows // parts, columns)) if parts > 1 else (min(rows, columns),)
        self.singular_values = nn.Parameter(torch.zeros(shape, device=base.weight.device))
        self.parts = parts
        for name in ("left", "start", "right"):
            self.register_buffer(name, None, persistent=False)

    @property
    def in_features(self) -> int:
        """I, as of the layer itself."""
        return self.base.weight.shape[1]

    @property
    def out_features(self) -> int:
        """O, as of the layer itself."""
        return self.base.weight.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, which stays."""
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, in the shape of the layer's own."""
        assert self.left is not None
        assert self.start is not None
        assert self.right is not None
        with torch.autocast(self.start.device.type, enabled=False):
            change = (self.singular_values - self.start).view(self.parts, 1, -1)
            return self.base.weight + ((self.left * change) @ self.right).view_as(self.base.weight)

    @torch.no_grad()
    def ready(self, factors: Factors) -> None:
        """Takes over the factors, and starts at their values."""
        device = self.singular_values.device
        self.left, self.right = factors.left.to(device), factors.right.to(device)
        self.start = factors.values.view_as(self.singular_values).to(device)
        self.singular_values.copy_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes, with the weight as it is now."""
        if isinstance(self.base, nn.Linear):
            return F.linear(x, self.weight, self.base.bias)
        return self.base._conv_forward(x, self.weight, self.base.bias)


@dataclass(frozen=True)
class ClipSVDSchedule(TowerSchedule):
    """How singular values learn (configs/few_shot of the published code): as `TowerSchedule`, at another rate.

    Attributes:
        lr: peak learning rate; base-to-new in the published code has 4e-4 on some sets, BiomedCLIP 7e-3.
    """

    lr: float = 5e-4


class ClipSVD(TunedTowers):
    """CLIP-SVD (Koleilat et al. 2025, arXiv:2509.03740): the singular values of the towers' weights alone learn.

    With W = U diag(s_0) V^T for each weight of queries, keys, values, outputs and MLPs in the blocks of both towers,

        W(s) = W + U diag(s - s_0) V^T,    s learns from s_0,

    which is the paper's U diag(s) V^T without its rounding: before training it is the zero-shot classifier. It learns
    for 200 steps a shot with AdamW, whose weight decay of 0.01 pulls the values themselves to 0, as published.

    What differs from the published code: weights keep their precision (there half); the prompts are the card's; one
    rate for every model; convolutional towers, which the paper does not have, learn the singular values of their 1x1
    convolutions and Linear layers. Attention that makes queries, keys and values in one matrix (timm) counts as three
    matrices, as there.

    The factors are computed when they are first needed, in float64 on the CPU: about two minutes on one core for a
    ViT-B/16, once for a backbone. They are not part of the artifact.

    Args:
        backbone: frozen CLIP in fp32, not changed.
        class_names: C names in the order of the label ids.
        towers: which towers are tuned: image, text or both.
        projections: which weights, any of q, k, v, out, mlp, conv.
        blocks: "all", "top-N" or numbers such as "0,5,11".
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.

    Raises:
        ConfigError: a setting names layers that do not exist, or the backbone is in half precision.
        BackboneError: a prompt is too long, or a tower is of a kind that cannot be adapted (see `find_targets`).
    """

    name = "clip_svd"
    variants = {"clip_svd": Variant(11.9, search={"lr": (1e-4, 2e-2)})}
    schedule_type = ClipSVDSchedule
    smoke = {"steps": 60, "lr": 1e-2}

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        towers: Towers = "both",
        projections: Sequence[str] = ("q", "k", "v", "out", "mlp"),
        blocks: str = "all",
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        model: Any = share_weights(backbone.model)
        check_full_precision(backbone, "CLIP-SVD")
        split_attention(model)
        names = find_targets(model, towers, projections=projections, blocks=blocks)
        for name in names:
            _replace(model, name, SingularLayer(model.get_submodule(name), _parts(name)))
        self.projections, self.blocks, self._names = tuple(projections), blocks, tuple(names)
        self._is_ready = False
        self._take_towers(backbone, class_names, templates, towers, model)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {
            "towers": self.towers, "projections": list(self.projections), "blocks": self.blocks,
            "templates": list(self.templates),
        }  # fmt: skip

    def _layers(self) -> dict[str, SingularLayer]:
        """Name -> layer, with the factors computed."""
        layers = {name: cast("SingularLayer", self.model.get_submodule(name)) for name in self._names}
        if not self._is_ready:
            known = _KNOWN.setdefault(self.backbone.model, {})
            for name, layer in layers.items():
                if name not in known:
                    known[name] = decompose(layer.base.weight, layer.parts)
                layer.ready(known[name])
            self._is_ready = True
        return layers

    def forward(self, batch: Any) -> Tensor:
        """See `TunedTowers.forward`."""
        self._layers()
        return super().forward(batch)

    def counts(self) -> tuple[int, int]:
        """Returns the number of singular values, twice, without computing them."""
        found = sum(p.numel() for name, p in self.model.named_parameters() if name.endswith(NAME))
        return found, found

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the singular values of every layer."""
        return [layer.singular_values for layer in self._layers().values()]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the singular values of each layer by its name: (r,), or (3, r) where it makes q, k and v at once."""
        return {f"{name}.{NAME}": layer.singular_values.detach() for name, layer in self._layers().items()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, "CLIP-SVD")
        for name, value in own.items():
            value.copy_(state[name])

    def published(self, shots: int, images_per_class: int) -> ClipSVDSchedule:
        """Returns the published 200 steps per shot."""
        return ClipSVDSchedule(steps=200 * (shots or images_per_class))

    @property
    def _made_with(self) -> str:
        return "CLIP-SVD"

    @property
    def _decides(self) -> str:
        return str({**self.settings, "templates": None})

    @torch.no_grad()
    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the weights as they are now."""
        self._layers()
        merged = share_weights(self.model, also_trainable=False)
        for name in self._names:
            layer = cast("SingularLayer", merged.get_submodule(name))
            layer.base.weight = nn.Parameter(layer.weight)
            _replace(merged, name, layer.base)
        fuse_attention(merged)
        return merged.requires_grad_(False)


def _parts(name: str) -> int:
    """How many matrices a layer has above each other, by its name."""
    kinds = kinds_of(name)
    return len(kinds) if kinds <= set("qkv") and kinds else 1


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
