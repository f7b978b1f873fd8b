"""What a trained method comes to: an image tower with its weights settled, and a fixed head on its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Tensors that turn unit-norm image features f into logits, the logit scale included.

        logit_c = f·weight_c + bias_c  [+ sum over j of exp(-sharpness · (1 - f·keys_j)) · votes_jc]

    Attributes:
        encoder: the model that makes the features: the frozen CLIP, or the adapted one.
        weight: (C, D), times the logit scale.
        bias: (C,).
        scale: the logit scale that is in the weights.
        keys: (K, D) of a cache model, else None.
        votes: (K, C) of a cache model, else None.
        sharpness: beta of a cache model.
        sigmoid: whether a probability is of its class by itself; otherwise they are of one class, by the softmax.
    """

    encoder: Any
    weight: Tensor
    bias: Tensor
    scale: float
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

    def logits(self, features: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, D) unit-norm features."""
        logits = features @ self.weight.T + self.bias
        if self.keys is not None and self.votes is not None:
            logits = logits + torch.exp(-self.sharpness * (1 - features @ self.keys.T)) @ self.votes
        return logits
