# SPDX-License-Identifier: Apache-2.0
"""What `adaptclip.load` returns: an adapted CLIP that predicts images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn import functional as F

from adaptclip.data.transforms import decode_image
from adaptclip.errors import BackboneError, DataError, ResourceError
from adaptclip.feature_clip import FeatureClip, as_features
from adaptclip.methods.examples import encoded_image
from adaptclip.progress import progress_bar
from adaptclip.training.thresholds import Thresholds
from adaptclip.types import Batch

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.methods.method import Method


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        source: the path, or the position in the list for images that have none.
        label: the most probable class.
        confidence: its probability, 0 to 1.
        probabilities: class name -> probability, most probable first. They sum to 1, or after the sigmoid objective
            each is of its class by itself.
        labels: every class that is named, most probable first: `label`, or after the sigmoid objective all whose
            probability reaches their threshold, which may be none.
    """

    source: str
    label: str
    confidence: float
    probabilities: dict[str, float]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be predicted.

    Attributes:
        source: the path, or the position among the images for those that have none.
        reason: what is wrong with it, naming it.
    """

    source: str
    reason: str


class AdaptedModel:
    """An adapted CLIP ready to predict.

    Attributes:
        class_names: C names, in the order of the probabilities' columns.
        thresholds: what a class's probability must reach for it to be named, after the sigmoid objective; else None.
        manifest: what the artifact says of itself.
        folder: the artifact folder it was loaded from.
    """

    def __init__(self, adapter: Method, backbone: ClipBackbone, manifest: Mapping[str, Any], *, folder: Path) -> None:
        self.adapter, self.folder = adapter, folder
        self.backbone = backbone
        self.manifest = manifest
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        info = manifest.get("objective")
        self.thresholds = None if info is None else Thresholds.from_dict(info["thresholds"])

    def probabilities(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Returns the (B, C) float32 class probabilities of RGB images, on the CPU.

        Rows sum to 1; after the sigmoid objective each probability is of its class by itself.
        """
        self._require_tower()
        return self._of_pixels(torch.stack([self.backbone.transform(image) for image in images]))

    def probabilities_of_features(self, features: Any) -> torch.Tensor:
        """Returns the (B, C) float32 class probabilities of (B, D) image features of the same model, on the CPU.

        They may have any norm: only their directions count. For methods that change the image tower (LoRA), they are
        the features of the changed tower (`adapter.encoder`).

        Raises:
            DataError: they are not (B, D), or not finite.
        """
        rows = as_features(features, "image features", "(N, D)")
        return self._of_features(F.normalize(rows, dim=-1).to(self.backbone.device))

    @torch.inference_mode()
    def _of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C) probabilities of transformed images (B, 3, H, W)."""
        return self._of_features(self.adapter.encoder.encode_image(pixels.to(self.backbone.device)))

    @torch.inference_mode()
    def _of_features(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C) probabilities of unit-norm features (B, D)."""
        index = torch.arange(len(features), device=features.device)
        batch = Batch(labels=index, index=index, features=features)
        logits = self.adapter(batch).float()
        return (logits.softmax(dim=1) if self.thresholds is None else logits.sigmoid()).cpu()

    def predict(
        self, images: Sequence[Path | str | bytes | Image.Image], *, batch_size: int = 64, progress: bool = False
    ) -> list[Prediction]:
        """Predicts images: the checkpoint's own transform, the decoding used in training.

        Args:
            images: paths, encoded bytes or PIL images.
            batch_size: images per forward pass.
            progress: show a progress bar, or lines where standard error is no terminal.

        Raises:
            DataError: naming the first image that cannot be read; `stream` goes on after it.
            ResourceError: memory or open files gave out.
        """
        predictions: list[Prediction] = []
        with progress_bar(total=len(images), desc="predicting", unit="image", show=progress, leave=False) as bar:
            for found in self.stream(images, batch_size=batch_size):
                if isinstance(found, Unreadable):
                    raise DataError(found.reason)
                predictions.append(found)
                bar.update()
        return predictions

    def stream(
        self, images: Iterable[Path | str | bytes | Image.Image], *, batch_size: int = 64
    ) -> Iterator[Prediction | Unreadable]:
        """Predicts images one batch after another, in their order; an image that cannot be read costs no other.

        Each image is decoded and made small before the next, so that memory holds one image at its own size and a
        batch at the size of the tower's input.

        Args:
            images: paths, encoded bytes or PIL images.
            batch_size: images per forward pass.

        Yields:
            A prediction, or why there is none, for each image.

        Raises:
            BackboneError: the model was made from features, and has no image tower.
            ResourceError: memory or open files gave out; what comes before was yielded.
        """
        self._require_tower()
        waiting: list[tuple[str, torch.Tensor | Unreadable]] = []
        failed: ResourceError | None = None
        for number, image in enumerate(images):
            name = str(number) if isinstance(image, bytes | Image.Image) else str(image)
            try:
                waiting.append((name, self._pixels(image, name)))
            except DataError as error:
                waiting.append((name, Unreadable(name, str(error))))
            except ResourceError as error:
                failed = error
            if failed is not None:
                break
            if len(waiting) == batch_size:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)
        if failed is not None:
            raise failed

    def _require_tower(self) -> None:
        if isinstance(self.backbone, FeatureClip):
            raise BackboneError(
                "this model was made from features that were computed elsewhere, so it has no image tower and takes no "
                "images: give features of the same model to `probabilities_of_features`, (N, D) numbers"
            )

    def _pixels(self, image: Path | str | bytes | Image.Image, name: str) -> torch.Tensor:
        """(3, H, W): an image as the tower takes it."""
        window, frames = self.manifest.get("window"), self.manifest.get("frames")
        return self.backbone.transform(_as_rgb(image, name, tuple(window) if window else None, frames))

    def _answers(self, waiting: Sequence[tuple[str, torch.Tensor | Unreadable]]) -> Iterator[Prediction | Unreadable]:
        pixels = [found for _, found in waiting if isinstance(found, torch.Tensor)]
        rows = iter(self._of_pixels(torch.stack(pixels)) if pixels else ())
        for name, found in waiting:
            yield self._prediction(name, next(rows)) if isinstance(found, torch.Tensor) else found

    def _prediction(self, source: str, row: torch.Tensor) -> Prediction:
        order = row.argsort(descending=True, stable=True).tolist()
        ranked = {self.class_names[i]: float(row[i]) for i in order}
        label = self.class_names[order[0]]
        labels = (label,)
        if self.thresholds is not None:
            least = self.thresholds.values
            labels = tuple(self.class_names[i] for i in order if float(row[i]) >= least[i])
        return Prediction(source, label, float(row[order[0]]), ranked, labels)


def _as_rgb(
    image: Path | str | bytes | Image.Image, name: str, window: tuple[float, float] | None, frames: str | None
) -> Image.Image:
    if isinstance(image, Image.Image):
        # An image in memory takes the same way as a file, so that serving and training cannot differ.
        image = encoded_image(image)
    return decode_image(image if isinstance(image, bytes) else Path(image), row=name, window=window, frames=frames)
