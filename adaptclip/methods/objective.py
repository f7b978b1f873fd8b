"""What an adapter's logits are for, and what the sigmoid objective adds to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptclip.methods.base import scaled_logits
from adaptclip.training.criterion import ObjectiveName
from adaptclip.types import Features

if TYPE_CHECKING:
    from adaptclip.backbone import ClipBackbone
    from adaptclip.feature_clip import FeatureClip

_MOST_LOGITS = 2**22
"""Logits whose mean is brought to its place at a time, to bound the memory."""


def objective_of(adapter: Any) -> ObjectiveName:
    """What an adapter's logits are for; adapters that know no objective are for the softmax."""
    return getattr(adapter, "objective", "softmax")


class ClassBias(nn.Module):
    """What the sigmoid objective adds to the logits of each class: a fixed start and a learnt offset from it.

    SigLIP models start at their own bias (Zhai et al. 2023, sec. 3.2), so that the first logits are their own. Others
    have none, and cosines of 0.2 times a scale of 100 would call every class certain; `begin` sets the start from the
    training images. Weight decay draws the offset to 0, and so to the start.

    Args:
        backbone: gives the start where it has a bias; otherwise it is that of the probability 1/C at a cosine of 0.
        num_classes: C.
    """

    start: Tensor

    def __init__(self, backbone: ClipBackbone | FeatureClip, num_classes: int) -> None:
        super().__init__()
        own = backbone.logit_bias
        start = -math.log(max(num_classes - 1, 1)) if own is None else float(own)
        self.from_model = own is not None
        self.register_buffer("start", torch.full((num_classes,), start, device=backbone.device), persistent=False)
        self.offset = nn.Parameter(torch.zeros(num_classes, device=backbone.device))

    def forward(self, scale: float = 1.0) -> Tensor:
        """Returns (C,) biases, with `scale` (0 to 1) of the learnt offset."""
        return self.start + scale * self.offset

    @torch.no_grad()
    def begin(self, features: Features, class_weights: Tensor, logit_scale: Tensor) -> None:
        """Sets the start so that each class's mean probability on the training images is its share of them.

        It is the most likely bias for the logits as they are. A model's own bias stays.

        Args:
            features: of the training images, of which the first view is read.
            class_weights: (C, D) unit-norm text features of the classes.
            logit_scale: scalar.
        """
        if self.from_model:
            return
        values, step = features.values[0], max(1, _MOST_LOGITS // max(1, len(features)))
        for low in range(0, len(class_weights), step):
            weights = class_weights[low : low + step]
            logits = scaled_logits(values.to(weights.device), weights, logit_scale).cpu().double()
            positive = features.labels.cpu()[:, None] == torch.arange(low, low + len(weights))
            self.start[low : low + step] = matching_bias(logits, positive).float().to(self.start.device)

    def state(self) -> dict[str, Tensor]:
        """Returns "bias_start" and "bias_offset", (C,) each."""
        return {"bias_start": self.start, "bias_offset": self.offset.detach()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` returned, checked before."""
        self.start.copy_(state["bias_start"])
        self.offset.copy_(state["bias_offset"])


def matching_bias(logits: Tensor, positive: Tensor) -> Tensor:
    """The bias at which each class's mean probability is its share of positives, by bisection.

    At it the binary cross-entropy has no slope along the bias, so it is the most likely one. A class with no positive
    image, or with nothing else, counts as half an image away from that: its most likely bias would be infinite.

    Args:
        logits: (N, C) float64 without bias.
        positive: (N, C) bool.

    Returns:
        (C,) float64.
    """
    half = 0.5 / len(logits)
    share = positive.double().mean(dim=0).clamp(half, 1 - half)
    # The mean of the probabilities lies between those of the lowest and of the highest logit.
    low, high = torch.logit(share) - logits.amax(dim=0), torch.logit(share) - logits.amin(dim=0)
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.sigmoid(logits + middle).mean(dim=0) > share
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
