# SPDX-License-Identifier: Apache-2.0
"""ProLIP: the last matrix of the image tower learns, pulled to where it started."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.attention import share_weights
from adaptclip.errors import BackboneError
from adaptclip.methods.base import batch_features, check_state
from adaptclip.methods.choosing import check_factor
from adaptclip.methods.method import Schedule, Variant
from adaptclip.methods.tuned_towers import TunedTowers, check_full_precision

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch


@dataclass(frozen=True)
class ProLIPSchedule(Schedule):
    """How ProLIP learns without validation images (sec. 4.3 of the paper, configs/base.yaml of its code).

    Adam with an epsilon of 1e-4, all images in every step, a cosine per step down to 0.

    Attributes:
        epochs: steps, each with another set of crops of at least half of the image.
        views: sets of crops, taken in turn; None makes one for each epoch, as published.
        lr: peak learning rate.
        pull: lambda, weight of the squared distance from the start; 0 and more. As published 1/k at k shots.
    """

    epochs: int = 300
    views: int | None = None
    lr: float = 1e-5
    pull: float = 1.0


class ProLIP(TunedTowers):
    """ProLIP (Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia", 2024, arXiv:2410.05270).

    Of the whole model the visual projection W_0 alone learns, on features f_0 of images before it:

        f = W f_0 + b,    logit_c = scale · cos(f, t_c),    loss = cross-entropy + lambda · |W - W_0|²

    with the sum of squares, lambda = 1/k at k shots, and b fixed where there is one. The towers encode each view once;
    a step then costs a matrix product. Before training it is the zero-shot classifier, and the result is a CLIP.

    Features before the projection are read from pixels: features computed elsewhere (`FeatureClip`, cards of features)
    have passed it and are refused. What differs from the published code: the logit scale is the model's own instead of
    100; crops are the card's, of at least half of the image; with all images lambda is one over their number per class.

    Args:
        backbone: frozen CLIP in fp32, not changed.
        class_names: C names in the order of the label ids.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.

    Raises:
        ConfigError: the backbone is in half precision, or there is no class name.
        BackboneError: the image tower ends in no projection (SigLIP, the embedded starter) or in several layers, or a
            prompt is too long.
    """

    name = "prolip"
    variants = {"prolip": Variant(8.9, search={"lr": (1e-5, 1e-2), "pull": (1e-3, 10.0)})}
    schedule_type = ProLIPSchedule
    smoke = {"epochs": 100, "views": 5, "lr": 1e-3}
    start: Tensor

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        check_full_precision(backbone, "ProLIP")
        self._projection = projection_of(backbone)
        weight = backbone.model.get_parameter(self._projection).detach()
        model: Any = share_weights(backbone.model)
        _set_parameter(model, self._projection, nn.Parameter(weight.clone()))
        self.register_buffer("start", weight, persistent=False)
        self._pull, self._penalty = 0.0, torch.zeros(())
        self._take_towers(backbone, class_names, templates, "image", model)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"templates": list(self.templates)}

    @property
    def weight(self) -> nn.Parameter:
        """The projection: (T, D) of an open_clip ViT, (D, T) where it is a Linear layer."""
        return self.model.get_parameter(self._projection)

    def before_projection(self) -> ClipBackbone:
        """Returns the towers with the projection taken out: unit-norm (f_0), or (f_0, 1) where it has a bias.

        Cosines see the direction of W f_0 + b alone, which is that of (W, b) times the unit-norm (f_0, 1).
        """
        base, model = self.backbone, share_weights(self.backbone.model)
        parent: Any = model.get_submodule(self._projection.rpartition(".")[0])
        if isinstance(parent, nn.Linear):
            width, device = parent.in_features, parent.weight.device
            extra = 0 if parent.bias is None else 1
            parent.weight = nn.Parameter(torch.eye(width + extra, width, device=device))
            if parent.bias is not None:
                parent.bias = nn.Parameter(F.one_hot(torch.tensor(width), width + 1).float().to(device))
            parent.out_features = width + extra
        else:
            width, extra = len(self.start), 0
            _set_parameter(model, self._projection, nn.Parameter(torch.eye(width, device=self.start.device)))
        digest = hashlib.sha256(f"{base.image_digest} before {self._projection}".encode()).hexdigest()
        name = f"{base.name} before its projection"
        return base.with_model(model, name=name, digest=digest, image_digest=digest, embed_dim=width + extra)

    def _image_features(self, batch: Batch) -> Tensor:
        """Images, or features of `before_projection`, to (B, D); in training the penalty, too."""
        if self.training:
            self._penalty = self._pull * (self.weight - self.start).square().sum()
        if batch.images is not None:
            return super()._image_features(batch)
        layer: Any = self.model.get_submodule(self._projection.rpartition(".")[0])
        linear = isinstance(layer, nn.Linear)
        weight = self.weight if linear else self.weight.T
        if linear and layer.bias is not None:
            weight = torch.cat([weight, layer.bias[:, None]], dim=1)
        features = batch_features(batch, weight.shape[1])
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(F.linear(features.float(), weight), dim=-1)

    def published(self, shots: int, images_per_class: int) -> ProLIPSchedule:
        """Returns the paper's settings without validation images for k shots."""
        return ProLIPSchedule(pull=1 / (shots or images_per_class))

    def _learn(self, support: Support, schedule: ProLIPSchedule, loop: Loop) -> dict[str, Any]:
        self._pull = check_factor("pull", schedule.pull)
        views = min(schedule.views or schedule.epochs, schedule.epochs)
        features = support.features(views, min_scale=0.5, encoder=self.before_projection())
        loader = support.loader(features, batch_size=len(features))
        loop(
            support.training(
                self, loader, schedule.epochs, optimizer="adamw", lr=schedule.lr, weight_decay=0.0, eps=1e-4,
                schedule="cosine_per_step",
            )
        )  # fmt: skip
        self._pull, self._penalty = 0.0, torch.zeros(())
        return {
            "schedule": f"Adam {schedule.lr:g}, cosine, {schedule.epochs} steps of all images, "
            f"pulled to the start by {schedule.pull:g}"
        }

    def penalty(self) -> Tensor:
        """Returns lambda times the squared distance from the start in the last forward in training; 0 outside."""
        return self._penalty

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the projection."""
        return [self.weight]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the projection by its name in the model."""
        return {self._projection: self.weight.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {self._projection: self.start.shape}, "ProLIP")
        with torch.no_grad():
            self.weight.copy_(state[self._projection])

    @property
    def _made_with(self) -> str:
        return "ProLIP"

    @property
    def _decides(self) -> str:
        return "ProLIP"

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the projection in its place."""
        return share_weights(self.model, also_trainable=False).requires_grad_(False)


def projection_of(backbone: ClipBackbone) -> str:
    """Returns the name of the matrix that an image tower ends in.

    open_clip's ViTs have `visual.proj`, its ResNets `visual.attnpool.c_proj`, towers of timm `visual.head.proj` or the
    trunk's own last layer where open_clip takes that for it.

    Raises:
        BackboneError: there is none, or the tower is of another kind.
    """
    visual: Any = backbone.model.visual
    layer: Any = None
    if isinstance(visual, VisionTransformer):
        if visual.proj is not None:
            return "visual.proj"
    elif isinstance(visual, ModifiedResNet):
        layer = visual.attnpool.c_proj
    elif isinstance(visual, TimmModel):
        own, trunk = dict(visual.head.named_children()), cast("Any", visual.trunk)
        layer = own.get("proj") if own else trunk.get_classifier()
    for name, module in backbone.model.named_modules():
        if module is layer and isinstance(module, nn.Linear):
            return f"{name}.weight"
    raise BackboneError(
        f"the image tower of {backbone.name} ({type(visual).__name__}) ends in no single projection matrix, which is "
        "what ProLIP tunes; it works on open_clip's ViTs and ResNets and on towers of timm with a linear projection. "
        "LayerNorm tuning or LoRA work here too."
    )


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, parameter)
