# SPDX-License-Identifier: Apache-2.0
"""Features of real CLIP models (WHU-RS19) for tests of methods: draws from them, and a model that has them alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from adaptclip.feature_clip import FeatureClip
from adaptclip.types import Batch, Features

VIT_B_32 = Path(__file__).parents[1] / "data_cards" / "aerial_features.safetensors"
"""The features of the card `aerial_features`: WHU-RS19 by OpenAI's ViT-B/32."""
NUM_CLASSES = 19
NAMES = tuple(f"{i}" for i in range(NUM_CLASSES))


@dataclass(frozen=True)
class Real:
    """All images of a set with its text features, and draws from it.

    20 images of each class are for drawing, the same for every seed; the others are the test images.
    """

    images: Tensor
    labels: Tensor
    text: Tensor
    scale: float = 100.0

    @property
    def clip(self) -> FeatureClip:
        return FeatureClip(self.text, NAMES, logit_scale=self.scale)

    def draw(self, shots: int, seed: int) -> tuple[Features, Features]:
        """Training and validation features: `shots` images of each class, and min(shots, 4) others."""
        train, validation = [], []
        for pool in self._pools():
            order = np.random.default_rng([seed, 7]).permutation(20)
            train.append(pool[order[:shots]])
            validation.append(pool[order[16 : 16 + min(shots, 4)]])
        return self.of(np.concatenate(train)), self.of(np.concatenate(validation))

    def of(self, rows: np.ndarray) -> Features:
        index = torch.from_numpy(rows)
        return Features(self.images[index][None], self.labels[index], tuple(map(str, rows)))

    @property
    def test(self) -> Features:
        return self.of(np.setdiff1d(np.arange(len(self.labels)), np.concatenate(self._pools())))

    def moved(self, by: float) -> Real:
        """The same with every number of images and texts moved by a random amount of that size."""
        draw = torch.Generator().manual_seed(5)
        images, text = (x + by * torch.randn(x.shape, generator=draw) for x in (self.images, self.text))
        return Real(images, self.labels, text, self.scale)

    def accuracy(self, adapter: Any) -> float:
        """Percent of the test images."""
        test = self.test
        with torch.no_grad():
            logits = adapter(Batch(labels=test.labels, index=test.labels, features=test.values[0]))
        return 100 * float((logits.argmax(dim=1) == test.labels).float().mean())

    def _pools(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.permutation(np.flatnonzero(self.labels.numpy() == c))[:20] for c in range(NUM_CLASSES)]


def load(path: Path = VIT_B_32) -> Real:
    """Reads one of the files of features."""
    tensors = load_file(path)
    texts = tensors["text"] if "text" in tensors else tensors["text.averageprompt"]
    images, text = (F.normalize(tensor.float(), dim=-1) for tensor in (tensors["image"], texts))
    return Real(images, tensors["label"], text)
