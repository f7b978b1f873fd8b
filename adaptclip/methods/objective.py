"""What an adapter learns to tell: which one class it is (softmax), or yes or no for each class (sigmoid)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone import ClipBackbone
from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.methods.base import scaled_logits
from adaptclip.types import Features

ObjectiveName = Literal["softmax", "sigmoid"]

RuleKind = Literal["f1", "sensitivity", "fixed"]

_MOST_LOGITS = 2**22
"""Logits whose mean is brought to its place at a time, to bound the memory."""


@dataclass(frozen=True)
class ThresholdRule:
    """How the probability from which a class is named is chosen, for each class by itself.

    Attributes:
        kind: "f1" is best on the validation images, "sensitivity" finds a wanted share of the positive ones, "fixed" is
            a number.
        value: the wanted sensitivity, above 0 to 1, or the number, 0 to 1; not used by "f1".
    """

    kind: RuleKind = "f1"
    value: float = 0.5

    def __str__(self) -> str:
        return {"f1": "f1", "sensitivity": f"sensitivity={self.value:g}", "fixed": f"{self.value:g}"}[self.kind]


@dataclass(frozen=True)
class Objective:
    """A recipe's `--objective`.

    Attributes:
        name: "softmax" or "sigmoid".
        thresholds: rule of the thresholds under sigmoid; not used by softmax.
    """

    name: ObjectiveName = "softmax"
    thresholds: ThresholdRule = ThresholdRule()

    def __str__(self) -> str:
        return "softmax" if self.name == "softmax" else f"sigmoid:{self.thresholds}"


def parse_objective(text: str) -> Objective:
    """Reads `softmax`, `sigmoid`, `sigmoid:f1` (the same), `sigmoid:sensitivity=0.9` or `sigmoid:0.5`.

    Raises:
        ConfigError: an unknown objective or rule (with the nearest name), or a number out of range.
    """
    name, _, rule = (part.strip() for part in text.partition(":"))
    check_objective(name)
    if name == "softmax":
        if rule:
            raise ConfigError(f"softmax names the most probable class and has no thresholds, got {text!r}; use sigmoid")
        return Objective()
    kind, _, value = (part.strip() for part in rule.partition("="))
    if not value and _is_number(kind):
        kind, value = "fixed", kind
    if kind in ("", "f1") and not value:
        return Objective("sigmoid")
    if kind not in ("sensitivity", "fixed"):
        raise ConfigError(
            f"unknown rule {rule!r} of thresholds. {did_you_mean(kind, ('f1', 'sensitivity'))} Examples: sigmoid:f1, "
            "sigmoid:sensitivity=0.9, sigmoid:0.5."
        )
    number = float(value) if _is_number(value) else math.nan
    if not (0 < number <= 1 or (kind == "fixed" and number == 0)):
        wanted = "a sensitivity above 0, up to 1" if kind == "sensitivity" else "a threshold from 0 to 1"
        raise ConfigError(f"sigmoid:{rule} needs {wanted}, got {value or 'none'}")
    return Objective("sigmoid", ThresholdRule("fixed" if kind == "fixed" else "sensitivity", number))


def check_objective(name: str) -> None:
    """Raises ConfigError unless it is the name of an objective."""
    if name not in get_args(ObjectiveName):
        raise ConfigError(f"unknown objective {name!r}. {did_you_mean(name, get_args(ObjectiveName))}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def objective_of(adapter: Any) -> ObjectiveName:
    """What an adapter's logits are for; adapters that know no objective are for the softmax."""
    return getattr(adapter, "objective", "softmax")


def sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropies of the classes, summed over them: SigLIP's loss with classes in the place of texts.

    Its mean over the images is eq. 1 of Zhai et al. 2023 (arXiv:2303.15343).

    Args:
        logits: (B, C).
        labels: (B,) class ids.

    Returns:
        (B,).
    """
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


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

    def __init__(self, backbone: ClipBackbone, num_classes: int) -> None:
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
