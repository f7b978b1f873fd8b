# SPDX-License-Identifier: Apache-2.0
"""The values that travel between the modules, and the one legend of shapes.

Legend of shapes, used in every docstring:
    B  images in a batch            N  images in a data set or split
    C  classes                      D  width of the joint embedding space
    L  tokens of a prompt           T  width of the text transformer
    M  learnt context tokens        V  numbered augmented views of an image
    K  k of a top-k                 H, W  height and width in pixels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's images, as features (frozen tower) or pixels, with their labels.

    Attributes:
        labels: (B,) int64 class ids.
        index: (B,) int64 positions in the split the batch was drawn from.
        features: (B, D) unit-norm image features, or None.
        images: (B, 3, H, W) transformed pixels, or None.
        tokens: (B, L) int64 token ids of one text per image, or None.
        multi_hot: (B, C) int8 where images may show several classes: 1 shows it, 0 does not, -1 nobody knows; or None.
    """

    labels: Tensor
    index: Tensor
    features: Tensor | None = None
    images: Tensor | None = None
    tokens: Tensor | None = None
    multi_hot: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class Learner(Protocol):
    """A method, as far as its training is concerned: an `nn.Module` whose `forward` does all that the loss needs.

    Attributes:
        backbone: the frozen model it sits on.
        consumes: whether `forward` reads `batch.features` or `batch.images` in training.
    """

    backbone: Any
    consumes: Literal["features", "pixels"]

    def __call__(self, batch: Batch) -> Tensor:
        """Returns (B, C) float32 logits, already multiplied by the logit scale."""
        ...

    def penalty(self) -> Tensor:
        """Scalar to add to the loss, computed in the last `forward`; 0 where there is no regulariser."""
        ...


@dataclass(frozen=True)
class Features:
    """Image features of a whole split.

    Attributes:
        values: (V, N, D) float32, unit norm; V is 1 for the evaluation transform.
        labels: (N,) int64.
        ids: N row ids.
        weights: digest of the image weights that made them (`ClipBackbone.image_digest`); "" where it is not known.
        multi_hot: (N, C) int8 where images may show several classes, as in `Batch`; or None.
    """

    values: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    weights: str = ""
    multi_hot: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, dataset: Any, weights: str = "") -> Features:
        """Returns features (V, N, D) of the N images of a data set, with their labels."""
        import torch

        marks = dataset.multi_hot
        labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
        return cls(values, labels, tuple(dataset.ids), weights, None if marks is None else torch.as_tensor(marks))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        """One line; the numbers are attributes."""
        return f"<Features {tuple(self.values.shape)}: views, images, width>"
