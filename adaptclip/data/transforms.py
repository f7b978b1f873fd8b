# SPDX-License-Identifier: Apache-2.0
"""From an encoded image to RGB pixels, for training, evaluation and serving alike, and training augmentation.

Augmentation is seeded per sample and works on uint8 pixels; the evaluation transform belongs to the checkpoint.
"""

from __future__ import annotations

import errno
import json
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from adaptclip.data.read_image import DamagedImage, ImageProblem, read_image
from adaptclip.errors import ConfigError, DataError, ResourceError, shown

if TYPE_CHECKING:
    from PIL import Image

_T = TypeVar("_T")

_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
"""What a file itself is to blame for; any other failure to read (a full table of open files, a disk, a network) is
none of its properties, so it must not make the image a bad one."""


def read_file(path: Path) -> bytes:
    """Returns a file's bytes.

    Raises:
        DataError: there is no such file, or it may not be read.
        ResourceError: the machine could not read it now.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # whoever opens a pipe waits for its writer, maybe for ever
            raise DataError(f"cannot read {shown(path)}: it is a pipe, no file")
        return path.read_bytes()
    except OSError as error:
        said = f"cannot read {shown(path)}: {error.strerror or error}"
        raise (DataError(said) if error.errno in _OF_THE_FILE else ResourceError(said)) from error
    except (MemoryError, ValueError) as error:
        kind = ResourceError if isinstance(error, MemoryError) else DataError  # ValueError: a name with a NUL
        raise kind(f"cannot read {shown(path)}: {str(error) or 'it does not fit into memory'}") from error


def decode_image(
    data: bytes | Path, *, row: str, window: tuple[float, float] | None = None, frames: str | int | None = None
) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, at its own size: `read_image`, with errors that name the row.

    Args:
        data: the encoded image, or the file that holds it.
        row: what to call the image in an error.
        window: (black, white) values for images of more than 8 bits; None refuses them.
        frames: which frame of an animation or a stack; None refuses what has several.

    Returns:
        A loaded PIL image in mode RGB.

    Raises:
        DataError: the image is missing, empty, truncated, too large, of an unknown kind, has more than 8 bits and no
            window, or several frames and nothing says which.
        ResourceError: memory, open files or a decoder are missing here; the image may be fine.
    """
    return worded(row, lambda: read_image(read_file(data) if isinstance(data, Path) else data, window, frames))


def worded(row: str, read: Callable[[], _T]) -> _T:
    """Calls what reads an image, and names the row in its errors.

    Raises:
        DataError: the image cannot be used.
        ResourceError: the machine cannot read it now; the image may be fine.
    """
    try:
        return read()
    except (DataError, ResourceError) as error:
        raise type(error)(f"{row}: {error}") from error
    except ImageProblem as error:
        more = ". Fetch it again, or leave such images out with `--on-bad-image skip`."
        raise DataError(f"{row}: {error}{more if isinstance(error, DamagedImage) else ''}") from error
    except MemoryError as error:
        raise ResourceError(
            f"{row}: there is not enough memory to decode it; this says nothing against the image. Give the program "
            "more memory or fewer workers, or scale the image down."
        ) from error
    except (OSError, ImportError) as error:
        raise ResourceError(f"{row}: it cannot be decoded here: {error}") from error


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
