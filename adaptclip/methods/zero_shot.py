# SPDX-License-Identifier: Apache-2.0
"""The pretrained CLIP as it is: each class is the mean of its templates' text features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from adaptclip.methods.base import ClassBias, batch_features, check_state, scaled_logits
from adaptclip.methods.method import Method, Variant
from adaptclip.prompts import zero_shot_weights
from adaptclip.training.criterion import ObjectiveName, check_objective

if TYPE_CHECKING:
    from torch import Tensor

    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.support import Loop, Support
    from adaptclip.training.thresholds import ThresholdRule
    from adaptclip.types import Batch


class ZeroShotClassifier(Method):
    """Zero-shot classification with a prompt ensemble (Radford et al. 2021, sec. 3.1.4). Nothing is learnt.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}` for the class name; their features are averaged per class.
        objective: "sigmoid" judges each class by itself. Then a bias for each class is learnt, and nothing else: that
            of the model (SigLIP), or one that fits images (`ClassBias.begin`), which changes no ranking of images.

    Raises:
        BackboneError: a prompt is longer than the context.
        ConfigError: there is no class name, or an unknown objective.
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
        objective: ObjectiveName = "softmax",
    ) -> None:
        super().__init__()
        check_objective(objective)
        self.objective: ObjectiveName = objective
        names = self._sit_on(backbone, class_names)
        self.templates = tuple(templates)
        self.register_buffer("weights", zero_shot_weights(backbone, names, self.templates), persistent=False)
        self.bias = ClassBias(backbone, len(names)) if objective == "sigmoid" else None

    @property
    def learns_from(self) -> Literal["nothing", "features", "images"]:
        """Nothing; under sigmoid features, for the bias that the model does not have."""
        return "nothing" if self.bias is None or self.bias.from_model else "features"

    def begin(self, support: Support, rule: ThresholdRule | None = None) -> ZeroShotClassifier:
        """Sets the bias of the sigmoid objective by training images; under softmax there is nothing to set.

        Where images may show several classes, the thresholds are chosen on the validation images as those of a method
        that learns are, so that the two can be compared.

        Args:
            support: the images.
            rule: of the thresholds; None is the best F1.
        """
        if self.learns_from == "features" and self.bias is not None:
            self.bias.begin(support.features(), self.weights, self.backbone.logit_scale)
            self._is_fitted = True
        if support.images.several:
            self.choose_thresholds(support, rule)
        return self

    def learn(self, support: Support, schedule: Any | None = None, loop: Loop | None = None) -> dict[str, Any]:
        """Learns nothing but the bias of `begin`."""
        self.begin(support)
        return super().learn(support, schedule, loop)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same classifier again."""
        objective = {} if self.bias is None else {"objective": self.objective}
        return {"templates": list(self.templates), **objective}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.weights.shape[1])
        return scaled_logits(features, self.weights, self.backbone.logit_scale, self.class_bias())

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective; None under softmax."""
        return None if self.bias is None else self.bias().detach()

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) class weights, and under sigmoid the bias."""
        return {"class_weights": self.weights, **({} if self.bias is None else self.bias.state())}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.adapter_state().items()}
        check_state(state, shapes, "a zero-shot classifier")
        self.weights.copy_(state["class_weights"])
        if self.bias is not None:
            self.bias.load_state(state)

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm class weights."""
        return self.weights

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a zero-shot classifier of other classes. Raises ConfigError where each class has a bias."""
        if self.bias is not None and not self.bias.from_model:
            self._lacks("has a bias for each class, and has none for others")
        prompts = self.templates if templates is None else templates
        return ZeroShotClassifier(self.backbone, class_names, prompts, self.objective)
