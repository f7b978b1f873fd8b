# SPDX-License-Identifier: Apache-2.0
"""An export is done only when what was written answers as the adapter it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptclip.data.transforms import decode_image
from adaptclip.datasets.embedded import digits
from adaptclip.errors import ArtifactError
from adaptclip.seeding import numpy_generator
from adaptclip.types import Batch

if TYPE_CHECKING:
    from adaptclip.artifact import AdaptedModel

BATCHES = (1, 2, 5)
"""Sizes of the first batches that are compared: a graph that was traced may hold on to the size it was traced with."""


@dataclass(frozen=True)
class Outputs:
    """What a classifier says of B images.

    Attributes:
        features: (B, D) float32, unit norm.
        logits: (B, C) float32.
        probabilities: (B, C) float32.
    """

    features: Tensor
    logits: Tensor
    probabilities: Tensor


Reader = Callable[[Sequence[Image.Image]], Outputs]
"""A written export, loaded again by stock libraries: RGB images to outputs."""


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between an export and the adapter it came from.

    Attributes:
        features: of unit-norm features.
        cosines: of logits, divided by the logit scale, or by the largest logit where that is larger.
        probabilities: of class probabilities.
        num_pictures: on how many pictures.
        same_label: on how many of them the most probable class is the same.
    """

    features: float
    cosines: float
    probabilities: float
    num_pictures: int
    same_label: int

    def __str__(self) -> str:
        return (
            f"largest difference from the adapter on {self.num_pictures} images: probabilities "
            f"{self.probabilities:.1e}, logits / scale {self.cosines:.1e}, features {self.features:.1e}; same label on "
            f"{self.same_label}"
        )


def check_pictures() -> list[Image.Image]:
    """Returns the images that every export is compared on: handwritten digits, and noise of several shapes."""
    pictures = [decode_image(png, row="digit") for png in digits().images[:12]]
    draw = numpy_generator(0, "pictures for checking exports")
    for width, height in ((64, 64), (300, 200), (200, 300), (97, 33), (512, 512), (225, 224)):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pictures.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return pictures


@torch.inference_mode()
def live_outputs(model: AdaptedModel, pictures: Sequence[Image.Image]) -> Outputs:
    """Returns what the loaded artifact itself says."""
    pixels = torch.stack([model.backbone.transform(picture) for picture in pictures])
    index = torch.arange(len(pixels))
    features = model.adapter.encoder.encode_image(pixels)
    logits = model.adapter(Batch(labels=index, index=index, features=features)).float()
    return Outputs(features.float(), logits, model.probabilities(pictures))


def compare(
    model: AdaptedModel, read: Reader, pictures: Sequence[Image.Image], *, tolerance: float, batch_size: int = 16
) -> Difference:
    """Compares a written export with the adapter it came from, in batches of several sizes.

    Args:
        model: the loaded artifact.
        read: the export.
        pictures: one or more RGB pictures.
        tolerance: largest allowed difference of features, of logits divided as in Difference, and of probabilities.
        batch_size: images per batch after the first few.

    Raises:
        ArtifactError: a difference is above the tolerance, or is not a number.
    """
    scale = max(1.0, float(model.backbone.logit_scale))
    worst = {"features": 0.0, "cosines": 0.0, "probabilities": 0.0}
    same, start, sizes = 0, 0, list(BATCHES)
    while start < len(pictures):
        chunk = pictures[start : start + (sizes.pop(0) if sizes else batch_size)]
        start += len(chunk)
        live, written = live_outputs(model, chunk), read(chunk)
        # Rounding grows with the numbers: a head fitted to a handful of images may have logits of thousands.
        largest = max(scale, float(live.logits.abs().max()))
        for name, factor in (("features", 1.0), ("logits", 1 / largest), ("probabilities", 1.0)):
            own, other = getattr(live, name), getattr(written, name)
            if own.shape != other.shape:
                raise ArtifactError(f"the export gives {name} of shape {tuple(other.shape)}, not {tuple(own.shape)}")
            key = "cosines" if name == "logits" else name
            # max() would drop a NaN.
            gap = float((own - other).abs().nan_to_num(float("inf")).max()) * factor
            worst[key] = max(worst[key], gap)
        same += int((live.probabilities.argmax(1) == written.probabilities.argmax(1)).sum())
    found = Difference(**worst, num_pictures=len(pictures), same_label=same)
    if max(worst.values()) > tolerance:
        raise ArtifactError(
            f"the export does not answer as the adapter does, and was not kept: {found}; allowed is {tolerance:g}. "
            "Please report it with the method and the backbone."
        )
    return found
