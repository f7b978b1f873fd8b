"""What an adapter comes to once it is trained: an image tower with its weights settled, and a fixed head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.artifact import AdaptedModel
from adaptclip.errors import ArtifactError
from adaptclip.methods.objective import objective_of


@dataclass(frozen=True)
class Head:
    """Tensors that turn unit-norm image features f into logits, the logit scale included.

        logit_c = f·weight_c + bias_c  [+ sum over j of exp(-sharpness · (1 - f·keys_j)) · votes_jc]

    Attributes:
        weight: (C, D).
        bias: (C,).
        keys: (K, D) of a cache model, else None.
        votes: (K, C) of a cache model, else None.
        sharpness: beta of a cache model.
        sigmoid: whether a probability is of its class by itself; otherwise they are of one class, by the softmax.
    """

    weight: Tensor
    bias: Tensor
    keys: Tensor | None = None
    votes: Tensor | None = None
    sharpness: float = 0.0
    sigmoid: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of all that there are; `sharpness` is one of them where there are keys."""
        named = {"weight": self.weight, "bias": self.bias}
        if self.keys is not None and self.votes is not None:
            named |= {"keys": self.keys, "votes": self.votes, "sharpness": torch.tensor(self.sharpness)}
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in named.items()}


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


def _cosines(adapter: Any) -> Head:
    weight = adapter.backbone.logit_scale * adapter.class_weights()
    if objective_of(adapter) == "sigmoid":
        return Head(weight, adapter.class_bias(), sigmoid=True)
    return Head(weight, torch.zeros(len(weight)))


def _linear_probe(adapter: Any) -> Head:
    state = adapter.adapter_state()
    if adapter.head == "logistic":
        return Head(state["weight"], state["bias"])
    if adapter.head == "lp++":
        weight = state["weight"] + state["alpha"][:, None] * state["text"]
        return Head(weight, state.get("bias", torch.zeros(len(weight), device=weight.device)))
    return _cosines(adapter)


def _gda(adapter: Any) -> Head:
    zero_shot = adapter.backbone.logit_scale * adapter.text
    return Head(zero_shot + adapter.alpha * adapter.weights, adapter.alpha * adapter.biases)


def _tip_adapter(adapter: Any) -> Head:
    zero_shot = _cosines(adapter)
    return Head(zero_shot.weight, zero_shot.bias, adapter.keys, adapter.alpha * adapter.values, adapter.beta)


HEADS: dict[str, Callable[[Any], Head]] = {
    "zero_shot": _cosines,
    "coop": _cosines,
    "linear_probe": _linear_probe,
    "tip_adapter": _tip_adapter,
    "gda": _gda,
    "ss_text": _cosines,
    "lora": _cosines,
    "two_stage": _cosines,
}
"""Method -> how its head is read off."""

WITHOUT_HEAD: dict[str, str] = {
    "cocoop": "its text features are made anew for every image by the text tower, so there are no fixed class weights",
}
"""Method -> why it has no fixed head."""

MERGED: dict[str, Callable[[Any], nn.Module]] = {
    "lora": lambda adapter: adapter.merged_model(),
    "two_stage": lambda adapter: adapter.first.merged_model(),
}
"""Method -> the stock open_clip model with its update merged; the other methods leave the towers as they are."""


@torch.no_grad()
def head_of(model: AdaptedModel) -> Head:
    """Returns the fixed head of a loaded artifact.

    Raises:
        ArtifactError: the method has none.
    """
    method = model.manifest["method"]
    if method not in HEADS:
        reason = WITHOUT_HEAD.get(method, "it is not known how to read a fixed head off it")
        raise ArtifactError(
            f"{method!r} cannot be exported as a classifier: {reason}. Methods that can: {', '.join(HEADS)}. "
            "Use the artifact itself: adaptclip.load(FOLDER).predict(images)."
        )
    return HEADS[method](model.adapter)


def merged_model(model: AdaptedModel) -> Any:
    """Returns a stock open_clip model whose towers are those that a loaded artifact predicts with."""
    merge = MERGED.get(model.manifest["method"])
    return merge(model.adapter) if merge else model.backbone.model
