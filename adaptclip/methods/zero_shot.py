"""The pretrained CLIP as it is: each class is the mean of its templates' text features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptclip.backbone import ClipBackbone
from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.prompts import zero_shot_weights
from adaptclip.types import Batch


class ZeroShotClassifier(nn.Module):
    """Zero-shot classification with a prompt ensemble (Radford et al. 2021, sec. 3.1.4). Nothing is learnt.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids.
        templates: prompts with one `{}` for the class name; their features are averaged per class.

    Raises:
        BackboneError: a prompt is longer than the context.
    """

    consumes: Literal["features", "pixels"] = "features"
    weights: Tensor

    def __init__(
        self, backbone: ClipBackbone, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.templates = tuple(templates)
        weights = zero_shot_weights(backbone, tuple(class_names), self.templates)
        self.register_buffer("weights", weights, persistent=False)

    @property
    def encoder(self) -> ClipBackbone:
        """The backbone."""
        return self.backbone

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same classifier again."""
        return {"templates": list(self.templates)}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.weights.shape[1])
        return scaled_logits(features, self.weights, self.backbone.logit_scale)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns nothing: there is no training."""
        return []

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) class weights."""
        return {"class_weights": self.weights}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the class weights. Raises ArtifactError when they do not fit."""
        check_state(state, {"class_weights": self.weights.shape}, "a zero-shot classifier")
        self.weights.copy_(state["class_weights"])

    def penalty(self) -> Tensor:
        """Returns 0."""
        return torch.zeros((), device=self.weights.device)

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm class weights."""
        return self.weights
