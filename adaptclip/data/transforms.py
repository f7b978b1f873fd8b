"""Training augmentation: seeded per sample, on uint8 pixels; the evaluation transform belongs to the checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from adaptclip.errors import ConfigError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Augment:
    """Random views of an image. One object serves one thread at a time; worker processes get copies.

    Attributes:
        size: side of a view in pixels.
        spec: what is done, as JSON text that is equal when and only when the views are (part of a cache key).
        compose: the albumentations pipeline.
    """

    size: int
    spec: str
    compose: Any = field(repr=False)

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        """Returns the view of an RGB image that the seed alone decides.

        The pipeline is seeded for every call, because its own streams are equal in all DataLoader workers and start
        again with each epoch.

        Args:
            image: an RGB image.
            seed: at least 0; for a numbered view, derived from the image's digest and the number.

        Returns:
            (size, size, 3) uint8 pixels, not normalised.
        """
        if seed < 0:
            raise ConfigError(f"an augmentation seed must be at least 0, got {seed}")
        if image.mode != "RGB":
            raise ConfigError(f"augmentation needs an RGB image, got mode {image.mode}; decode it with decode_image")
        self.compose.set_random_seed(seed)
        return self.compose(image=np.asarray(image))["image"]


def train_augment(size: int, *, scale: tuple[float, float] = (0.08, 1.0), horizontal_flip: bool = True) -> Augment:
    """Builds the published training transform: a random resized crop, mirrored half of the time (CoOp, sec. 4.1).

    Pixels are averaged where the crop is larger than the view and interpolated bicubically where it is smaller, which
    comes nearest to the antialiased bicubic resizing of the evaluation transform.

    Args:
        size: side of a view in pixels.
        scale: smallest and largest share of the image's area in a crop, above 0 and at most 1.
        horizontal_flip: whether views may be mirrored; wrong for digits, text and anything with a handedness.

    Raises:
        ConfigError: a value is out of range, or albumentations does not know an argument.
    """
    # Imported here: it takes seconds, and evaluation never augments.
    import albumentations
    import cv2

    low, high = scale
    if size < 1:
        raise ConfigError(f"the side of a training view must be at least 1 pixel, got {size}")
    if not 0 < low <= high <= 1:
        raise ConfigError(f"scale is two shares of the area with 0 < low <= high <= 1, got {list(scale)}")
    crop = build_strictly(
        albumentations.RandomResizedCrop,
        size=(size, size),
        scale=(low, high),
        ratio=(3 / 4, 4 / 3),
        interpolation=cv2.INTER_CUBIC,
        area_for_downscale="image",
    )
    flip = [build_strictly(albumentations.HorizontalFlip, p=0.5)] if horizontal_flip else []
    spec = {
        "kind": "random_resized_crop",
        "size": size,
        "scale": [low, high],
        "ratio": [3 / 4, 4 / 3],
        "interpolation": "cubic, area for downscale",
        "horizontal_flip": horizontal_flip,
        "albumentations": albumentations.__version__,
    }
    return Augment(size, json.dumps(spec, sort_keys=True), albumentations.Compose([crop, *flip]))


def build_strictly(make: Callable[..., _T], **arguments: Any) -> _T:
    """Calls `make`, and turns the warning that albumentations gives for an unknown argument into an error.

    Raises:
        ConfigError: an argument is unknown, was removed, or has a value that is not allowed.
    """
    name = getattr(make, "__name__", str(make))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return make(**arguments)
    except (UserWarning, TypeError, ValueError) as error:
        raise ConfigError(f"cannot build the augmentation {name} from {arguments}: {error}") from error
