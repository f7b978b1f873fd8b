# SPDX-License-Identifier: Apache-2.0
"""What `adaptclip.load` returns: an adapted CLIP that predicts images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from adaptclip.data.given_images import GivenImage, each_image
from adaptclip.errors import BackboneError, DataError, ResourceError, listed, shown
from adaptclip.feature_clip import FeatureClip, as_features
from adaptclip.methods.examples import as_dataset
from adaptclip.progress import progress_bar
from adaptclip.settings import check_number
from adaptclip.training.thresholds import Thresholds
from adaptclip.types import Batch

if TYPE_CHECKING:
    from PIL import Image

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
    probabilities: dict[str, float] = field(repr=False)
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
        classes_: the same as an array.
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

    def __repr__(self) -> str:
        """One line: the method, the model, the classes, the folder, the verdicts of its gates."""
        verdicts = [verdict["verdict"] for verdict in self.manifest.get("verdicts") or ()]
        judged = next((kind for kind in ("fail", "inconclusive", "pass") if kind in verdicts), "none")
        return (
            f"<AdaptedModel: {self.manifest['method']} on {self.backbone!r}; {listed(self.class_names, 'classes')}; "
            f"gates: {judged}; from {shown(self.folder)}>"
        )

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

    @property
    def classes_(self) -> np.ndarray:
        """The C class names in the order of `predict_proba`'s columns, as scikit-learn's classifiers have them."""
        return np.array(self.class_names)

    def predict_proba(self, x: Any) -> np.ndarray:
        """Returns (N, C) float32 class probabilities, columns in the order of `classes_`.

        Rows sum to 1; after the sigmoid objective each probability is of its class by itself.

        Args:
            x: images as `predict` takes them, or (N, D) features of the same model (see `probabilities_of_features`).

        Raises:
            DataError: an image cannot be read, or x is neither.
            BackboneError: the model was made from features, and got images.
        """
        window, width = self.manifest.get("window"), self.adapter.encoder.embed_dim
        images = as_dataset(
            x, None, self.class_names, width=width, what="images", window=window and tuple(window),
            frames=self.manifest.get("frames"),
        )  # fmt: skip
        if images.has_pixels:
            self._require_tower()
        return self.adapter.predict_proba(images)

    def predict(self, images: Any, *, batch_size: int = 64, progress: bool = False) -> list[Prediction]:
        """Predicts images: the checkpoint's own transform, the decoding used in training.

        Args:
            images: one image, or a list, generator, array or column of them: paths, PIL images, encoded bytes, open
                binary files, or pixels of uint8, of bool, or of floats from 0 to 1 (see `data.given_images`).
            batch_size: images per forward pass.
            progress: show a progress bar, or lines where standard error is no terminal.

        Returns:
            A prediction for each; a list of one for a single image. `predict_proba` gives the numbers as an array.

        Raises:
            DataError: naming the first image that cannot be read (`stream` goes on after it), or there are no images.
            ResourceError: memory or open files gave out.
        """
        predictions: list[Prediction] = []
        total = len(images) if isinstance(images, Sized) and not isinstance(images, str | bytes) else None
        with progress_bar(total=total, desc="predicting", unit="image", show=progress, leave=False) as bar:
            for found in self.stream(images, batch_size=batch_size):
                if isinstance(found, Unreadable):
                    raise DataError(found.reason)
                predictions.append(found)
                bar.update()
        return predictions

    def stream(self, images: Any, *, batch_size: int = 64) -> Iterator[Prediction | Unreadable]:
        """Predicts images one batch after another, in their order; an image that cannot be read costs no other.

        Each image is decoded and made small before the next, so that memory holds one image at its own size and a
        batch at the size of the tower's input.

        Args:
            images: as `predict` takes them; a generator is read as it is needed.
            batch_size: images per forward pass.

        Yields:
            A prediction, or why there is none, for each image.

        Raises:
            ConfigError: batch_size is below 1.
            DataError: there are no images, or it is nothing that has images in an order.
            BackboneError: the model was made from features, and has no image tower.
            ResourceError: memory or open files gave out; what comes before was yielded.
        """
        self._require_tower()
        check_number("batch_size", batch_size)
        waiting: list[tuple[str, torch.Tensor | Unreadable]] = []
        failed: ResourceError | None = None
        for image in each_image(images):
            try:
                waiting.append((image.name, self._pixels(image)))
            except DataError as error:
                waiting.append((image.name, Unreadable(image.name, str(error))))
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

    def _pixels(self, image: GivenImage) -> torch.Tensor:
        """(3, H, W): an image as the tower takes it."""
        window, frames = self.manifest.get("window"), self.manifest.get("frames")
        return self.backbone.transform(image.decoded(tuple(window) if window else None, frames))

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
