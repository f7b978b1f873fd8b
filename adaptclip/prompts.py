# SPDX-License-Identifier: Apache-2.0
"""Class names into prompts, and prompts into the weights of a zero-shot classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import ConfigError, DataError
from adaptclip.progress import progress_bar

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "aircraft": ("a photo of a {}, a type of aircraft.",),
    "texture": ("{} texture.",),
    "satellite": ("a centered satellite photo of {}.",),
    "food": ("a photo of {}, a type of food.",),
    "action": ("a photo of a person doing {}.",),
    "imagenet": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Published templates by domain (CoOp, arXiv:2109.01134; `imagenet` is CLIP's ensemble of seven); {} is the name."""


def clean_class_name(name: str) -> str:
    """Returns a class name as words: underscores become spaces, runs of white space one space.

    Raises:
        DataError: nothing is left.
    """
    cleaned = " ".join(name.replace("_", " ").split())
    if not cleaned:
        raise DataError(f"class name {name!r} has no words; give it a name, or an alias in the card")
    return cleaned


def fill(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Puts every class name into every template.

    Args:
        templates: P templates, each with one `{}`; other braces stay as they are.
        names: C class names, cleaned here.

    Returns:
        C lists of P prompts.

    Raises:
        ConfigError: no templates, or one without exactly one `{}`.
        DataError: a class name without words.
    """
    if isinstance(templates, str) or not templates:
        raise ConfigError(f"templates should be a list with at least one template, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"template {template!r} should have {{}} exactly once, where the class name goes, "
                f"got {template.count('{}')} times; for example {TEMPLATES['photo'][0]!r}"
            )
    return [[template.replace("{}", name) for template in templates] for name in map(clean_class_name, names)]


@torch.no_grad()
def zero_shot_weights(
    backbone: ClipBackbone | FeatureClip,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Returns the classifier that CLIP makes of words alone (Radford 2021, section 3.1.4).

    Each class is the mean of its prompts' unit-norm features, normalised again.

    Args:
        backbone: the model whose text tower reads the prompts. Where only features are known, those of the classes are
            taken, and the templates are not read.
        class_names: C class names.
        templates: P templates with one `{}` each.
        batch_size: prompts encoded at once.

    Returns:
        (C, D) float32, unit norm, on the backbone's device.

    Raises:
        BackboneError: a prompt is longer than the context; nothing is ever cut.
        ConfigError: a template is not valid.
        DataError: a class name without words, or no classes.
    """
    if not class_names:
        raise DataError("zero-shot weights need at least one class name, got none")
    known = getattr(backbone, "class_features", None)
    if known is not None:
        return known(class_names)
    prompts = [prompt for per_class in fill(templates, class_names) for prompt in per_class]
    tokens = backbone.tokenize(prompts)
    chunks = progress_bar(tokens.split(batch_size), desc="Encoding prompts", unit="batch", leave=False, delay=2)
    features = torch.cat([backbone.encode_text(chunk) for chunk in chunks])
    return F.normalize(features.reshape(len(class_names), len(templates), -1).mean(dim=1), dim=-1)
