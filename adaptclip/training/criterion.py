# SPDX-License-Identifier: Apache-2.0
"""What is learnt to tell, and its loss: which one class it is (softmax), or yes or no for each class (sigmoid)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from torch.nn import functional as F

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.training.thresholds import ThresholdRule

if TYPE_CHECKING:
    from torch import Tensor

ObjectiveName = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Objective:
    """A recipe's `--objective`.

    Attributes:
        name: "softmax" or "sigmoid".
        thresholds: rule of the thresholds under sigmoid; not used by softmax.
    """

    name: ObjectiveName = "softmax"
    thresholds: ThresholdRule = field(default_factory=ThresholdRule)

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
