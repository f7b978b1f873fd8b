# SPDX-License-Identifier: Apache-2.0
"""Cross-modal adaptation: the class names' text features are further training examples of a linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import zero_shot_weights

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch


@dataclass(frozen=True)
class CrossModalSchedule(Schedule):
    """How the head learns (sec. 4 and the published code): AdamW, 50 warm steps, a cosine per step.

    The published code tries learning rates of 1e-3 and 1e-4 and weight decays of 0, 1e-4 and 0.01 on validation images
    and stops by them; here they are the first and the last, and the bench searches (`--search-trials`).

    Attributes:
        steps: optimizer steps; 12,800 at most in the paper.
        lr: peak learning rate.
        weight_decay: decoupled.
        batch_size: images per process and step; half of the paper's 8, whose other half are texts.
        views: sets of crops, 0 for the evaluation transform; the published code takes it and its mirror image.
    """

    steps: int = 12_800
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 4
    views: int = 0


class CrossModal(Method):
    """A linear head on images and class names alike (Lin et al., CVPR 2023, arXiv:2301.06267).

    A step's loss is the mean cross-entropy over images, and over the text features of class names, which count as one
    more shot each; the logits are scale · f·w_c with w_c starting at the text features, which is zero-shot.

    What differs from the published code: every step sees all texts, where there as many are drawn as there are images
    (of which this is the mean); the two means are added and not averaged, which AdamW does not see; and the last step
    is taken instead of the best on validation images.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; each prompt of a class is a text example of it.

    Raises:
        ConfigError: there is no class name.
        BackboneError: a prompt is longer than the context.
    """

    name = "cross_modal"
    variants = {"cross_modal": Variant(9.5, search={"lr": (1e-4, 1e-2), "weight_decay": [0.0, 0.01, 1e-4]})}
    schedule_type = CrossModalSchedule
    smoke = {"steps": 400, "batch_size": 32}
    learns_by_steps = True
    text: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        names = self._sit_on(backbone, class_names)
        self.templates = tuple(templates)
        start = zero_shot_weights(backbone, names, self.templates)
        alone = [zero_shot_weights(backbone, names, [template]) for template in self.templates]
        self.register_buffer("text", torch.stack(alone), persistent=False)  # (P, C, D)
        self.weight = nn.Parameter(start.clone())
        self._penalty: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same method again, beside backbone and class names."""
        return {"templates": list(self.templates)}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features, and in training computes the loss of the texts."""
        features = batch_features(batch, self.weight.shape[1])
        if self.training and torch.is_grad_enabled():
            self._penalty = self._text_loss()
        return scaled_logits(features, self.weight, self.backbone.logit_scale)

    def _text_loss(self) -> Tensor:
        """Mean cross-entropy of the (P, C) texts, each of its class."""
        logits = scaled_logits(self.text.flatten(0, 1), self.weight, self.backbone.logit_scale)
        labels = torch.arange(self.text.shape[1], device=logits.device).repeat(len(self.text))
        return F.cross_entropy(logits, labels)

    def penalty(self) -> Tensor:
        """Returns the loss of the texts of the last forward in training; 0 outside."""
        return super().penalty() if self._penalty is None else self._penalty

    def _learn(self, support: Support, schedule: CrossModalSchedule, loop: Loop) -> dict[str, Any]:
        loader = support.loader(support.features(schedule.views), batch_size=schedule.batch_size)
        loop(
            support.training(
                self, loader, schedule.steps, optimizer="adamw", lr=schedule.lr, weight_decay=schedule.weight_decay,
                schedule="cosine_per_step", warmup_steps=min(50, schedule.steps - 1),
            )
        )  # fmt: skip
        self._penalty = None
        return {
            "schedule": f"AdamW {schedule.lr:g}, cosine, {schedule.steps} steps of {schedule.batch_size} images and "
            f"{self.text.shape[0] * self.text.shape[1]} texts"
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the (C, D) weights."""
        return [self.weight]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) weights, which have a norm of their own."""
        return {"weight": self.weight.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"weight": self.weight.shape}, "a cross-modal head")
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) weights as they are: their norms are part of the logits."""
        return self.weight.detach()
