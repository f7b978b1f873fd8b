# SPDX-License-Identifier: Apache-2.0
"""The pretrained CLIP as it is: each class is the mean of its templates' text features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.method import Method, Variant
from adaptclip.prompts import zero_shot_weights

if TYPE_CHECKING:
    from torch import Tensor

    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.types import Batch


class ZeroShotClassifier(Method):
    """Zero-shot classification with a prompt ensemble (Radford et al. 2021, sec. 3.1.4). Nothing is learnt.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}` for the class name; their features are averaged per class.

    Raises:
        BackboneError: a prompt is longer than the context.
        ConfigError: there is no class name.
    """

    name = "zero_shot"
    variants = {"zero_shot": Variant(0, ladder=True), "ensemble": Variant(1, ladder=True, ensemble=True)}
    takes_new_names = True
    is_clip = True
    weights: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        names = self._sit_on(backbone, class_names)
        self.templates = tuple(templates)
        self.register_buffer("weights", zero_shot_weights(backbone, names, self.templates), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same classifier again."""
        return {"templates": list(self.templates)}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.weights.shape[1])
        return scaled_logits(features, self.weights, self.backbone.logit_scale)

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) class weights."""
        return {"class_weights": self.weights}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"class_weights": self.weights.shape}, "a zero-shot classifier")
        self.weights.copy_(state["class_weights"])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm class weights."""
        return self.weights

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a zero-shot classifier of other classes."""
        return ZeroShotClassifier(self.backbone, class_names, self.templates if templates is None else templates)
