# SPDX-License-Identifier: Apache-2.0
"""Captions: cells into texts, rows of one image joined, and which caption an image shows in which epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from adaptclip.data.card_block import normalise_text
from adaptclip.errors import DataError
from adaptclip.seeding import generator

if TYPE_CHECKING:
    from adaptclip.data.dataset import ImageDataset
    from adaptclip.types import Batch

_EXAMPLES = 3


def caption_values(values: Sequence[Any], *, where: Callable[[int], str]) -> tuple[tuple[str, ...], ...]:
    """Turns a caption column into one or more captions per row.

    Args:
        values: N cells, each a text or a list of texts; blank texts in a list are passed over.
        where: row -> what to call it in an error.

    Returns:
        N tuples of captions, in Unicode form NFC with single blanks.

    Raises:
        DataError: a row has no caption, or a cell holds something else than text.
    """
    captions: list[tuple[str, ...]] = []
    for row, cell in enumerate(values):
        texts = cell if isinstance(cell, list | tuple) else [] if cell is None or cell != cell else [cell]
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{where(row)}: a caption should be text, or a list of texts, got {text!r} "
                    f"({type(text).__name__}); columns.captions may name the wrong column"
                )
        captions.append(tuple(" ".join(normalise_text(text).split()) for text in texts if text and text.strip()))
    empty = [row for row, texts in enumerate(captions) if not texts]
    if empty:
        shown = ", ".join(where(row) for row in empty[:_EXAMPLES])
        raise DataError(
            f"{len(empty)} of {len(values)} images have no caption: {shown}{', …' if len(empty) > _EXAMPLES else ''}. "
            "Write one for each, or leave these rows out of the files"
        )
    return tuple(captions)


def join_repeated_images(images: ImageDataset, splits: Sequence[str]) -> tuple[ImageDataset, list[str]]:
    """Joins rows that show the same image, as in tables with one row per caption, so that each image is there once.

    Args:
        images: N rows with captions.
        splits: N names of the source's splits; copies in different splits, or of different classes, are not joined,
            so that the checks for leaks see them.

    Returns:
        The first row of each image with the different captions of all its rows, and a sentence if there were some.
    """
    assert images.captions is not None
    joined: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for row, key in enumerate(zip(images.contents, splits, images.kinds(), strict=True)):
        joined.setdefault(key, []).append(row)
    if len(joined) == len(images):
        return images, []
    own = images.captions
    captions = [tuple(dict.fromkeys(text for row in rows for text in own[row])) for rows in joined.values()]
    first = images.select([rows[0] for rows in joined.values()])
    sentence = f"{len(images)} rows show {len(joined)} images: rows of one image were joined, with all its captions"
    return replace(first, captions=tuple(captions)), [sentence]


@dataclass(frozen=True, eq=False)
class CaptionTokens:
    """Tokenised captions of N images; several images may share texts, as those of one class do.

    Attributes:
        tokens: (R, L) int64 token ids of R texts.
        first: (N,) int64 row of each image's first text.
        count: (N,) int64 number of its texts, which follow each other; 1 or more.
    """

    tokens: Tensor
    first: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def owner(self) -> Tensor:
        """(R,) int64 image of each text, where no two images share one."""
        return torch.arange(len(self.first)).repeat_interleave(self.count)

    def rows(self, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Returns the (B,) rows of the texts that the images `index` (B,) show in an epoch.

        Drawn uniformly from each image's own, anew in every epoch: a function of (seed, epoch, image) alone, whatever
        the batch, so that a resumed run and any number of processes see the same.
        """
        return self.first[index] + (_draws(seed, epoch, len(self))[index] * self.count[index]).long()


@lru_cache(maxsize=4)
def _draws(seed: int, epoch: int, num_images: int) -> Tensor:
    """(N,) float64 numbers from 0 to below 1."""
    return torch.rand(num_images, generator=generator(seed, "captions", epoch), dtype=torch.float64)


class ImageLoader(Protocol):
    """A loader of images whose batches name their positions in the split."""

    steps_per_epoch: int

    def batch(self, micro_step: int) -> Batch:
        """Returns this process's batch of a micro-step, counted from 0."""
        ...


class CaptionLoader:
    """Puts the tokens of one caption beside each image of another loader's batches.

    Like that loader's, each batch is a pure function of (seed, step).

    Attributes:
        steps_per_epoch: optimizer steps per epoch.
    """

    def __init__(self, loader: ImageLoader, captions: CaptionTokens, *, seed: int, accumulate: int = 1) -> None:
        """Joins images and captions.

        Args:
            loader: of N images; its batches' `index` counts through `captions`.
            captions: of the same images.
            seed: of the choice of captions.
            accumulate: micro-steps per optimizer step, as the loader has them.
        """
        self._loader, self._captions, self._seed, self._accumulate = loader, captions, seed, accumulate
        self.steps_per_epoch = loader.steps_per_epoch

    def batch(self, micro_step: int) -> Batch:
        """Returns the loader's batch with `tokens` (B, L)."""
        batch = self._loader.batch(micro_step)
        epoch = micro_step // self._accumulate // self.steps_per_epoch
        rows = self._captions.rows(batch.index.cpu(), seed=self._seed, epoch=epoch)
        return replace(batch, tokens=self._captions.tokens[rows].to(batch.labels.device))
