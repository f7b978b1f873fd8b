# SPDX-License-Identifier: Apache-2.0
"""What is learnt to tell, and its loss: which one class it is (softmax), or yes or no for each class (sigmoid)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

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


class HasLabels(Protocol):
    """Images, as far as their labels are concerned."""

    @property
    def several(self) -> bool:
        """Whether an image may show several classes, or none of them."""
        ...


def parse_objective(text: str, images: HasLabels | None = None) -> Objective:
    """Reads `auto`, `softmax`, `sigmoid`, `sigmoid:f1` (the same), `sigmoid:sensitivity=0.9` or `sigmoid:0.5`.

    Args:
        text: the setting; "auto" is sigmoid for images that may show several classes, and softmax for others.
        images: what is learnt from; None stands for images of one class each.

    Raises:
        ConfigError: an unknown objective or rule (with the nearest name), a number out of range, or the softmax for
            images that may show several classes.
    """
    name, _, rule = (part.strip() for part in text.partition(":"))
    if name == "auto" and not rule:
        return Objective("sigmoid" if images is not None and images.several else "softmax")
    check_objective(name)
    check_several(images, name)
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


def check_several(images: HasLabels | None, objective: str) -> None:
    """Raises ConfigError for the softmax, or a method that has no other, and images that may show several classes."""
    if images is not None and images.several and objective != "sigmoid":
        raise ConfigError(
            "the images may show several classes, or none of them, and a softmax names exactly one. Take the objective "
            "sigmoid; these have it: linear_probe.py (logistic, text_init, clap), coop.py, lora.py, tip_adapter.py "
            "(tip_adapter, tip_adapter_f, gda), zero_shot.py"
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def marks_of(labels: Tensor, num_classes: int, multi_hot: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What each image shows, and of which classes that is known.

    Args:
        labels: (B,) class ids.
        num_classes: C.
        multi_hot: (B, C) 1, 0 and -1, as in `Batch`; None where each image shows the class of its label alone.

    Returns:
        (B, C) bool, whether the image shows the class, and (B, C) bool, whether that is known, or None for all.
    """
    if multi_hot is None:
        return F.one_hot(labels, num_classes).bool(), None
    return multi_hot == 1, multi_hot >= 0


def sigmoid_losses(logits: Tensor, labels: Tensor, multi_hot: Tensor | None = None) -> Tensor:
    """Binary cross-entropies of the classes, summed over them: SigLIP's loss with classes in the place of texts.

    Its mean over the images is eq. 1 of Zhai et al. 2023 (arXiv:2303.15343).

    Args:
        logits: (B, C).
        labels: (B,) class ids.
        multi_hot: (B, C) where images may show several classes (`Batch`); what nobody knows adds nothing.

    Returns:
        (B,).
    """
    positive, known = marks_of(labels, logits.shape[1], multi_hot)
    losses = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return (losses if known is None else losses * known).sum(dim=1)
