"""What an adapter comes to once it is trained: an image tower with its weights settled, and a fixed head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.artifact import AdaptedModel
from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.methods.head import Head


class ImageClassifier(nn.Module):
    """Pictures to features, logits and probabilities, in one graph without any text tower.

    Args:
        visual: image tower: (B, 3, H, W) to (B, D).
        head: on its unit-norm features.
    """

    weight: Tensor
    bias: Tensor
    keys: Tensor
    votes: Tensor
    sharpness: Tensor

    def __init__(self, visual: nn.Module, head: Head) -> None:
        super().__init__()
        self.visual: Any = visual
        self.has_keys, self.sigmoid = head.keys is not None, head.sigmoid
        for name, tensor in head.tensors().items():
            self.register_buffer(name, tensor)
        self.requires_grad_(False).train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (B, D) unit-norm features, (B, C) logits and (B, C) probabilities of (B, 3, H, W) pixels."""
        features = self.visual(pixels)
        # Captioning models give their tokens as well.
        features = F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)
        logits = features @ self.weight.T + self.bias
        if self.has_keys:
            logits = logits + torch.exp(-self.sharpness * (1 - features @ self.keys.T)) @ self.votes
        return features, logits, logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)


@torch.no_grad()
def head_of(model: AdaptedModel) -> Head:
    """Returns the fixed head of a loaded artifact.

    Raises:
        ArtifactError: the method has none.
    """
    try:
        return model.adapter.head()
    except ConfigError as error:
        method = model.manifest["method"]
        raise ArtifactError(
            f"{method!r} cannot be exported as a classifier: {error}. Use the artifact itself: "
            "adaptclip.load(FOLDER).predict(images)."
        ) from error


def check_stock_tower(model: AdaptedModel) -> None:
    """Raises ArtifactError for a method whose image tower open_clip does not build."""
    if not model.adapter.stock_image_tower:
        raise ArtifactError(
            f"{model.manifest['method']!r} leaves as `--to onnx` alone: its image tower carries prompts in its blocks, "
            "and open_clip builds none that does"
        )


def merged_model(model: AdaptedModel) -> Any:
    """Returns a stock open_clip model whose towers are those that a loaded artifact predicts with."""
    return model.adapter.merged_model()
