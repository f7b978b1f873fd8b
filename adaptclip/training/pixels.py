# SPDX-License-Identifier: Apache-2.0
"""Batches of augmented images for methods that adapt the image tower."""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptclip.errors import ConfigError
from adaptclip.seeding import derive_seed
from adaptclip.training.steps import StepPlan
from adaptclip.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import ImageDataset
    from adaptclip.data.transforms import Augment


class PixelLoader:
    """Batches of augmented images, divided into steps by `StepPlan`; the next batch is made while one is used.

    Epoch e shows crop number e of every image, or e mod `views`. A numbered crop is fixed by its number and the
    image's bytes, as in `FeatureCache`: the frozen tower's features of a batch are those the cache holds of that view.

    Attributes:
        steps_per_epoch: optimizer steps per epoch, 1 or more.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        backbone: ClipBackbone,
        *,
        augment: Augment,
        batch_size: int,
        seed: int,
        accelerator: Accelerator,
        views: int = 0,
        workers: int = 0,
        strata: Tensor | None = None,
    ) -> None:
        """Divides the images into steps.

        Args:
            dataset: N images of the training split.
            backbone: gives the normalisation of pixels.
            augment: makes the crops.
            batch_size: images per process and micro-step.
            seed: of the order.
            accelerator: tells the number of processes and of accumulated micro-batches, and the device.
            views: number of different crops of each image; 0 makes fresh ones in every epoch.
            workers: threads that decode and crop; 0 chooses up to 8.
            strata: (N,) what is shown equally often (`Mitigation.strata`); None shows every image once per epoch.

        Raises:
            ConfigError: a number out of range, or fewer images than parts of a step.
        """
        if views < 0 or workers < 0:
            raise ConfigError(f"views and workers must be 0 or more, got {views} and {workers}")
        self._dataset, self._backbone, self._views = dataset, backbone, views
        self._labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
        self._marks = None if dataset.multi_hot is None else torch.as_tensor(dataset.multi_hot)
        self._device = accelerator.device
        self._plan = StepPlan(len(dataset), batch_size=batch_size, seed=seed, accelerator=accelerator, strata=strata)
        self.steps_per_epoch = self._plan.steps_per_epoch
        self._augment, self._own = augment, threading.local()
        self._pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
        self._ahead: dict[int, list[Future[Tensor]]] = {}

    def batch(self, micro_step: int) -> Batch:
        """Returns this process's part of a micro-step, on the accelerator's device.

        Args:
            micro_step: 0, 1, 2, …; there are `accumulate` of them per optimizer step.

        Returns:
            images (B, 3, H, W), labels (B,) and index (B,), the positions in the split.

        Raises:
            DataError: an image cannot be decoded; the message names the row.
        """
        _, index = self._plan.rows(micro_step)
        pending = self._ahead.pop(micro_step, None) or self._start(micro_step)
        self._ahead = {micro_step + 1: self._start(micro_step + 1)}
        images = torch.stack([picture.result() for picture in pending])
        # Convolutions take it faster, and to a patch embedding it makes no difference.
        images = images.contiguous(memory_format=torch.channels_last)
        marks = None if self._marks is None else self._marks[index]
        return Batch(labels=self._labels[index], index=index, images=images, multi_hot=marks).to(self._device)

    def _start(self, micro_step: int) -> list[Future[Tensor]]:
        epoch, index = self._plan.rows(micro_step)
        view = epoch % self._views if self._views else epoch
        return [self._pool.submit(self._picture, row, view) for row in index.tolist()]

    def _picture(self, row: int, view: int) -> Tensor:
        """(3, H, W) crop number `view` of an image."""
        # albumentations keeps its random state in the pipeline object, so each thread has one of its own.
        if not hasattr(self._own, "augment"):
            self._own.augment = copy.deepcopy(self._augment)
        seed = derive_seed(0, self._dataset.contents[row], view)
        return self._backbone.normalize(self._own.augment(self._dataset.image(row), seed))
