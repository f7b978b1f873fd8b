# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT: the whole image tower and a head from the text fine-tuned, then averaged with where they started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.attention import share_weights
from adaptclip.errors import ConfigError
from adaptclip.methods.base import Head, check_state
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.methods.tuned_towers import TunedTowers, check_full_precision

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch

WEIGHT, BIAS = "head_weight", "head_bias"


@dataclass(frozen=True)
class WiseFTSchedule(Schedule):
    """How WiSE-FT fine-tunes (README of the published code): AdamW with weight decay 0.1, gradients cut to length 1.

    Attributes:
        epochs: passes over the training images, cropped anew in each.
        lr: peak learning rate.
        batch_size: images per process and step.
        warmup_steps: of a linear rise, before a cosine per step to 0; at most a fifth of all steps.
    """

    epochs: int = 10
    lr: float = 3e-5
    batch_size: int = 512
    warmup_steps: int = 500


class WiseFT(TunedTowers):
    """WiSE-FT (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903).

    All weights of the image tower learn, and a head that starts as the scaled text features:

        logit_c = f · w_c + b_c,    w_c from scale · t_c,  b_c from 0

    Afterwards every weight theta_1 is moved back on the straight line to where it was (eq. 1):

        theta = (1 - alpha) · theta_0 + alpha · theta_1

    With alpha 0 it is the zero-shot classifier. It was published for all images of ImageNet. What differs from the
    published code: batch statistics stay as they are; with few steps the warm-up is a fifth of them; crops are the
    card's.

    Args:
        backbone: frozen CLIP in fp32, not changed.
        class_names: C names in the order of the label ids.
        alpha: how far to go, from 0 to 1; 0.5 is what the paper recommends without validation images.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.

    Raises:
        ConfigError: alpha is not from 0 to 1, or the backbone is in half precision.
        BackboneError: a prompt is too long.
    """

    name = "wise_ft"
    variants = {"wise_ft": Variant(16, search={"lr": (1e-6, 1e-4), "alpha": [0.3, 0.5, 0.7, 1.0]})}
    schedule_type = WiseFTSchedule
    smoke = {"epochs": 5, "batch_size": 32}
    takes_new_names = False
    is_clip = False

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        alpha: float = 0.5,
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha goes from 0 (zero-shot) to 1 (as fine-tuned), got {alpha}")
        check_full_precision(backbone, "WiSE-FT")
        model: Any = share_weights(backbone.model)
        names = [name for name, _ in backbone.model.named_parameters() if name.startswith("visual.")]
        for name in names:
            parent, _, part = name.rpartition(".")
            own = backbone.model.get_parameter(name).detach().clone()
            setattr(model.get_submodule(parent), part, nn.Parameter(own))
        self.alpha, self._names = float(alpha), tuple(names)
        self._take_towers(backbone, class_names, templates, "image", model)
        self.head_weight = nn.Parameter(self._start_head())
        self.head_bias = nn.Parameter(torch.zeros(len(class_names), device=backbone.device))

    def _start_head(self) -> Tensor:
        """(C, D) scaled text features."""
        return (self.backbone.logit_scale * self._prompts.frozen()).detach().clone()

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"alpha": self.alpha, "templates": list(self.templates)}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits: in training of images by what is being tuned, else at alpha.

        Raises:
            DataError: the batch has no images in training.
        """
        if self.training or torch.is_grad_enabled():
            features, weight, bias = self._image_features(batch), self.head_weight, self.head_bias
        else:
            features, (weight, bias) = self._take_snapshot().features(batch), self._head_now()
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), weight, bias)

    @torch.no_grad()
    def _head_now(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head at alpha."""
        return torch.lerp(self._start_head(), self.head_weight, self.alpha), self.alpha * self.head_bias

    def _learn(self, support: Support, schedule: WiseFTSchedule, loop: Loop) -> dict[str, Any]:
        loader = support.loader(batch_size=schedule.batch_size)
        num_steps = schedule.epochs * loader.steps_per_epoch
        training = support.training(
            self, loader, num_steps, optimizer="adamw", lr=schedule.lr, weight_decay=0.1, schedule="cosine_per_step",
            warmup_steps=min(schedule.warmup_steps, num_steps // 5),
        )  # fmt: skip
        learnt = self.trainable_parameters()
        hook = training.optimizer.register_step_pre_hook(lambda *_: cut_gradients(learnt))
        try:
            loop(training)
        finally:
            hook.remove()
        return {"schedule": f"AdamW {schedule.lr:g}, cosine, {schedule.epochs} epochs ({num_steps} steps)"}

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Method:
        """Raises ConfigError: the head is of the classes it learnt."""
        return Method.for_classes(self, class_names, templates)

    def head(self) -> Head:
        """Returns the head at alpha, on the image tower at alpha."""
        return Head(self.encoder, *self._head_now(), float(self.backbone.logit_scale))

    def class_weights(self) -> Tensor:
        """Returns the (C, D) weights of the head at alpha without the logit scale; their norms are their own."""
        return self._head_now()[0] / self.backbone.logit_scale

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns all weights of the image tower, and the head's."""
        return [*(self.model.get_parameter(name) for name in self._names), self.head_weight, self.head_bias]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns what was fine-tuned, at alpha 1: the image tower by the names in the model, and the head."""
        tower = {name: self.model.get_parameter(name).detach() for name in self._names}
        return {**tower, WEIGHT: self.head_weight.detach(), BIAS: self.head_bias.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, "WiSE-FT")
        for name, value in own.items():
            value.copy_(state[name])

    @property
    def _made_with(self) -> str:
        return "WiSE-FT"

    @property
    def _decides(self) -> str:
        return f"WiSE-FT {self.alpha}"

    @torch.no_grad()
    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model whose image tower is that at alpha."""
        merged = share_weights(self.model, also_trainable=False)
        for name in self._names:
            own = merged.get_parameter(name)
            own.copy_(torch.lerp(self.backbone.model.get_parameter(name), own, self.alpha))
        return merged.requires_grad_(False)


def cut_gradients(parameters: Sequence[nn.Parameter], length: float = 1.0) -> None:
    """Shortens the gradients of a step together to a length, where they are longer."""
    nn.utils.clip_grad_norm_(parameters, length)
