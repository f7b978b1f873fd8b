# SPDX-License-Identifier: Apache-2.0
"""TaskRes: a learnt residual added to the text features, with CLIP and its text features frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.choosing import check_factor
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import zero_shot_weights

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch


@dataclass(frozen=True)
class TaskResSchedule(Schedule):
    """How TaskRes learns (sec. 4.1 and the published code): Adam, a first epoch at 1e-5 and a cosine per epoch.

    Attributes:
        epochs: passes over the training images; 100 for 1, 2 and 4 shots, 200 for 8 and 16.
        views: sets of random crops, taken in turn; None makes fresh ones for every epoch, as published.
        lr: peak learning rate; the paper takes 2e-4 on ImageNet.
        batch_size: images per process and step.
    """

    epochs: int = 200
    views: int | None = None
    lr: float = 2e-3
    batch_size: int = 256


class TaskResidual(Method):
    """TaskRes (Yu et al., "Task Residual for Tuning Vision-Language Models", CVPR 2023, arXiv:2211.10277).

    Images are compared with t_c + alpha · x_c, where t_c are the unit-norm text features and x_c learns from 0 (eq. 5):

        logit_c = scale · cos(f, t_c + alpha · x_c)

    This is the regular form; the enhanced one starts from a head that was trained before. What differs from the
    published code: crops are those of the card, Adam's weight decay of 5e-4 is decoupled (AdamW).

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; their features are averaged per class.
        alpha: weight of the residual, above 0; the paper takes 0.5, for Flowers102 1.

    Raises:
        ConfigError: alpha is out of range, or there is no class name.
        BackboneError: a prompt is longer than the context.
    """

    name = "task_residual"
    variants = {"task_residual": Variant(8.5, search={"lr": (2e-4, 2e-2), "alpha": [0.3, 0.5, 1.0]})}
    schedule_type = TaskResSchedule
    smoke = {"epochs": 50, "views": 5}
    learns_by_steps = True
    text: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        names = self._sit_on(backbone, class_names)
        self.templates, self.alpha = tuple(templates), check_factor("alpha", alpha)
        text = zero_shot_weights(backbone, names, self.templates)
        self.register_buffer("text", text, persistent=False)
        self.residual = nn.Parameter(torch.zeros_like(text))

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same method again, beside backbone and class names."""
        return {"templates": list(self.templates), "alpha": self.alpha}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.text.shape[1])
        return scaled_logits(features, self._weights(), self.backbone.logit_scale)

    def published(self, shots: int, images_per_class: int) -> TaskResSchedule:
        """Returns the paper's length for k shots."""
        return TaskResSchedule(epochs=100 if 0 < shots <= 4 else 200)

    def _learn(self, support: Support, schedule: TaskResSchedule, loop: Loop) -> dict[str, Any]:
        training = support.training_by_epochs(self, schedule, support.crops(schedule), optimizer="adamw")
        loop(training)
        length = f"{schedule.epochs} epochs ({training.num_steps} steps)"
        return {"schedule": f"AdamW {schedule.lr:g}, cosine per epoch, {length}"}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the (C, D) residual."""
        return [self.residual]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) residual."""
        return {"residual": self.residual.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"residual": self.residual.shape}, "TaskRes")
        with torch.no_grad():
            self.residual.copy_(state["residual"])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm sums, without gradients."""
        return self._weights().detach()

    def _weights(self) -> Tensor:
        return F.normalize(self.text + self.alpha * self.residual, dim=-1)
