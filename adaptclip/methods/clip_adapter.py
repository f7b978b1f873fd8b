# SPDX-License-Identifier: Apache-2.0
"""CLIP-Adapter: a small bottleneck network on the image features, mixed with the features themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import ConfigError
from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import zero_shot_weights
from adaptclip.seeding import generator

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch

REDUCTION = 4
"""The hidden layer has D / 4 units."""


@dataclass(frozen=True)
class ClipAdapterSchedule(Schedule):
    """How CLIP-Adapter learns, as its code inherits it from CoOp's: SGD (momentum 0.9, weight decay 5e-4) at 2e-3.

    The paper (sec. 4.1) gives a learning rate of 1e-5 without naming an optimizer.

    Attributes:
        epochs: passes over the training images.
        views: sets of random crops, taken in turn; None makes fresh ones for every epoch, as published.
        lr: peak learning rate; a first epoch at 1e-5, then a cosine per epoch.
        batch_size: images per process and step.
    """

    epochs: int = 200
    views: int | None = None
    lr: float = 2e-3
    batch_size: int = 32


class ClipAdapter(Method):
    """CLIP-Adapter on the image features (Gao et al. 2021, arXiv:2110.04544, sec. 3.2).

    With the unit-norm feature f of an image and the text features t_c,

        g = relu(W2 · relu(W1 · f)),    logit_c = scale · cos(ratio · g + (1 - ratio) · f, t_c)

    W1 (D to D / 4) and W2 (back to D), without biases, learn from torch's usual initial values, so that it does not
    start at zero-shot unless the ratio is 0. The published code hands the network features of the tower's own norm; as
    nothing in it has a bias, the logits and their gradients are the same for unit norm.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; their features are averaged per class.
        ratio: share of the network's output, 0 to 1; 0.2 in the published code.
        seed: of the initial weights.

    Raises:
        ConfigError: the ratio is out of range, or there is no class name.
        BackboneError: a prompt is longer than the context.
    """

    name = "clip_adapter"
    variants = {"clip_adapter": Variant(8.7, search={"lr": (2e-4, 2e-2), "ratio": [0.2, 0.4, 0.6]})}
    schedule_type = ClipAdapterSchedule
    smoke = {"epochs": 50, "views": 5}
    learns_by_steps = True
    text: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        ratio: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = self._sit_on(backbone, class_names)
        if not 0 <= ratio <= 1:
            raise ConfigError(f"ratio must be from 0 (zero-shot) to 1 (the network alone), got {ratio}")
        self.templates, self.ratio, self.seed = tuple(templates), float(ratio), seed
        text = zero_shot_weights(backbone, names, self.templates)
        self.register_buffer("text", text, persistent=False)
        width = text.shape[1]
        hidden, draws = max(1, width // REDUCTION), generator(seed, "bottleneck")
        self.down = nn.Parameter(_uniform((hidden, width), draws).to(text.device))
        self.up = nn.Parameter(_uniform((width, hidden), draws).to(text.device))

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same method again, beside backbone and class names."""
        return {"templates": list(self.templates), "ratio": self.ratio, "seed": self.seed}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.text.shape[1]).float()
        own = F.relu(F.relu(features @ self.down.T) @ self.up.T).float()
        mixed = F.normalize(self.ratio * own + (1 - self.ratio) * features, dim=-1)
        return scaled_logits(mixed, self.text, self.backbone.logit_scale)

    def _learn(self, support: Support, schedule: ClipAdapterSchedule, loop: Loop) -> dict[str, Any]:
        training = support.training_by_epochs(self, schedule, support.crops(schedule))
        loop(training)
        return {
            "schedule": f"SGD {schedule.lr:g}, cosine per epoch, {schedule.epochs} epochs ({training.num_steps} steps)"
        }

    def head(self) -> NoReturn:
        """Raises ConfigError: images pass through a network before they are compared."""
        self._lacks("has no fixed head: the image features pass through a network of its own before they are compared")

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the two matrices."""
        return [self.down, self.up]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (D / 4, D) and (D, D / 4) matrices."""
        return {"down": self.down.detach(), "up": self.up.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"down": self.down.shape, "up": self.up.shape}, "CLIP-Adapter")
        with torch.no_grad():
            self.down.copy_(state["down"])
            self.up.copy_(state["up"])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm text features; the network is not among them."""
        return self.text


def _uniform(shape: tuple[int, int], draws: torch.Generator) -> Tensor:
    """Torch's initial values of a Linear layer, whose bound is one over the root of its inputs, from a generator."""
    return torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=draws)
